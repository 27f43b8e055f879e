"""The paper's schedule: its numbers at its corners, and in between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_muon
from optax_muon.training.config import COSINE, LINEAR, MIN_STEPS, THREE_STAGE, TrainConfig
from optax_muon.training.presets import PRESETS
from optax_muon.training.schedules import MOONLIGHT, three_stage_schedule

SMALL = {
    "warmup": 10,
    "decay_end": 110,
    "floor": 0.1,
    "rewarm": 5,
    "rewarm_peak": 0.25,
    "cooldown": 40,
}


def naive(step):
    """The rate as one would say it."""
    if step < 10:
        return step / 10
    if step < 110:
        return 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (step - 10) / 100))
    if step < 115:
        return 0.1 + (step - 110) / 5 * 0.15
    return max(0.0, 0.25 * (1 - (step - 115) / 40))


def test_every_step_is_as_one_would_say_it():
    schedule = jax.jit(three_stage_schedule(1.0, **SMALL))
    found = [float(schedule(step)) for step in range(170)]
    # float32: a cosine and a few products.
    np.testing.assert_allclose(found, [naive(step) for step in range(170)], atol=1e-6)


def paper_config():
    """The published run, of the published model."""
    row = PRESETS["moonlight-16b-a3b"]
    return TrainConfig(
        row.model, row.batch, row.steps, 0, 100, 128, row.schedule, row.bias_update_speed
    )


def test_moonlights_corners_are_the_papers():
    config = paper_config()
    schedule = config.learning_rate(4.2e-4)
    # 200e9 / (2048 x 8192), and from there on 4096 x 8192 tokens a step; steps count from 1 here.
    assert config.batch_at(11_921) == 2048
    assert config.batch_at(11_922) == 4096
    decayed = 11_921 + round((5.2e12 - 11_921 * 2048 * 8192) / (4096 * 8192))
    rates = {0: 0, 2000: 4.2e-4, decayed: 4.2e-5, decayed + 100: 1e-4, MOONLIGHT.steps: 0}
    for step, rate in rates.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, atol=1e-12)
    assert config.bias_update_speed_schedule(decayed - 1) == pytest.approx(1e-3)
    assert config.bias_update_speed_schedule(decayed) == 0
    tokens = 8192 * (2048 * 11_921 + 4096 * (MOONLIGHT.steps - 11_921))
    assert tokens == pytest.approx(5.7e12, rel=1e-5)


def test_it_drives_the_optimizer():
    tx = optax_muon.muon(paper_config().learning_rate(4.2e-4))
    params = {"dense": {"kernel": jnp.ones((4, 8))}}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert not np.asarray(updates["dense"]["kernel"]).any()  # the first step has rate 0
    assert optax.tree.norm(updates) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay_end": 10}, "decay_end is 10; it must be more than warmup=10"),
        ({"cooldown": 0}, "cooldown is 0; it must be at least 1"),
        ({"warmup": 0}, "warmup is 0; it must be at least 1"),
    ],
)
def test_stages_without_steps_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        three_stage_schedule(1.0, **{**SMALL, **wrong})


@pytest.mark.usefixtures("standard_promotion")  # optax's cosine needs it
@pytest.mark.parametrize(
    ("schedule", "fewest"), [(COSINE, 1), (LINEAR, 1), (THREE_STAGE, MIN_STEPS)]
)
def test_the_shortest_runs_learn_something(schedule, fewest):
    """As `--steps 1` does: the peak is in the run, whatever is left of the stages."""
    for steps in range(fewest, fewest + 3):
        config = TrainConfig(PRESETS["tiny"].model, 8, steps, 0, 20, 1, schedule)
        assert config.learning_rates(3.0).max() == pytest.approx(3.0)
