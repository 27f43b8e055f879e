"""What all trials of a run share: the model, the data they see, and what is done with it."""

from __future__ import annotations

import dataclasses

import optax

from optax_muon.errors import UsageError
from optax_muon.models.spec import Config
from optax_muon.training.schedules import MOONLIGHT, three_stage_schedule

WARM_UP = 0.1
FINAL_LR = 0.1

COSINE, THREE_STAGE = "cosine", "three-stage"
FEWEST = 4
"""Steps of a run in three stages: one up, one down, one up again, one to zero."""
SCHEDULES = (COSINE, THREE_STAGE)
"""One cosine, and the paper's three stages at the same parts of a run of any length."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What all trials share.

    Attributes:
        model: the sizes of the model; their type says which model.
        batch: sequences in a step, before it grows.
        steps: optimizer steps of the whole schedule.
        seed: of the initial parameters and of the order of the data.
        eval_every: steps between two looks at the held-out text.
        eval_sequences: held-out sequences of each look, always the same ones.
        schedule: one of `SCHEDULES`.
        router_rate: change of a router bias in a step (`balance.update_bias`).
        qk_clip: largest attention logit that `optax_muon.qk_clip` allows; None does not clip.
        per_head: whether Muon gets a matrix per head.
    """

    model: Config
    batch: int
    steps: int
    seed: int
    eval_every: int
    eval_sequences: int
    schedule: str = COSINE
    bias_update_speed: float = 0.0
    qk_clip: float | None = None
    per_head: bool = False

    @property
    def grows_at(self) -> int:
        """Steps after which the batch is twice as large; `steps` where it never is.

        >>> from optax_muon.models.moonlight import CONFIGS
        >>> moonlight = CONFIGS["moonlight-16b-a3b"]
        >>> TrainConfig(moonlight, 2048, 175_834, 0, 100, 128, THREE_STAGE).grows_at
        11921
        """
        return self._at(MOONLIGHT.grows_at) if self.schedule == THREE_STAGE else self.steps

    @property
    def unit(self) -> str:
        """What a token is, for people."""
        return "byte" if self.model.vocab_size == 256 else "token"

    def batch_at(self, step: int) -> int:
        """Sequences of the batch of a step, counted from 1."""
        return self.batch * (1 + (step > self.grows_at))

    def sequences(self, steps: float) -> float:
        """Sequences seen after so many steps, of which the last may be a part of one."""
        return self.batch * (steps + max(0.0, steps - self.grows_at))

    def tokens_at(self, step: int) -> int:
        """Tokens predicted in a step, counted from 1."""
        return self.batch_at(step) * self.model.context

    def __post_init__(self) -> None:
        """Refuse a run too short for its stages."""
        if self.schedule == THREE_STAGE and self.steps < FEWEST:
            raise UsageError(
                f"--steps is {self.steps}; --schedule {THREE_STAGE} needs at least {FEWEST}"
            )

    def learning_rate(self, peak: float) -> optax.Schedule:
        """Learning rate by step, from 0.

        `cosine`: up along a line for a tenth of the steps, down along a cosine to a tenth of the
        peak. `three-stage`: the paper's (arXiv 2502.16982, section 3.3), each stage the same part
        of the steps as there.
        """
        if self.schedule == COSINE:
            return optax.warmup_cosine_decay_schedule(
                init_value=0.0,
                peak_value=peak,
                warmup_steps=max(1, round(WARM_UP * self.steps)),
                decay_steps=self.steps,
                end_value=FINAL_LR * peak,
            )
        top, floor, again = MOONLIGHT.rates
        rewarm = max(1, self._at(MOONLIGHT.rewarm))
        decayed = min(self._at(MOONLIGHT.decayed_at), self.steps - rewarm - 1)
        return three_stage_schedule(
            peak,
            warmup=max(1, self._at(MOONLIGHT.warmup)),
            decay=decayed,
            floor=peak * floor / top,
            rewarm=rewarm,
            again=peak * again / top,
            cooldown=self.steps - decayed - rewarm,
        )

    def bias_rate(self, step: int) -> float:
        """Rate at which `update_bias` moves the router biases in a step, from 0."""
        still = self.schedule == THREE_STAGE and step >= self._at(MOONLIGHT.decayed_at)
        return 0.0 if still else self.bias_update_speed

    def _at(self, step: int) -> int:
        """The step of this run that lies as far into it as one of the paper's into that."""
        return round(step * self.steps / MOONLIGHT.steps)
