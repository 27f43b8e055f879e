"""The paper's schedule of learning rate, batch and router bias (arXiv 2502.16982, section 3.3).

Three stages: warm up and decay along a cosine; then, on better data, warm up again to a lower peak;
then cool down along a line to zero. The batch is doubled early on. The paper gives lengths in
tokens; a schedule is a function of optimizer steps, so lengths here are in steps.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax


def three_stage_schedule(
    peak: float,
    *,
    warmup: int,
    decay_end: int,
    floor: float,
    rewarm: int,
    rewarm_peak: float,
    cooldown: int,
) -> optax.Schedule:
    """Warm up, cosine, warm up again, and a line to zero.

    >>> schedule = three_stage_schedule(
    ...     4.2e-4, warmup=10, decay_end=100, floor=4.2e-5, rewarm=5, rewarm_peak=1e-4, cooldown=40
    ... )
    >>> [f"{float(schedule(step)):.2g}" for step in (0, 10, 100, 105, 125, 145)]
    ['0', '0.00042', '4.2e-05', '0.0001', '5e-05', '0']

    Args:
        peak: Learning rate at the end of the first warm-up, which starts at 0.
        warmup: Steps of the first warm-up.
        decay_end: Step at which the cosine has come down to `floor`.
        floor: Learning rate at the end of the cosine.
        rewarm: Steps of the second warm-up.
        rewarm_peak: Learning rate at the end of the second warm-up.
        cooldown: Steps from there to zero, where it stays.

    Raises:
        ValueError: `decay_end` does not come after the warm-up, or a number of steps is below 1.
    """
    lengths = {
        "warmup": warmup,
        "rewarm": rewarm,
        "cooldown": cooldown,
        "decay_end": decay_end - warmup,
    }
    for name, length in lengths.items():
        if length < 1:
            given = decay_end if name == "decay_end" else length
            least = f"more than warmup={warmup}" if name == "decay_end" else "at least 1"
            raise ValueError(f"{name} is {given}; it must be {least}.")
    stages = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.cosine_decay_schedule(peak, decay_end - warmup, alpha=floor / peak),
            optax.linear_schedule(floor, rewarm_peak, rewarm),
            optax.linear_schedule(rewarm_peak, 0.0, cooldown),
        ],
        [warmup, decay_end, decay_end + rewarm],
    )
    # Optax's cosine divides the step as it is, which strict dtype promotion refuses for integers.
    return lambda step: stages(jnp.asarray(step, jnp.float32))


@dataclasses.dataclass(frozen=True)
class ThreeStageRecipe:
    """A pretraining run in the paper's three stages, given in tokens.

    >>> MOONLIGHT.steps
    175834
    """

    context: int
    """Tokens of a sequence."""
    batches: tuple[int, int]
    """Sequences of a batch, before and after it doubles."""
    batch_doubles_after: float
    """Tokens after which the batch doubles."""
    warmup: int
    """Steps of the first warm-up."""
    decay_end_after: float
    """Tokens at which the cosine ends."""
    cooldown: float
    """Tokens of the last stage."""
    rewarm: int
    """Steps of its warm-up."""
    rates: tuple[float, float, float]
    """Learning rates: the peak, the end of the cosine, and after the second warm-up."""
    bias_update_speed: float
    """Change of a router bias in a step of the first two stages; it is 0 in the last."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self._step_at(self.decay_end_after + self.cooldown)

    @property
    def batch_doubles_at(self) -> int:
        """The step from which the batch is the larger one."""
        return round(self.batch_doubles_after / (self.batches[0] * self.context))

    @property
    def decay_end(self) -> int:
        """The step at which the cosine ends."""
        return self._step_at(self.decay_end_after)

    def _step_at(self, tokens: float) -> int:
        """The step by which so many tokens have been seen, after the batch has doubled."""
        rest = tokens - self.batch_doubles_at * self.batches[0] * self.context
        return self.batch_doubles_at + round(rest / (self.batches[1] * self.context))


MOONLIGHT = ThreeStageRecipe(
    context=8192,
    batches=(2048, 4096),
    batch_doubles_after=200e9,
    warmup=2000,
    decay_end_after=5.2e12,
    cooldown=500e9,
    rewarm=100,
    rates=(4.2e-4, 4.2e-5, 1e-4),
    bias_update_speed=1e-3,
)
"""Moonlight's: 5.7T tokens (arXiv 2502.16982, section 3.3 and appendix C)."""
