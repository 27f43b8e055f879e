"""The whole of `muon` on a mesh trains as it does on one device, however it is called."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import Split, View, muon, plan, state_shardings
from optax_muon.hlo import collective_counts

MODEL = {
    "embed/embedding": ((32, 16), P("fsdp", "tensor"), None),
    "layers/down/kernel": ((5, 32, 16), P(None, "tensor", "fsdp"), View(1, 2)),
    "layers/norm/scale": ((5, 16), P(), None),
    "layers/qkv/kernel": (
        (5, 16, 32),
        P(None, "fsdp", "tensor"),
        View(1, 2, Split(2, (16, 8, 8))),
    ),
    "layers/up/kernel": ((5, 16, 32), P(None, "fsdp", "tensor"), View(1, 2)),
    "norm/scale": ((16,), P("fsdp"), None),
}
VIEWS = {path: view for path, (_, _, view) in MODEL.items()}
STEPS = 5
KINDS = ("explicit", "auto", "mixed")


def mesh(kind):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=meshes.AXES[kind][:2])


def shardings(kind):
    there = mesh(kind)
    return {path: NamedSharding(there, spec) for path, (_, spec, _) in MODEL.items()}


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {p: rng.standard_normal(s, np.float32).astype(dtype) for p, (s, _, _) in MODEL.items()}


def optimizer(kind=None, wrap=lambda tx: tx, **options):
    given = shardings(kind) if kind in ("auto", "mixed") else None
    return wrap(muon(1e-2, views=VIEWS, shardings=given, **options))


def update(tx):
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def begin(tx, params):
    """The state, laid out as the parameters are."""
    sharding = next(iter(params.values())).sharding
    if not isinstance(sharding, NamedSharding):
        return jax.jit(tx.init)(params)
    there = {path: x.sharding for path, x in params.items()}
    return jax.jit(tx.init, out_shardings=state_shardings(tx, params, there))(params)


def one_by_one(tx, params, gradients):
    step = jax.jit(update(tx), donate_argnums=(0, 1))
    state = begin(tx, jax.tree.map(jnp.asarray, params))
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def scanned(tx, params, gradients):
    stacked = jax.jit(lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))(*gradients)

    @jax.jit
    def train(params, stacked):
        def body(carry, gradient):
            return update(tx)(*carry, gradient), None

        return jax.lax.scan(body, (params, tx.init(params)), stacked)[0][0]

    return train(params, stacked)


WRAPPERS = {
    "plain": lambda tx: tx,
    "accumulating": lambda tx: optax.MultiSteps(tx, 2),
    "guarded and clipped": lambda tx: optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), tx), 3
    ),
}


@functools.cache
def alone(wrapper="plain", steps=STEPS, dtype=np.float32):
    gradients = [tree(seed + 1, dtype) for seed in range(steps)]
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by an integer
        params = one_by_one(optimizer(wrap=WRAPPERS[wrapper]), tree(0, dtype), gradients)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def placed(kind, seed, dtype=np.float32):
    return jax.device_put(tree(seed, dtype), shardings(kind))


def gradients(kind, steps=STEPS, dtype=np.float32):
    return [placed(kind, seed + 1, dtype) for seed in range(steps)]


def check(params, kind, truth, tolerance=1e-5):
    """Equal to one device's, as sharded and in the dtype that they had."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    assert meshes.error(wide, truth) <= tolerance
    for path, sharding in shardings(kind).items():
        assert params[path].sharding.is_equivalent_to(sharding, params[path].ndim), path


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_what_one_device_gives(kind):
    check(one_by_one(optimizer(kind), placed(kind, 0), gradients(kind)), kind, alone())


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_training_in_a_scan_gives_what_one_device_gives(kind):
    with jax.set_mesh(mesh(kind)):  # from jax 0.12 on, zeros have no sharding without it
        params = scanned(optimizer(kind), placed(kind, 0), gradients(kind))
    check(params, kind, alone())


def test_a_state_made_inside_the_program_needs_no_ambient_mesh():
    tx = optimizer("explicit")
    begun = jax.jit(lambda params, gradient: update(tx)(params, tx.init(params), gradient)[0])
    check(begun(placed("explicit", 0), placed("explicit", 1)), "explicit", alone(steps=1))


