"""A run of `optax.contrib.muon` goes on as one of `optax_muon.muon`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_trees_close_to_largest

from optax_muon import compat
from optax_muon.matrices.views import View
from optax_muon.muon import muon

SHAPES = {"bias": (6,), "down": (6, 4), "up": (4, 6)}
VIEWS = {"bias": None, "down": View(0, 1), "up": View(0, 1)}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


def run(tx, state, params, seeds):
    step = jax.jit(tx.update)
    for seed in seeds:
        updates, state = step(gradients(seed), state, params)
    return updates, state


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.1, 0.01, 50)])
def test_the_run_goes_on_with_the_same_updates(nesterov, rate):
    # After 20 steps 0.5^20 = 1e-6 of the bias correction is left, less than float32's other errors.
    params, same = gradients(100), {"beta": 0.5, "nesterov": nesterov}
    theirs = compat.muon(
        rate, weight_decay=0.1, adam_weight_decay=0.1, adam_b2=0.95, consistent_rms=0.2, **same
    )
    ours = muon(rate, views=VIEWS, **same)
    _, state = run(theirs, theirs.init(params), params, range(20))
    loaded = compat.from_optax(state, ours, params, beta=0.5)
    expected, _ = run(theirs, state, params, range(20, 23))
    found, _ = run(ours, loaded, params, range(20, 23))
    if nesterov:  # optax's nesterov makes NAdam of Adam as well
        del expected["bias"], found["bias"]
    # 3e-5: float32 eps times the slope 485 of five steps, as in test_compat.py.
    assert_trees_close_to_largest(found, expected, 3e-5)


WRAPPERS = {
    "alone": lambda make: make,
    "a chain": lambda make: lambda *args, **kw: optax.chain(optax.clip(9.0), make(*args, **kw)),
    "inject_hyperparams": optax.inject_hyperparams,
    "MultiSteps": lambda make: (
        lambda *args, **kw: optax.MultiSteps(make(*args, **kw), 1).gradient_transformation()
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_every_count_goes_on_and_the_state_can_be_donated(wrap):
    rate, params = optax.linear_schedule(0.1, 0.0, 40), gradients(100)
    theirs = wrap(compat.muon)(rate, beta=0.5, adam_b2=0.95, consistent_rms=0.2, nesterov=False)
    ours = wrap(muon)(rate, beta=0.5, weight_decay=0.0, views=VIEWS, nesterov=False)
    with jax.numpy_dtype_promotion("standard"):  # which optax's wrappers need
        _, state = run(theirs, theirs.init(params), params, range(20))
        loaded = compat.from_optax(state, ours, params, beta=0.5)
        expected, _ = run(theirs, state, params, [20])
        found, after = jax.jit(ours.update, donate_argnums=1)(gradients(20), loaded, params)
    # As above; with the schedule at its start the updates would be twice as large.
    assert_trees_close_to_largest(found, expected, 3e-5)
    counts = {
        int(leaf)
        for path, leaf in jax.tree.leaves_with_path(after)
        if getattr(path[-1], "name", None) in ("count", "gradient_step")
    }
    assert counts == {21}


def test_the_loaded_state_is_one_of_the_new_optimizer():
    params = gradients(0)
    theirs, ours = optax.contrib.muon(0.1, mu_dtype=jnp.bfloat16), muon(0.1, views=VIEWS)
    with jax.numpy_dtype_promotion("standard"):
        _, state = theirs.update(params, theirs.init(params), params)
    loaded, fresh = compat.from_optax(state, ours, params), ours.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, fresh)
    counts = [count for _, count in optax.tree.get_all_with_path(loaded, "count")]
    assert counts
    assert set(map(int, counts)) == {1}


def test_a_leaf_that_changes_groups_is_refused():
    params = gradients(0)
    state = compat.muon(0.1).init(params)
    for views, message in [
        ({**VIEWS, "up": None}, "up is in the Adam group and was not in optax's"),
        ({**VIEWS, "bias": View(0, 0)}, "bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            compat.from_optax(state, muon(0.1, views=views), params)


def test_a_state_of_another_optimizer_is_refused():
    params = gradients(0)
    with pytest.raises(ValueError, match="The state has 0 MuonState"):
        compat.from_optax(optax.adamw(0.1).init(params), muon(0.1, views=VIEWS), params)
