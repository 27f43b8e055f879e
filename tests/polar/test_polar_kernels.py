"""Kernels of symmetric products: right, symmetric to the last bit, and of half the tiles."""

import inspect
import re
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import chips
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon.polar import Kernel
from optax_muon.polar.kernels import gpu, tpu
from optax_muon.polar.kernels.tiles import Tiles

SMALL = {tpu: Tiles(128, 128), gpu: Tiles(32, 64)}
"""Cuts small enough that these matrices have tiles under the diagonal."""

both = pytest.mark.parametrize("kernel", [tpu, gpu], ids=["tpu", "gpu"])


def matrices(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def product(kernel, a, b, tiles=None):
    return kernel.symmetric_product(a, b, tiles=tiles or SMALL[kernel], interpret=True)


def exact(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def grid(kernel, *operands, **options):
    """The grid of the one Pallas call that the product becomes."""
    traced = jax.make_jaxpr(lambda a: kernel.symmetric_product(a, a, **options))(*operands)
    [call] = [eqn for eqn in traced.eqns if eqn.primitive.name == "pallas_call"]
    return call.params["grid_mapping"].grid


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(3, 256, 512), (2, 130, 77), (1, 64, 64), (1, 5, 300), (1, 1)])
def test_a_gram_matrix_is_right_and_symmetric_to_the_last_bit(kernel, dtype, shape):
    x = matrices(shape, dtype)
    gram = product(kernel, x, x)
    assert gram.shape == (*shape[:-1], shape[-2])
    assert gram.dtype == jnp.float32
    np.testing.assert_array_equal(gram, gram.mT)
    # Products of half precision are exact in float32, and a sum of k terms in any order is off by
    # at most k roundings of the sum of their sizes; one more is the mean on the diagonal.
    truth, sizes = exact(x) @ exact(x).mT, np.abs(exact(x)) @ np.abs(exact(x)).mT
    assert (np.abs(exact(gram) - truth) <= (shape[-1] + 1) * 2**-24 * sizes).all()


@both
def test_the_cut_taken_by_default_is_right(kernel):
    x = matrices((1, 200, 100), "bfloat16")
    gram = kernel.symmetric_product(x, x, interpret=True)
    np.testing.assert_array_equal(gram, gram.mT)
    np.testing.assert_allclose(gram, exact(x) @ exact(x).mT, atol=100 * 2**-24 * 200)


@both
def test_a_product_of_commuting_matrices_is_right(kernel):
    a = np.tril(np.random.default_rng(1).integers(-1, 2, (2, 150, 150)))
    a = a + np.tril(a, -1).mT
    # Integers up to 256 are exact in bfloat16, and their sums of products in float32.
    square = a @ a
    assert np.abs(square).max() <= 256
    cube = product(kernel, jnp.asarray(square, "bfloat16"), jnp.asarray(a, "bfloat16"))
    np.testing.assert_array_equal(cube, square @ a)


@both
def test_leading_axes_are_a_batch(kernel):
    x = matrices((2, 3, 70, 90), "float32")
    grams = product(kernel, x, x)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(grams[index], product(kernel, x[index], x[index]))
    nested = jax.vmap(jax.vmap(lambda x: product(kernel, x, x)))(x)
    np.testing.assert_array_equal(nested, grams)


@both
def test_zeros_stay_zero_and_nothing_stays_nothing(kernel):
    x = matrices((2, 130, 77), "bfloat16").at[0].set(0)
    gram = product(kernel, x, x)
    assert not gram[0].any()
    assert gram[1].any()
    assert product(kernel, x[:0], x[:0]).shape == (0, 130, 130)
    assert not product(kernel, x[:, :, :0], x[:, :, :0]).any()


def test_memory_never_written_is_never_read_on_a_tpu():
    x = matrices((2, 130, 77), "bfloat16")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        gram = tpu.symmetric_product(x, x, tiles=SMALL[tpu])
    np.testing.assert_array_equal(gram, product(tpu, x, x))


