"""`compat.muon` is `optax.contrib.muon`: same arguments, same state, same numbers."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_trees_close_to_largest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Dims

from optax_muon import compat, state_shardings
from optax_muon.compat.preconditioning import PRECONDITIONERS, newton_schulz

MIXED = {
    "bias": (5,),
    "conv": (2, 3, 4, 8),
    "dense": {"down": (9, 4), "same": (4, 9), "up": (4, 9)},
    "embed": (7, 4),
    "layers": (3, 6, 4),
}
MIXED_DIMS = {
    "bias": None,
    "conv": Dims((0, 1, 2), 3),
    "dense": Dims(),
    "embed": None,
    "layers": Dims(1, -1),
}
# Both sides do the same products; XLA may sum a batch of them in another order. An error of one
# float32 eps (6e-8) in a small singular value grows by the slope of five steps, 3.4445^5 = 485: to
# 3e-5.
CLOSE = 3e-5

# Every argument at another value than its default, several to a run.
OPTIONS = {
    "defaults": {},
    "plain_momentum": {"nesterov": False, "beta": 0.8, "eps": 0.3},
    "aol": {"preconditioning": "aol", "ns_coeffs": "dion", "ns_steps": 6, "adaptive": True},
    "schatten": {"preconditioning": "schatten", "ns_coeffs": (2.0, -1.5, 0.5), "ns_steps": 7},
    "spectral": {
        "preconditioning": "spectral",
        "ns_coeffs": np.array([[3.0, -3.2, 1.2], [1.5, -0.5, 0.0]], np.float32),
        "consistent_rms": 0.2,
    },
    "decay": {"weight_decay": 0.1, "adam_weight_decay": 0.2, "ns_steps": 1},
    "schedule": {
        "learning_rate": optax.linear_schedule(1.0, 0.1, 3),
        "weight_decay": 0.1,
        "weight_decay_mask": lambda params: jax.tree.map(lambda p: p.shape[-1] == 4, params),
    },
    "adam": {"adam_b1": 0.8, "adam_b2": 0.9, "adam_eps_root": 1e-3, "adam_learning_rate": 0.5},
    "mu_dtype": {"mu_dtype": jnp.bfloat16},
}


def random_tree(shapes, seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def draw(shape):
        x = rng.normal(size=shape)
        return jnp.asarray(x + 1j * rng.normal(size=shape) if dtype == jnp.complex64 else x, dtype)

    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def run(tx, params, steps=3, dtype=jnp.float32):
    """The updates of every step and the last state, on the same gradients for everyone."""
    state, found = tx.init(params), []
    step = jax.jit(tx.update)
    shapes = jax.tree.map(lambda p: p.shape, params)
    for seed in range(1, steps + 1):
        updates, state = step(random_tree(shapes, seed, dtype), state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        found.append(updates)
    return found, state


def assert_close(ours, theirs, tolerance=CLOSE):
    """Equal structures, dtypes, shapes; leaves equal up to `tolerance` of their largest entry."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    assert_trees_close_to_largest(ours, theirs, tolerance)


def assert_parity(params, dtype=jnp.float32, tolerance=CLOSE, **options):
    options = {"learning_rate": 0.1, **options}
    ours = run(compat.muon(**options), params, dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):  # optax itself does not run under the strict one
        theirs = run(optax.contrib.muon(**options), params, dtype=dtype)
    assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_gives_optax_numbers(options):
    # bfloat16 keeps 8 bits of the momentum: an entry may round to its other neighbour, 2^-8 away.
    tolerance = 2**-7 if "mu_dtype" in options else CLOSE
    dims = {"muon_weight_dimension_numbers": MIXED_DIMS}
    assert_parity(random_tree(MIXED, 0), tolerance=tolerance, **dims, **options)


@pytest.mark.parametrize(
    "dims",
    [
        None,
        lambda params: {**MIXED_DIMS, "embed": Dims()},
        lambda params: jax.tree.map(lambda p: Dims(-2, -1) if p.ndim > 2 else None, params),
    ],
    ids=["every_matrix", "callable", "callable_of_shapes"],
)
def test_leaves_are_routed_as_optax_routes_them(dims):
    assert_parity(random_tree(MIXED, 0), muon_weight_dimension_numbers=dims)


