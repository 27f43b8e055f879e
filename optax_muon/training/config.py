"""What all trials of a run share: model, batch, steps, schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax

from optax_muon.errors import UsageError
from optax_muon.models.spec import Config
from optax_muon.training.schedules import MOONLIGHT, three_stage_schedule

WARM_UP = 0.1
FINAL_LR = 0.1

COSINE, THREE_STAGE, LINEAR = "cosine", "three-stage", "linear"
MIN_STEPS = 4
"""Fewest steps of a run in three stages: one up, one down, one up again, one to zero."""


def unit_of(vocab_size: int) -> str:
    """What reports call a token of a vocabulary.

    >>> unit_of(256), unit_of(4096)
    ('byte', 'token')
    """
    return "byte" if vocab_size == 256 else "token"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What all trials of a run share."""

    model: Config
    """The sizes of the model; their type determines the model."""
    batch: int
    """Sequences in a step, before the batch doubles."""
    steps: int
    """Optimizer steps of the whole schedule."""
    seed: int
    """Seed of the initial parameters and of the order of the data."""
    eval_every: int
    """Steps between two evaluations on held-out data."""
    eval_sequences: int
    """Held-out sequences of each evaluation, always the same ones."""
    schedule: str = COSINE
    """Schedule of the learning rate: a key of `SCHEDULES`."""
    bias_update_speed: float = 0.0
    """Change of a router bias in a step (`balance.update_bias`)."""
    qk_clip: float | None = None
    """Largest attention logit that `optax_muon.qk_clip` allows; None does not clip."""
    per_head: bool = False
    """Whether Muon gets a matrix per head."""
    epochs: int | None = None
    """Passes over the examples in fine-tuning; pretraining draws windows at random."""

    def __post_init__(self) -> None:
        """Refuse numbers that are too small, and a run too short for its stages."""
        for name in ("batch", "steps", "eval_every", "eval_sequences"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.schedule == THREE_STAGE and self.steps < MIN_STEPS:
            raise UsageError(
                f"--steps is {self.steps}; --schedule {THREE_STAGE} needs at least {MIN_STEPS}"
            )

    @property
    def batch_doubles_at(self) -> int:
        """Steps after which the batch is twice as large; `steps` if it never is.

        >>> from optax_muon.models.moonlight import CONFIGS
        >>> moonlight = CONFIGS["moonlight-16b-a3b"]
        >>> TrainConfig(moonlight, 2048, 175_834, 0, 100, 128, THREE_STAGE).batch_doubles_at
        11921
        """
        three_stages = self.schedule == THREE_STAGE
        return self._scaled(MOONLIGHT.batch_doubles_at) if three_stages else self.steps

    @property
    def unit(self) -> str:
        """What reports call a token."""
        return unit_of(self.model.vocab_size)

    def is_evaluated(self, step: int) -> bool:
        """Whether the held-out loss is measured after a step, counted from 1."""
        return step % self.eval_every == 0 or step == self.steps

    def batch_at(self, step: int) -> int:
        """Sequences of the batch of a step, counted from 1."""
        return self.batch * (1 + (step > self.batch_doubles_at))

    def sequences(self, steps: float) -> float:
        """Sequences seen after so many steps, of which the last may be a part of one."""
        return self.batch * (steps + max(0.0, steps - self.batch_doubles_at))

    def tokens_at(self, step: int) -> int:
        """Tokens predicted in a step, counted from 1."""
        return self.batch_at(step) * self.model.context

    def learning_rate(self, peak: float) -> optax.Schedule:
        """Learning rate by step, from 0, as `SCHEDULES` has it under the name `schedule`."""
        return SCHEDULES[self.schedule](self, peak)

    def learning_rates(self, peak: float) -> np.ndarray:
        """Learning rate of every step, `[steps]` float32.

        >>> from optax_muon.training.presets import PRESETS
        >>> config = TrainConfig(PRESETS["tiny"].model, 8, 4, 0, 20, 1, LINEAR)
        >>> config.learning_rates(1.0).tolist()
        [1.0, 0.75, 0.5, 0.25]
        """
        return np.asarray(jax.vmap(self.learning_rate(peak))(np.arange(self.steps)), np.float32)

    def bias_update_speed_schedule(self, step: int) -> float:
        """The `bias_update_speed` of a step, from 0; zero in the last of three stages."""
        last_stage = self.schedule == THREE_STAGE and step >= self._scaled(MOONLIGHT.decay_end)
        return 0.0 if last_stage else self.bias_update_speed

    def _scaled(self, step: int) -> int:
        """The step of this run at the same fraction of it as `step` of the paper's."""
        return round(step * self.steps / MOONLIGHT.steps)


def _cosine(config: TrainConfig, peak: float) -> optax.Schedule:
    """Up along a line for a tenth of the steps, down along a cosine to a tenth of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        # A step of warm-up has a rate of 0, and a run of one step would do nothing.
        warmup_steps=min(max(1, round(WARM_UP * config.steps)), config.steps - 1),
        decay_steps=config.steps,
        end_value=FINAL_LR * peak,
    )


def _three_stage(config: TrainConfig, peak: float) -> optax.Schedule:
    """The paper's (arXiv 2502.16982, section 3.3), each stage the same fraction of the steps."""
    top, floor, rewarm_peak = MOONLIGHT.rates
    rewarm = max(1, config._scaled(MOONLIGHT.rewarm))
    decay_end = min(config._scaled(MOONLIGHT.decay_end), config.steps - rewarm - 1)
    return three_stage_schedule(
        peak,
        warmup=max(1, config._scaled(MOONLIGHT.warmup)),
        decay_end=decay_end,
        floor=peak * floor / top,
        rewarm=rewarm,
        rewarm_peak=peak * rewarm_peak / top,
        cooldown=config.steps - decay_end - rewarm,
    )


def _linear(config: TrainConfig, peak: float) -> optax.Schedule:
    """Along a line from the peak in the first step to 0 after the last one: fine-tuning's."""
    return optax.linear_schedule(peak, 0.0, config.steps)


SCHEDULES: dict[str, Callable[[TrainConfig, float], optax.Schedule]] = {
    COSINE: _cosine,
    THREE_STAGE: _three_stage,
    LINEAR: _linear,
}
"""Learning-rate schedules by name: functions of the configuration and the peak."""