@pytest.mark.parametrize("check", [False, True])
def test_the_tpu_kernel_stands_inside_shard_map(check):
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Explicit,))
    x = matrices((8, 130, 77), "float32")
    mapped = jax.shard_map(
        lambda x: product(tpu, x, x), mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check
    )
    sharded = jax.jit(mapped)(jax.device_put(x, NamedSharding(mesh, P("x"))))
    np.testing.assert_array_equal(sharded, product(tpu, x, x))


@pytest.mark.parametrize(("m", "side"), [(1, 1), (128, 1), (129, 2), (1000, 8)])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_under_the_diagonal_is_computed_once(m, side, group):
    tiles = Tiles(128, 64)
    places = Counter(zip(*tiles.places(m, group).tolist(), strict=True))
    assert places == Counter((i, j) for i in range(side) for j in range(i + 1))
    assert tiles.count(m) == len(places) == side * (side + 1) // 2
    assert tiles.flops(m, 100) == len(places) * 2 * 128 * 128 * 100


def test_no_step_of_the_grid_is_above_the_diagonal():
    x = jax.ShapeDtypeStruct((3, 1000, 520), jnp.bfloat16)
    # 8 x 8 tiles, 5 pieces of a sum, and the step that mirrors.
    assert grid(tpu, x, tiles=Tiles(128, 128)) == (3, 36, 6)
    assert grid(gpu, x) == (3 * 36,)


@both
@pytest.mark.parametrize(("m", "k", "most"), [(4096, 4096, 0.63), (8192, 28672, 0.57)])
def test_large_products_cost_little_more_than_half(kernel, m, k, most):
    whole = 2 * m * m * k
    assert 0.5 * whole < Kernel(kernel.__name__.split(".")[-1]).flops(m, k) <= most * whole


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ((3, 4), (3, 5), ValueError, r"\(3, 4\) and \(3, 5\)"),
        ((4,), (4,), ValueError, r"\[..., m, k\]"),
        ((3, 4), "float64", TypeError, "float64"),
        ((3, 4), "int32", TypeError, "bfloat16, float16 and float32"),
    ],
)
@both
def test_what_cannot_be_multiplied_is_refused(kernel, a, b, error, message):
    if isinstance(b, str):
        a = b = jax.ShapeDtypeStruct(a, b)
    else:
        a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (a, b))
    with jax.enable_x64(True), pytest.raises(error, match=message):
        jax.eval_shape(kernel.symmetric_product, a, b)


def test_the_package_is_imported_without_pallas():
    program = "import sys, optax_muon; assert not any('pallas' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", TPUS.values(), ids=TPUS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 4096, 4096), "bfloat16"),  # the largest tiles
        ((4, 1792, 11008), "bfloat16"),  # the most VMEM: 15 MiB
        ((4, 1000, 4097), "float32"),
        ((4, 130, 77), "float16"),
    ],
)
def test_libtpu_compiles_the_kernel(topology, shape, dtype):
    mesh = chips(topology, {"x": 4}, AxisType.Auto)
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("x")))
    kernel = jax.shard_map(
        lambda x: tpu.symmetric_product(x, x), mesh=mesh, in_specs=P("x"), out_specs=P("x")
    )
    program = jax.jit(kernel).lower(x).compile()
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert not re.search("all-(gather|reduce|to-all)|permute", text)
    # XLA is told what the kernel does, so it can place it and count it.
    wide = "bfloat16" if dtype == "bfloat16" else "float32"
    assert program.cost_analysis()["flops"] >= Tiles.for_tpu(*shape[1:], wide).flops(*shape[1:])


# jax 0.11 and 0.12 say that the Triton backend will be removed.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_gpu_kernel_becomes_triton_code_for_hopper(dtype):
    from jax.sharding import AbstractDevice, AbstractMesh

    if "platform" not in inspect.signature(AbstractDevice).parameters:
        pytest.skip("this jax asks a real GPU for its capability")
    hopper = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", None, "cuda"))
    x = jax.ShapeDtypeStruct((2, 1024, 512), dtype)
    with jax.sharding.use_abstract_mesh(hopper):
        traced = jax.jit(lambda x: gpu.symmetric_product(x, x)).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # 8 x 8 tiles, two matrices.
    assert "grid_x = 72" in text
    assert "triton" in text