@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.parametrize("wrapper", ["accumulating", "guarded and clipped"])
def test_wrapped_by_optax_it_gives_what_one_device_gives(wrapper, kind):
    tx = optimizer(kind, WRAPPERS[wrapper])
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by an integer
        params = one_by_one(tx, placed(kind, 0), gradients(kind))
    check(params, kind, alone(wrapper))


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_the_mesh_may_be_ambient(kind):
    with jax.set_mesh(mesh(kind)):
        specs = {path: spec for path, (_, spec, _) in MODEL.items()}
        tx = muon(1e-2, views=VIEWS, shardings=None if kind == "explicit" else specs)
        params = one_by_one(tx, placed(kind, 0), gradients(kind))
    check(params, kind, alone())


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_it_works_without_jit(kind):
    few = ("layers/up/kernel", "norm/scale")
    given = {path: shardings(kind)[path] for path in few}
    params, gradient = ({p: placed(kind, seed)[p] for p in few} for seed in (0, 1))
    tx = muon(1e-2, views={p: VIEWS[p] for p in few}, shardings=given if kind == "auto" else None)
    found = jax.block_until_ready(update(tx)(params, tx.init(params), gradient)[0])
    for path in few:
        assert meshes.error({path: found[path]}, {path: alone(steps=1)[path]}) <= 1e-5
        assert found[path].sharding.is_equivalent_to(given[path], found[path].ndim)


def test_parameters_in_bfloat16_stay_so():
    given = gradients("explicit", dtype=jnp.bfloat16)
    params = one_by_one(optimizer("explicit"), placed("explicit", 0, jnp.bfloat16), given)
    assert {x.dtype for x in params.values()} == {jnp.dtype(jnp.bfloat16)}
    # Each of five steps may round a parameter to the other neighbour.
    check(params, "explicit", alone(dtype=jnp.bfloat16), tolerance=STEPS * 2**-8)


def test_a_step_is_traced_once_and_keeps_the_state_as_it_was():
    tx, params, traces = optimizer("explicit"), placed("explicit", 0), []

    @jax.jit
    def step(params, state, gradient):
        traces.append(1)
        return update(tx)(params, state, gradient)

    state = begin(tx, params)
    for gradient in gradients("explicit", 3):
        params, after = step(params, state, gradient)
        for x, y in zip(*map(jax.tree.leaves, (state, after)), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        state = after
    assert len(traces) == 1


@pytest.mark.parametrize("layout", ["home", "gather"])
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_a_plan_may_be_given(layout, kind):
    made = plan(tree(0), views=VIEWS, shardings=shardings(kind), layout=layout)
    tx = optimizer(kind, plan=made)
    step = jax.jit(
        update(tx), out_shardings=None if kind == "explicit" else (shardings(kind), None)
    )
    params, gradient = placed(kind, 0), placed(kind, 1)
    state = begin(tx, params)
    check(step(params, state, gradient)[0], kind, alone(steps=1))
    found = collective_counts(step.lower(params, state, gradient).compile().as_text())
    # Beside the plan's own: one pair of all-to-alls makes the fused axis whole and cuts it again.
    pairs = 2 * sum(
        bool(assignment.roles)
        for bucket_plan in made.buckets
        for assignment in bucket_plan.assignments
    )
    expected = {
        "home": {"all-to-all": pairs + 2},
        "gather": {"all-to-all": 2, "all-gather": pairs // 2},
    }
    assert found == expected[layout]


# Without a word about shardings on Auto axes


@pytest.mark.parametrize("ambient", [False, True])
def test_auto_axes_without_shardings_are_correct_and_warn_once_of_the_argument(ambient):
    tx = muon(1e-2, views=VIEWS)
    there = shardings("auto")
    with contextlib.ExitStack() as stack:
        if ambient:
            stack.enter_context(jax.set_mesh(mesh("auto")))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        step = jax.jit(update(tx), out_shardings=(there, None))
        params = placed("auto", 0)
        found, _ = step(params, tx.init(params), placed("auto", 1))
    assert [("shardings=" in str(w.message), w.category) for w in caught] == [(True, UserWarning)]
    check(found, "auto", alone(steps=1))


def test_explicit_axes_and_one_device_need_no_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_by_one(muon(1e-2, views=VIEWS), placed("explicit", 0), gradients("explicit", 1))
        one_by_one(muon(1e-2, views=VIEWS), tree(0), [tree(1)])
