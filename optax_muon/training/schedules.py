"""The paper's schedule of learning rate, batch and router bias (arXiv 2502.16982, section 3.3).

Three stages: warm up and decay along a cosine; then, on better data, warm up again, lower, and cool
down along a line to zero. The batch is doubled early on. What the paper tells in tokens is counted
here in optimizer steps, which is what a schedule is asked for.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def three_stage_schedule(
    peak: float, *, warmup: int, decay: int, floor: float, rewarm: int, again: float, cooldown: int
) -> optax.Schedule:
    """Warm up, cosine, warm up again, and a line to zero.

    >>> schedule = three_stage_schedule(
    ...     4.2e-4, warmup=10, decay=100, floor=4.2e-5, rewarm=5, again=1e-4, cooldown=40
    ... )
    >>> [f"{float(schedule(step)):.2g}" for step in (0, 10, 100, 105, 125, 145)]
    ['0', '0.00042', '4.2e-05', '0.0001', '5e-05', '0']

    Args:
        peak: learning rate at the end of the first warm-up, which starts at 0.
        warmup: steps of the first warm-up.
        decay: step at which the cosine has come down to `floor`.
        floor: learning rate at the end of the cosine.
        rewarm: steps of the second warm-up.
        again: learning rate at the end of the second warm-up.
        cooldown: steps from there to zero, where it stays.

    Raises:
        ValueError: `decay` does not come after the warm-up, or a number of steps is below 1.
    """
    lengths = {"warmup": warmup, "rewarm": rewarm, "cooldown": cooldown, "decay": decay - warmup}
    for name, length in lengths.items():
        if length < 1:
            given = decay if name == "decay" else length
            least = f"more than warmup={warmup}" if name == "decay" else "at least 1"
            raise ValueError(f"{name}={given} was given, {least} is accepted.")
    stages = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.cosine_decay_schedule(peak, decay - warmup, alpha=floor / peak),
            optax.linear_schedule(floor, again, rewarm),
            optax.linear_schedule(again, 0.0, cooldown),
        ],
        [warmup, decay, decay + rewarm],
    )
    # Optax's cosine divides the step as it comes, which strict dtype promotion refuses of integers.
    return lambda step: stages(jnp.asarray(step, jnp.float32))


@dataclasses.dataclass(frozen=True)
class ThreeStageRecipe:
    """A pretraining run in the paper's three stages, told in tokens.

    >>> MOONLIGHT.batch(0), MOONLIGHT.batch(20_000)
    (2048, 4096)
    >>> MOONLIGHT.steps
    175834
    """

    context: int
    """Tokens of a sequence."""
    batches: tuple[int, int]
    """Sequences of a batch, before and after it grows."""
    grows: float
    """Tokens after which it grows."""
    warmup: int
    """Steps of the first warm-up."""
    decayed: float
    """Tokens at which the cosine ends."""
    cooldown: float
    """Tokens of the last stage."""
    rewarm: int
    """Steps of its warm-up."""
    rates: tuple[float, float, float]
    """Learning rates: the peak, the end of the cosine, and after the second warm-up."""
    bias_rate: float
    """Rate of the router bias in the first two stages; it is 0 in the last."""

    def batch(self, step: int) -> int:
        """Sequences of the batch of a step."""
        return self.batches[step >= self.grows_at]

    def learning_rate(self, step: ArrayLike) -> jax.Array:
        """Learning rate of a step; an `optax.Schedule`."""
        peak, floor, again = self.rates
        stages = three_stage_schedule(
            peak,
            warmup=self.warmup,
            decay=self.decayed_at,
            floor=floor,
            rewarm=self.rewarm,
            again=again,
            cooldown=self.steps - self.decayed_at - self.rewarm,
        )
        return jnp.asarray(stages(step))

    def bias_update_speed(self, step: ArrayLike) -> jax.Array:
        """Rate at which `update_bias` moves the router biases in a step; an `optax.Schedule`."""
        return jnp.where(jnp.asarray(step) < self.decayed_at, self.bias_rate, 0.0)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self._step_at(self.decayed + self.cooldown)

    @property
    def grows_at(self) -> int:
        """The step from which the batch is the larger one."""
        return round(self.grows / (self.batches[0] * self.context))

    @property
    def decayed_at(self) -> int:
        """The step at which the cosine ends."""
        return self._step_at(self.decayed)

    def _step_at(self, tokens: float) -> int:
        """The step by which so many tokens have been seen, after the batch has grown."""
        rest = tokens - self.grows_at * self.batches[0] * self.context
        return self.grows_at + round(rest / (self.batches[1] * self.context))


MOONLIGHT = ThreeStageRecipe(
    context=8192,
    batches=(2048, 4096),
    grows=200e9,
    warmup=2000,
    decayed=5.2e12,
    cooldown=500e9,
    rewarm=100,
    rates=(4.2e-4, 4.2e-5, 1e-4),
    bias_rate=1e-3,
)
"""Moonlight's: 5.7T tokens (arXiv 2502.16982, section 3.3 and appendix C)."""
