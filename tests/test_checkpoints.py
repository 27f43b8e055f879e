"""The checkpoints of a training run: which stay, what is read back, and what a kill leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_muon.models.stops import UsageError
from optax_muon.models.training.checkpoints import Checkpoints, Keep
from optax_muon.models.training.train import State


@jax.jit
def state_at(step):
    """A state that tells its step in every number."""
    params = {"dense": {"kernel": jnp.full((4, 8), step, jnp.float32)}}
    return State(params, {"mu": jnp.full((4, 8), 2 * step, jnp.float32)})


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (Keep(), [9, 10]),
        (Keep(last=3), [8, 9, 10]),
        (Keep(last=1, every=4), [4, 8, 10]),
        (Keep(last=2, every=1), list(range(1, 11))),
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
    with Checkpoints(tmp_path / "muon", Keep(every=2)) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, state_at(step))
        same(checkpoints.restore(state_at(0)), state_at(6))
        same(checkpoints.restore(state_at(0), 4), state_at(4))
        same(checkpoints.params(), state_at(6).params)
        same(checkpoints.params(2), state_at(2).params)


def test_a_saved_step_is_not_saved_again(tmp_path):
    with Checkpoints(tmp_path / "muon", Keep(last=5)) as checkpoints:
        for step in (3, 1, 3):
            checkpoints.save(step, state_at(step))
        checkpoints.save(1, state_at(7))
        assert checkpoints.steps == [1, 3]
        same(checkpoints.restore(state_at(0), 1), state_at(1))


@pytest.mark.parametrize("keep", [{"last": 0}, {"every": 0}])
def test_keeping_nothing_is_refused(keep):
    with pytest.raises(UsageError, match="is 0, it must be at least 1"):
        Keep(**keep)


def test_a_step_that_is_not_there_is_refused(tmp_path):
    with Checkpoints(tmp_path / "muon") as checkpoints:
        with pytest.raises(UsageError, match="muon has no checkpoint"):
            checkpoints.params()
        checkpoints.save(2, state_at(2))
        with pytest.raises(UsageError, match="no checkpoint of step 3; it has 2"):
            checkpoints.restore(state_at(0), 3)