@pytest.mark.parametrize("preconditioning", ["frobenius", "aol", "schatten"])
def test_complex_matrices_follow_optax(preconditioning):
    shapes = {"w": (3, 5), "v": (5, 3), "b": (2,)}
    assert_parity(
        random_tree(shapes, 0, jnp.complex64), jnp.complex64, preconditioning=preconditioning
    )


@pytest.mark.parametrize(("params", "grads"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_low_precision_follows_optax_dtype_for_dtype(params, grads):
    # Rounding to 8 bits in another order is amplified by the five steps as well; what is compared
    # is that no cast is missing or added: dtypes exactly, values as two roundings of one result.
    shapes = {"w": (6, 4), "b": (3,)}
    tolerance = 0.05 if grads == "bfloat16" else 2**-7
    assert_parity(random_tree(shapes, 0, jnp.dtype(params)), jnp.dtype(grads), tolerance)


def test_injected_hyperparameters_follow_optax():
    params = random_tree(MIXED, 0)
    options = {"learning_rate": 0.1, "consistent_rms": 0.2, "weight_decay": 0.1, "beta": 0.9}
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (
            run(optax.inject_hyperparams(factory, ("ns_steps",))(**options), params)
            for factory in (compat.muon, optax.contrib.muon)
        )
    assert_close(ours, theirs)


def test_the_signature_is_optax_own():
    for name in ("muon", "scale_by_muon"):
        ours = inspect.signature(getattr(compat, name)).parameters
        theirs = inspect.signature(getattr(optax.contrib, name)).parameters
        assert list(ours) == list(theirs)
        for key, parameter in ours.items():
            assert parameter.kind == theirs[key].kind
            assert parameter.default == theirs[key].default


def test_the_building_block_is_optax_own():
    grads = random_tree({"w": (3, 4), "v": (6, 2)}, 0)
    dims = {"w": Dims(), "v": Dims()}
    ours = run(compat.scale_by_muon(weight_dimension_numbers=dims), grads)
    with jax.numpy_dtype_promotion("standard"):
        theirs = run(optax.contrib.scale_by_muon(weight_dimension_numbers=dims), grads)
    assert_close(ours, theirs)
    assert_close(run(compat.scale_by_muon(), grads), theirs)  # 2-D leaves need no dims here


@pytest.mark.parametrize("options", [{}, {"weight_decay_mask": {"w": True, "b": False}}])
def test_a_run_changes_hands_in_the_middle(options):
    params = random_tree({"w": (4, 6), "b": (3,)}, 0)
    options = {"weight_decay": 0.1, **options}
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = compat.muon(0.1, **options), optax.contrib.muon(0.1, **options)
        states = {}
        for name, order in {"alone": [theirs] * 4, "mixed": [theirs, ours] * 2}.items():
            state = order[0].init(params)
            for seed, tx in enumerate(order):
                grads = random_tree({"w": (4, 6), "b": (3,)}, seed)
                updates, state = jax.jit(tx.update)(grads, state, params)
            states[name] = updates, state
    assert_close(states["mixed"], states["alone"])


def test_matrices_of_one_shape_are_one_batch():
    def products(leaves):
        params = {str(i): jax.ShapeDtypeStruct((4, 8), jnp.float32) for i in range(leaves)}
        tx = compat.muon(0.1)
        program = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)
        return program.as_text().count("dot_general")

    assert products(12) == products(1)


@pytest.mark.parametrize("dims", [None, MIXED_DIMS], ids=["every_matrix", "tree"])
def test_the_state_maps_like_the_parameters(dims):
    tx = compat.muon(0.1, muon_weight_dimension_numbers=dims)
    state = tx.init(random_tree(MIXED, 0))
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    # All but the counts and the coefficients are moments.
    expected = jax.tree.map(lambda x: x if x.shape in ((), (3,)) else x + 1, state)
    chex.assert_trees_all_equal(doubled, expected)


def test_init_takes_shapes_alone():
    params = random_tree(MIXED, 0)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert_close(compat.muon(0.1).init(abstract), compat.muon(0.1).init(params))


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioning_brings_the_spectrum_under_one(name):
    x = jax.random.normal(jax.random.key(0), (3, 20, 30)) * 50.0
    scaled, gram = PRECONDITIONERS[name](x, 1e-8)
    top = np.linalg.norm(np.asarray(scaled, np.float64), 2, (-2, -1))
    assert np.all(top <= 1 + 1e-6)  # a bound of the theory, up to float32 rounding
    np.testing.assert_allclose(gram, scaled @ scaled.mT, atol=1e-6)  # 30 products of size < 1


# Optax's schatten takes X X^T for the Gram matrix, which is no scale of a complex X: real only.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.float32) for name in PRECONDITIONERS),
        *((name, jnp.complex64) for name in PRECONDITIONERS if name != "schatten"),
    ],
)
def test_converging_rows_reach_orthogonal_rows(name, dtype):
    x = jax.random.normal(jax.random.key(1), (2, 4, 9), dtype)
    y = newton_schulz(x, jnp.tile(jnp.array([2.0, -1.5, 0.5]), (12, 1)), PRECONDITIONERS[name])
    np.testing.assert_allclose(y @ y.mT.conj(), np.tile(np.eye(4), (2, 1, 1)), atol=1e-5)


