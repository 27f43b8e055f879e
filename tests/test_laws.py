"""The laws of an optax transformation, and the houses that drive one: flax, equinox, optax."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.training.train_state import TrainState
from optax import contrib

from optax_muon.matrices.views import View
from optax_muon.muon import MUON, muon, scale_by_muon
from optax_muon.polar import polar_svd
from optax_muon.transforms.decay import cautious_decay, decoupled_decay
from optax_muon.transforms.momentum import scale_by_momentum
from optax_muon.transforms.normuon import normuon
from optax_muon.transforms.orthogonalize import orthogonalize
from optax_muon.transforms.scale import scale_by_shape, scale_by_update_norm
from optax_muon.transforms.wrappers import in_float32

SHAPES = {"norm": {"scale": (6,)}, "tall": {"kernel": (6, 4)}, "wide": {"kernel": (4, 6)}}
NORMUON = optax.chain(scale_by_momentum(), orthogonalize(), normuon(), scale_by_shape())
LINKS = {
    "muon": muon(0.1),
    "muon with schedules": muon(
        optax.linear_schedule(0.1, 0.0, 9),
        beta=optax.linear_schedule(0.8, 0.95, 9),
        weight_decay=optax.linear_schedule(0.1, 0.0, 9),
    ),
    "muon with bfloat16 momenta": muon(0.1, mu_dtype=jnp.bfloat16),
    "muon with links": muon(0.1, scale=scale_by_update_norm(), weight_decay=cautious_decay()),
    "muon with normuon": muon(0.1, post=normuon(), scale=scale_by_update_norm()),
    "normuon": optax.chain(in_float32(NORMUON), optax.scale_by_learning_rate(0.1)),
    "scale_by_muon": scale_by_muon(),
    "orthogonalize": orthogonalize(),
    "scale_by_shape": scale_by_shape(),
    "scale_by_update_norm": scale_by_update_norm(),
    "decoupled_decay": decoupled_decay(),
    "cautious_decay": cautious_decay(),
}
every_link = pytest.mark.parametrize("tx", LINKS.values(), ids=LINKS.keys())
every_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])


def tree(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def steps(count, dtype="float32"):
    return [tree(seed, dtype) for seed in range(1, count + 1)]


@functools.cache
def compiled(tx):
    return jax.jit(tx.update)


def trained(tx, params, gradients):
    """The parameters after the last step."""
    state = tx.init(params)
    for gradient in gradients:
        updates, state = compiled(tx)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def signature(tree):
    """Structure and types: what decides whether a compiled program is used again."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


assert_trees_close = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-7)


# The laws of every link


@every_link
def test_extra_arguments_are_accepted_known_or_not(tx):
    tx, params = optax.with_extra_args_support(tx), tree()
    state, extra = tx.init(params), {"value": jnp.ones(()), "unknown": params}
    plain = jax.eval_shape(tx.update, params, state, params)
    assert signature(jax.eval_shape(tx.update, params, state, params, **extra)) == signature(plain)


@pytest.mark.parametrize("tx", [LINKS["muon with schedules"], LINKS["muon with normuon"]])
def test_updates_are_compiled_once(tx):
    chex.clear_trace_counter()  # it counts by the name of the function, which all links share
    update, params = jax.jit(chex.assert_max_traces(tx.update, n=1)), tree()
    state = tx.init(params)
    for gradient in steps(3):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)


@every_link
@every_dtype
def test_updates_have_the_gradients_dtype_and_states_keep_theirs(tx, dtype):
    params = tree(0, dtype)
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, tree(1, dtype), state, params)
    assert signature(updates) == signature(params)
    assert signature(after) == signature(state)


@every_link
def test_init_needs_shapes_only(tx):
    params = tree()
    shapes = jax.eval_shape(lambda: params)
    assert signature(tx.init(shapes)) == signature(tx.init(params))
    assert signature(jax.eval_shape(tx.init, params)) == signature(tx.init(params))


@every_link
def test_states_are_maps_over_parameters(tx):
    state = tx.init(tree())
    same = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert_trees_close(same, state, rtol=0, atol=0)
    assert signature(same) == signature(state)


# Where it runs


@every_dtype
def test_muon_runs_under_scan_and_cond(dtype):
    tx, params, gradients = muon(0.1), tree(0, dtype), steps(4, dtype)

    def step(carry, gradient):
        params, state = carry

        def update():
            return tx.update(gradient, state, params)

        def skip():
            return jax.tree.map(jnp.zeros_like, params), state

        even = state.inner_states[MUON].inner_state[0][0].count % 2 == 0
        updates, state = jax.lax.cond(even, update, skip)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    (found, _), _ = jax.lax.scan(step, (params, tx.init(params)), stacked)
    expected = trained(tx, params, gradients[:1])
    assert_trees_close(
        jax.tree.map(lambda p: p.astype("float32"), found),
        jax.tree.map(lambda p: p.astype("float32"), expected),
        rtol=2 * float(jnp.finfo(dtype).eps),
        atol=float(jnp.finfo(dtype).eps),
    )


