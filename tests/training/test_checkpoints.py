"""The checkpoints of a training run: which stay, what is read back, and what a kill leaves."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_muon.errors import UsageError
from optax_muon.training.checkpoints import Checkpoints, RetentionPolicy
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.state import State


@functools.partial(jax.jit, static_argnums=1)
def state_at(step, router=True):
    """A state that tells its step in every number."""
    params = {"dense": {"kernel": jnp.full((4, 8), step, jnp.float32)}}
    tx = optax.scale_by_adam()
    mu = jax.tree.map(lambda p: 2 * p, params)
    bias = jnp.full((2, 3), -step, jnp.float32) if router else None
    return State(params, tx.init(params)._replace(mu=mu), bias)


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (RetentionPolicy(), [9, 10]),
        (RetentionPolicy(last=3), [8, 9, 10]),
        (RetentionPolicy(last=1, every=4), [4, 8, 10]),
        (RetentionPolicy(last=2, every=1), list(range(1, 11))),
    ],
)
def test_the_last_ones_stay_and_every_nth(keep, steps, tmp_path):
    with Checkpoints(tmp_path / "muon", keep) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, state_at(step))
        assert checkpoints.steps == steps
        assert checkpoints.latest == 10
    with Checkpoints(tmp_path / "muon", keep) as checkpoints:
        assert checkpoints.steps == steps


def test_any_step_is_read_back_and_its_parameters_alone(tmp_path):
    with Checkpoints(tmp_path / "muon", RetentionPolicy(every=2)) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, state_at(step))
        chex.assert_trees_all_equal(checkpoints.restore(state_at(0)), state_at(6))
        chex.assert_trees_all_equal(checkpoints.restore(state_at(0), 4), state_at(4))
        chex.assert_trees_all_equal(checkpoints.params(), state_at(6).params)
        chex.assert_trees_all_equal(checkpoints.params(2), state_at(2).params)


def test_shapes_and_single_arrays_are_read_without_the_rest(tmp_path):
    with Checkpoints(tmp_path / "muon") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step))
        shapes = checkpoints.shapes()
        assert shapes["params"]["dense/kernel"] == jax.ShapeDtypeStruct((4, 8), np.float32)
        assert sorted(shapes["opt_state"]) == ["count", "mu/dense/kernel", "nu/dense/kernel"]
        chex.assert_trees_all_equal(
            checkpoints.array("params", "dense/kernel", 1), state_at(1).params["dense"]["kernel"]
        )
        chex.assert_trees_all_equal(checkpoints.array("bias", ""), state_at(2).bias)
        chex.assert_trees_all_equal(
            checkpoints.restore_items({"bias": state_at(0).bias}), {"bias": state_at(2).bias}
        )


def test_a_saved_step_is_not_saved_again(tmp_path):
    with Checkpoints(tmp_path / "muon", RetentionPolicy(last=5)) as checkpoints:
        for step in (3, 1, 3):
            checkpoints.save(step, state_at(step))
        checkpoints.save(1, state_at(7))
        assert checkpoints.steps == [1, 3]
        chex.assert_trees_all_equal(checkpoints.restore(state_at(0), 1), state_at(1))


@pytest.mark.parametrize("keep", [{"last": 0}, {"every": 0}])
def test_keeping_nothing_is_refused(keep):
    with pytest.raises(UsageError, match="is 0; it must be at least 1"):
        RetentionPolicy(**keep)


def test_a_step_that_is_not_there_is_refused(tmp_path):
    with Checkpoints(tmp_path / "muon") as checkpoints:
        with pytest.raises(UsageError, match="muon has no checkpoint"):
            checkpoints.params()
        checkpoints.save(2, state_at(2))
        with pytest.raises(UsageError, match="no checkpoint of step 3; it has 2"):
            checkpoints.restore(state_at(0), 3)


def test_a_state_without_a_router_is_saved_all_the_same(tmp_path):
    with Checkpoints(tmp_path / "muon") as checkpoints:
        checkpoints.save(2, state_at(2, router=False))
        found = checkpoints.restore(state_at(0, router=False))
    assert found.bias is None
    chex.assert_trees_all_equal(found, state_at(2, router=False))


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    def advanced(state):
        return jax.tree.map(lambda x: x + 1, state)

    step = jax.jit(advanced, donate_argnums=0)
    large = {"kernel": jnp.zeros((1000, 1000)), "small": jnp.zeros(3)}
    state = State(large, {}, None)
    with Checkpoints(tmp_path / "muon", RetentionPolicy(last=4)) as checkpoints:
        for count in range(1, 5):
            state = step(state)
            checkpoints.save(count, state)
            for _ in range(4):  # whatever is still to be written is written over
                state = step(state)
        for count in range(1, 5):
            for leaf in jax.tree.leaves(checkpoints.params(count)):
                np.testing.assert_array_equal(leaf, 5 * count - 4)


def test_the_position_is_kept_beside_the_arrays(tmp_path):
    with Checkpoints(tmp_path / "muon") as checkpoints:
        key = jax.random.key_data(jax.random.key(5))
        checkpoints.save(1, state_at(1), {"seed": 5, "tokens": 2**40, "key": key})
        checkpoints.save(2, state_at(2))
        assert checkpoints.position(1) == {"step": 1, "seed": 5, "tokens": 2**40, "key": [0, 5]}
        assert checkpoints.position() == {"step": 2}


def test_another_optimizer_or_other_settings_are_refused(tmp_path):
    settings = {"beta": 0.95, "model": {"width": 8}}
    with Checkpoints(tmp_path / "muon", settings=settings) as checkpoints:
        checkpoints.save(1, state_at(1))
        other = state_at(1)._replace(opt_state=optax.trace(0.9).init(state_at(1).params))
        with pytest.raises(
            UsageError, match="kernel was trained by AdamW and is now trained by Trace"
        ):
            checkpoints.restore(other)
        larger = {"dense": {"kernel": jnp.zeros((5, 8))}}
        with pytest.raises(
            UsageError, match=r"params/dense/kernel is float32 \[4, 8\] in the checkpoint and"
        ):
            checkpoints.params(like=larger)
    changed = Checkpoints(tmp_path / "muon", settings=settings | {"beta": 0.9})
    with changed, pytest.raises(UsageError, match=r"beta is 0\.95 in the checkpoint and 0\.9 now"):
        changed.restore(state_at(0))
    with Checkpoints(tmp_path / "muon") as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(state_at(0)), state_at(1))


def test_a_damaged_step_is_refused_and_the_others_named(tmp_path):
    with Checkpoints(tmp_path / "muon", RetentionPolicy(last=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_at(step))
    (tmp_path / "muon/3/params/manifest.ocdbt").unlink()
    (tmp_path / "muon/2/description/metadata").unlink()
    with Checkpoints(tmp_path / "muon", RetentionPolicy(last=3)) as checkpoints:
        for step in (3, 2):
            with pytest.raises(UsageError, match=f"muon/{step} cannot be read") as error:
                checkpoints.restore(state_at(0), step)
            others = ", ".join(str(other) for other in (1, 2, 3) if other != step)
            assert str(error.value).endswith(f"delete that folder to resume from one of {others}")
            assert len(str(error.value).splitlines()) == 1
        chex.assert_trees_all_equal(checkpoints.restore(state_at(0), 1), state_at(1))


# The folder around them


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cannot_be_claimed_whole_is_not_claimed(overwrite, tmp_path, monkeypatch):
    """A process that dies between making the folder and its config leaves no folder in the way."""
    folder = RunFolder(tmp_path / "run")
    old, new = ({"trials": [], "training": {"seed": seed}} for seed in (1, 2))
    if overwrite:
        folder.create_or_resume(old, resume=False, overwrite=False)

    def die(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", die)
    with pytest.raises(KeyboardInterrupt):
        folder.create_or_resume(new, resume=False, overwrite=overwrite)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    folder.create_or_resume(new, resume=False, overwrite=False)
    assert folder.read_config() == new
    assert list(tmp_path.iterdir()) == [folder.path]


def test_the_last_contestant_with_checkpoints_is_found(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(UsageError, match="has no checkpoint of adamw or muon"):
        folder.trained(["adamw", "muon"])
    for name, step in [("adamw", 3), ("muon", 2)]:
        with Checkpoints(folder.checkpoints(name)) as checkpoints:
            checkpoints.save(step, state_at(step))
        assert folder.trained(["adamw", "muon"]) == folder.checkpoints(name)
    with Checkpoints(folder.trained(["muon", "adamw"])) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.params(), state_at(3).params)