def test_a_zero_gradient_moves_nothing():
    params = {"w": jnp.zeros((3, 4))}
    for name in PRECONDITIONERS:
        tx = compat.muon(0.1, preconditioning=name)
        updates, _ = tx.update(params, tx.init(params), params)
        np.testing.assert_array_equal(updates["w"], 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_coeffs": "muon"}, "ns_coeffs is 'muon'; the presets are"),
        ({"preconditioning": "cholesky"}, "preconditioning is 'cholesky'; it must be one of"),
        ({"ns_coeffs": ((1.0, 2.0, 3.0),) * 8}, "8 rows and ns_steps is 5"),
        ({"ns_coeffs": (1.0, 2.0)}, r"the shape \(2,\); it must be"),
        ({"ns_steps": 0}, "ns_steps is 0; it must be 1 or more"),
        ({"muon_weight_dimension_numbers": {"w": Dims(0, 2)}}, "axis 2"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=message):
        tx = compat.muon(0.1, **options)
        tx.update(params, tx.init(params), params)


MESHES = {
    "fsdp": ((8,), ("fsdp",), {"a": P("fsdp"), "b": P(None, "fsdp"), "c": P("fsdp"), "bias": P()}),
    "fsdp_tp": (
        (4, 2),
        ("fsdp", "tensor"),
        {"a": P("fsdp", "tensor"), "b": P("tensor"), "c": P("tensor", "fsdp"), "bias": P("fsdp")},
    ),
}


@pytest.mark.parametrize(("sizes", "names", "specs"), MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("options", [{}, {"preconditioning": "aol", "adaptive": True}])
def test_explicit_meshes_where_optax_does_not_trace_give_its_numbers(sizes, names, specs, options):
    params = random_tree({"a": (16, 32), "b": (16, 32), "c": (32, 8), "bias": (8,)}, 0)
    ours, theirs = compat.muon(0.1, **options), optax.contrib.muon(0.1, **options)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = jax.jit(theirs.update)(params, theirs.init(params), params)
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * len(names))
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(p, NamedSharding(mesh, specs[k])) for k, p in params.items()}
        state = jax.jit(ours.init)(placed)
        updates, after = jax.jit(ours.update)(placed, state, placed)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert_close(jax.device_get(updates), jax.device_get(expected))


def eager(init, params, _):
    return init(params)


def compiled(init, params, _):
    return jax.jit(init)(params)


def laid_out(init, params, shardings):
    return jax.jit(init, out_shardings=shardings)(params)


@pytest.mark.parametrize("begin", [eager, compiled, laid_out])
@pytest.mark.parametrize("ns_coeffs", ["standard", "dion"])
def test_on_an_explicit_mesh_the_update_is_compiled_once(begin, ns_coeffs):
    mesh = jax.make_mesh((8,), ("fsdp",))
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    tx = compat.muon(0.1, ns_coeffs)
    update = jax.jit(tx.update)
    with jax.set_mesh(mesh):
        params = jax.device_put(random_tree({"a": (16, 32), "b": (16, 32)}, 0), sharding)
        state = begin(tx.init, params, state_shardings(tx, params, sharding))
        first = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(3):
            _, state = update(params, state, params)
    assert jax.tree.map(lambda x: x.sharding, state) == first
    assert update._cache_size() == 1