@every_dtype
def test_all_moments_are_float32_unless_mu_dtype_says_otherwise(dtype):
    params = tree(0, dtype)
    state = muon(0.1).init(params)
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert floats == [jnp.float32] * 4  # two momenta of matrices, two moments of the norm
    state = muon(0.1, mu_dtype=jnp.bfloat16).init(params)
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(map(str, floats)) == ["bfloat16"] * 3 + ["float32"]  # nu stays


def test_a_mixed_tree_keeps_every_leafs_dtype():
    params = tree() | {"wide": tree(0, "bfloat16")["wide"]}
    for tx in (muon(0.1), optax.inject_hyperparams(muon)(0.1)):
        with jax.numpy_dtype_promotion("standard"):  # which optax needs to inject
            updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
        assert signature(updates) == signature(params)


def test_complex_parameters_take_the_fallback():
    params = {"kernel": jnp.ones((4, 6)), "phase": {"bias": jnp.ones(3, jnp.complex64)}}
    gradient = {"kernel": jnp.ones((4, 6)), "phase": {"bias": jnp.full(3, 3 + 4j, jnp.complex64)}}
    tx = muon(0.5, weight_decay=0.0)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    # Adam's first step: the gradient over its modulus.
    np.testing.assert_allclose(updates["phase"]["bias"], -0.5 * (0.6 + 0.8j), rtol=1e-5)


# What drives it


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.1, "beta": 0.9, "weight_decay": 0.3},
        {
            "learning_rate": optax.linear_schedule(0.1, 0.0, 5),
            "beta": optax.linear_schedule(0.5, 0.9, 5),
            "weight_decay": optax.linear_schedule(0.3, 0.0, 5),
        },
    ],
    ids=["numbers", "schedules"],
)
def test_injected_hyperparameters_change_nothing_until_set(options):
    tx = optax.inject_hyperparams(muon)(**options)
    assert_trees_close(trained(tx, tree(), steps(3)), trained(muon(**options), tree(), steps(3)))


def test_injected_hyperparameters_can_be_set():
    tx = optax.inject_hyperparams(muon)(learning_rate=0.1)
    state = tx.init(tree())
    assert set(state.hyperparams) == {"learning_rate", "beta", "weight_decay"}
    state.hyperparams["learning_rate"] = jnp.asarray(0.0, jnp.float32)
    updates, _ = compiled(tx)(tree(1), state, tree())
    assert_trees_close(updates, jax.tree.map(jnp.zeros_like, updates))


def test_accumulating_micro_batches_is_one_big_batch():
    gradients = steps(2)
    micro = [
        jax.tree.map(lambda g, n, s=sign: g + s * n, gradient, tree(50 + i))
        for i, gradient in enumerate(gradients)
        for sign in (1.0, -1.0)
    ]
    accumulated = optax.MultiSteps(muon(0.1), 2).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides a float by its count
        found = trained(accumulated, tree(), micro)
    assert_trees_close(found, trained(muon(0.1), tree(), gradients), rtol=1e-4, atol=1e-5)


CHAINS = {
    "plain": {},
    "normuon": {"post": normuon()},
    "update norm": {"scale": scale_by_update_norm()},
    "exact": {"orthogonalizer": polar_svd},
}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("options", CHAINS.values(), ids=CHAINS)
def test_a_gradient_that_is_not_finite_can_be_skipped(options, bad):
    tx, good = muon(0.1, **options), steps(2)
    expected = trained(tx, tree(), good)
    struck = [jax.tree.map(lambda g: g.at[0].set(bad), good[0])]
    # One entry of one matrix is enough.
    leaves, structure = jax.tree.flatten(good[0])
    for i, leaf in enumerate(leaves):
        one = leaf.at[(0,) * leaf.ndim].set(bad)
        struck.append(jax.tree.unflatten(structure, [*leaves[:i], one, *leaves[i + 1 :]]))
    for gradient in struck:
        found = trained(optax.apply_if_finite(tx, 3), tree(), [good[0], gradient, good[1]])
        assert_trees_close(found, expected)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("options", CHAINS.values(), ids=CHAINS)
def test_a_gradient_that_is_not_finite_is_seen_in_the_parameters(options, bad):
    gradient = tree(1)
    gradient["tall"]["kernel"] = gradient["tall"]["kernel"].at[0, 0].set(bad)
    found = trained(muon(0.1, **options), tree(), [gradient, tree(2)])
    assert not jnp.isfinite(found.pop("tall")["kernel"]).all()
    chex.assert_tree_all_finite(found)


