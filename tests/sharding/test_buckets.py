"""Matrices of one shape share a batch, whatever parameters they come from."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_muon import Split, View, newton_schulz, orthogonalize, plan
from optax_muon.polar import NewtonSchulz

SHAPES = {
    "down": (24, 8),
    "experts": (2, 3, 8, 24),
    "norm": (8,),
    "qkv": (8, 24 + 8 + 8),
    "square": (8, 8),
    "up": (8, 24),
}
VIEWS = {
    "down": View(0, 1),
    "experts": View(2, 3),
    "norm": None,
    "qkv": View(0, 1, Split(1, (24, 8, 8))),
    "square": View(0, 1),
    "up": View(0, 1),
}


def pooled(shapes=SHAPES, views=VIEWS, dtypes=None):
    """The buckets of parameters of these shapes on one device."""
    params = {
        path: jax.ShapeDtypeStruct(shape, (dtypes or {}).get(path, jnp.float32))
        for path, shape in shapes.items()
    }
    return [bucket_plan.bucket for bucket_plan in plan(params, views=views).buckets]


def stacks():
    """The matrices of all parameters, by path and block."""
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.normal(size=shape)) for path, shape in SHAPES.items()}
    matrices = {path: view for path, view in VIEWS.items() if view is not None}
    return {path: v.bind(SHAPES[path]).to_matrices(params[path]) for path, v in matrices.items()}


def test_layers_experts_parts_and_both_orientations_share_a_bucket():
    found = {
        (b.rows, b.cols): [(m.path, m.block, m.batch, m.tall) for m in b.members] for b in pooled()
    }
    assert found == {
        (8, 24): [
            ("down", 0, 1, True),
            ("experts", 0, 6, False),
            ("qkv", 0, 1, False),
            ("up", 0, 1, False),
        ],
        (8, 8): [("qkv", 1, 1, False), ("qkv", 2, 1, False), ("square", 0, 1, False)],
    }


def test_the_size_counts_matrices():
    assert [bucket.size for bucket in pooled()] == [9, 3]


def test_the_number_of_buckets_does_not_grow_with_depth():
    deep = {f"{path}{layer}": shape for path, shape in SHAPES.items() for layer in range(20)}
    views = {f"{path}{layer}": view for path, view in VIEWS.items() for layer in range(20)}
    assert [bucket.size for bucket in pooled(deep, views)] == [9 * 20, 3 * 20]


def test_dtypes_are_pooled_apart():
    buckets = pooled(dtypes={"up": jnp.bfloat16})
    assert [(b.rows, b.cols, str(b.dtype), b.size) for b in buckets] == [
        (8, 24, "float32", 8),
        (8, 8, "float32", 3),
        (8, 24, "bfloat16", 1),
    ]


def test_a_pool_holds_every_matrix_with_its_short_side_first():
    given = stacks()
    pool = pooled()[0].pack(given, 0, 9)
    np.testing.assert_array_equal(pool[0], given["down"][0][0].T)
    np.testing.assert_array_equal(pool[1:7], given["experts"][0])
    np.testing.assert_array_equal(pool[7:8], given["qkv"][0])
    np.testing.assert_array_equal(pool[8:], given["up"][0])


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 4), (2, 3), (5, 4), (8, 1)])
def test_a_part_of_a_pool_is_packed_alone(start, count):
    bucket, given = pooled()[0], stacks()
    whole = bucket.pack(given, 0, bucket.size)
    np.testing.assert_array_equal(bucket.pack(given, start, count), whole[start : start + count])


@pytest.mark.parametrize("ends", [(9,), (1, 9), (2, 5, 9), (4, 8, 9)])
def test_unpacking_joins_what_is_cut_inside_a_member(ends):
    bucket, given = pooled()[0], stacks()
    starts = (0, *ends[:-1])
    parts = [bucket.pack(given, i, j - i) for i, j in zip(starts, ends, strict=True)]
    for (path, block), matrices in bucket.unpack(parts).items():
        np.testing.assert_array_equal(matrices, given[path][block])


@pytest.mark.parametrize("number", [0, 1])
def test_unpacking_undoes_packing(number):
    bucket, given = pooled()[number], stacks()
    back = bucket.unpack([bucket.pack(given, 0, bucket.size)])
    assert back.keys() == {(member.path, member.block) for member in bucket.members}
    for (path, block), matrices in back.items():
        np.testing.assert_array_equal(matrices, given[path][block])


def test_a_tree_without_matrices_has_no_buckets():
    assert pooled({"norm": (8,)}, {"norm": None}) == []


def kernels(program):
    """The kernels of a compiled program, each once however often it is started."""
    text = program.as_text()
    bodies = re.findall(r"^%(?:fused|wrapped)\S* \(.*?^}", text, re.MULTILINE | re.DOTALL)
    return {re.sub(r"%\S+|, metadata=\{[^}]*\}|\S*param_\S*", "", body) for body in bodies}


def test_a_stack_is_cut_by_one_kernel_however_many_share_it():
    def taken_apart(leaves):
        shapes = {f"{index}": (8, 24) for index in range(leaves)}
        [bucket] = pooled(shapes, {path: View(0, 1) for path in shapes})
        stack = jax.ShapeDtypeStruct((leaves, 8, 24), jnp.float32)
        return jax.jit(lambda x: list(bucket.unpack([x]).values())).lower(stack).compile()

    # Compiling the kernels is what takes the time: each of LLVM's takes about 12 ms.
    assert len(kernels(taken_apart(32))) == len(kernels(taken_apart(4)))


def test_a_stack_is_orthogonalized_in_place():
    stack = jax.ShapeDtypeStruct((32, 128, 256), jnp.float32)
    update = orthogonalize(views={"stack": View(1, 2)}).update

    def step(x):
        return update({"stack": x}, optax.EmptyState())[0]["stack"]

    program = jax.jit(step, donate_argnums=0).lower(stack).compile()
    # What one matrix of the 32 needs, and not another stack.
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * 32 * 128 * 256 * 4


def test_a_tall_matrix_alone_is_transposed_before_its_products():
    """XLA's CPU backend carries a transpose through all products, but not into a branch."""
    update = orthogonalize(views={"kernel": View(0, 1)}).update

    def step(x):
        return update({"kernel": x}, optax.EmptyState())[0]["kernel"]

    def products(shape):
        text = jax.jit(step).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()
        return sorted(
            re.findall(r"= (\S+) dot\(.*?(lhs_contracting\S+) (rhs_contracting\S+)", text)
        )

    assert products((256, 64)) == products((64, 256))


class Told:
    """An orthogonalizer that takes what it is traced for, and remembers it."""

    supports_platform = True

    def __init__(self):
        self.traced_for = []

    def __call__(self, x, platform=None):
        self.traced_for.append(platform)
        return x


def test_an_orthogonalizer_that_is_told_is_traced_once_for_each_platform():
    told = Told()
    update = orthogonalize(told, views={"stack": View(1, 2)}).update
    stack = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32)
    jax.eval_shape(lambda x: update({"stack": x}, optax.EmptyState())[0], stack)
    assert sorted(told.traced_for) == ["cpu", "gpu", "tpu"]


@pytest.mark.parametrize(
    "orthogonalizer", [newton_schulz, functools.partial(newton_schulz, steps=3), NewtonSchulz()]
)
def test_ours_chooses_its_platform_once(orthogonalizer):
    update = orthogonalize(orthogonalizer, views={"stack": View(1, 2)}).update
    stack = jnp.ones((8, 16, 32), jnp.float32)
    found = jax.make_jaxpr(lambda x: update({"stack": x}, optax.EmptyState())[0])(stack)
    assert str(found).count("platform_index[") == 1