def test_schedule_free_averages_the_iterates():
    """`x` is the mean of the `z` that muon moves: arXiv 2405.15682, section 2, `b1 = 1`."""
    lr, gradients = 0.1, steps(3)
    tx = contrib.schedule_free(muon(lr, weight_decay=0.0), lr, b1=0.9, weight_lr_power=0.0)
    params = tree()
    state = tx.init(params)
    moved, path = params, []
    inner = muon(lr, weight_decay=0.0)
    inner_state = inner.init(params)
    for gradient in gradients:
        updates, state = compiled(tx)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        updates, inner_state = compiled(inner)(gradient, inner_state, moved)
        moved = optax.apply_updates(moved, updates)
        path.append(moved)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *path)
    found = contrib.schedule_free_eval_params(state, params)
    assert_trees_close(found, mean, rtol=1e-4, atol=1e-5)


# Models: each learns the same linear map, and its matrices move as the bare arrays would.

INPUTS = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
TARGETS = INPUTS @ np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)


def mse(outputs):
    return jnp.mean(jnp.square(outputs - TARGETS))


def assert_learns(losses):
    assert losses[-1] < 0.01 * losses[0]


def first_step(kernel, bias):
    """The kernel after the paper's first step towards `TARGETS = INPUTS kernel + bias`."""
    kernel, bias = (np.asarray(leaf, np.float64) for leaf in (kernel, bias))
    gradient = 2 / TARGETS.size * INPUTS.T @ (INPUTS @ kernel + bias - TARGETS)
    matrices = {"kernel": ((0,), (1,))}
    [after] = reference.train({"kernel": kernel}, [{"kernel": gradient}], matrices, lr=0.5)
    return after["kernel"]


RATE = optax.linear_schedule(0.5, 0.0, 100)


def test_an_nnx_model_trains():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, muon(RATE), wrt=nnx.Param)
    expected = first_step(model.kernel[...], model.bias[...])

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: mse(model(INPUTS)))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [step(model, optimizer)]
    np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-5, atol=1e-5)
    assert_learns(losses + [step(model, optimizer) for _ in range(99)])


def test_a_linen_model_trains():
    model = nn.Dense(4)
    params = model.init(jax.random.key(0), INPUTS)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=muon(RATE))
    expected = first_step(**params["params"])

    @jax.jit
    def step(state):
        loss, gradient = jax.value_and_grad(lambda p: mse(state.apply_fn(p, INPUTS)))(state.params)
        return state.apply_gradients(grads=gradient), loss

    state, loss = step(state)
    losses = [loss]
    np.testing.assert_allclose(state.params["params"]["kernel"], expected, rtol=1e-5, atol=1e-5)
    for _ in range(99):
        state, loss = step(state)
        losses.append(loss)
    assert_learns(losses)


def test_an_equinox_model_trains():
    model = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    tx = muon(RATE)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    expected = first_step(model.weight.T, model.bias)

    @eqx.filter_jit
    def step(model, state):
        loss, gradient = eqx.filter_value_and_grad(lambda m: mse(jax.vmap(m)(INPUTS)))(model)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    model, state, loss = step(model, state)
    losses = [loss]
    np.testing.assert_allclose(model.weight.T, expected, rtol=1e-5, atol=1e-5)
    for _ in range(99):
        model, state, loss = step(model, state)
        losses.append(loss)
    assert_learns(losses)


def test_a_mask_may_be_an_equinox_module_that_can_be_called():
    model = eqx.filter(eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, model)
    tx = muon(0.1, weight_decay=0.5, weight_decay_mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = compiled(tx)(zeros, tx.init(model), model)
    np.testing.assert_array_equal(updates.layers[0].bias, 0.0)
    np.testing.assert_allclose(updates.layers[0].weight, -0.05 * model.layers[0].weight, rtol=1e-6)


def test_views_may_be_an_equinox_module_that_can_be_called():
    model = eqx.filter(eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    views = jax.tree.map(lambda leaf: View(1, 0) if leaf.ndim > 1 else None, model)
    by_hand, by_role = (
        compiled(tx)(model, tx.init(model), model)[0]
        for tx in (muon(0.1, orthogonalizer=jnp.sign, views=v) for v in (views, None))
    )
    assert_trees_close(by_hand, by_role, rtol=0, atol=0)


def test_views_follow_the_parameters_into_every_link():
    params = {"a": jnp.ones((3, 4, 6)), "b": jnp.ones((4, 6))}
    tx = muon(0.1, views={"a": View(1, 2), "b": None})
    state = tx.init(params)
    assert state.inner_states[MUON].inner_state[0][0].mu["a"].shape == (3, 4, 6)
    assert isinstance(state.inner_states[MUON].inner_state[0][0].mu["b"], optax.MaskedNode)
