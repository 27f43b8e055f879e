"""The table of presets: a row owns its model, its batch, its steps and its learning rates."""

from __future__ import annotations

import dataclasses

from optax_muon.models.llama import LlamaConfig
from optax_muon.models.stops import UsageError


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The two numbers that are tuned.

    Attributes:
        lr: peak learning rate, in Muon's case times the update of RMS 0.2.
        weight_decay: decoupled, per unit of learning rate.
    """

    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        """Refuse numbers that no optimizer can run at."""
        if not (self.lr > 0 and self.weight_decay >= 0):
            raise UsageError(
                f"lr is {self.lr} and decay {self.weight_decay}; lr must be positive and decay "
                "not negative"
            )


@dataclasses.dataclass(frozen=True)
class Preset:
    """One size of the experiment.

    Attributes:
        model: the Llama's sizes.
        batch: sequences in a step.
        steps: optimizer steps of the whole schedule.
        adamw: AdamW's best numbers.
        muon: Muon's best numbers.
        source: where the two come from.
    """

    model: LlamaConfig
    batch: int
    steps: int
    adamw: Tuning
    muon: Tuning
    source: str


UNSWEPT = "AdamW's by hand, Muon takes it over as in the paper; `optax-muon sweep` finds better"

PRESETS = {
    "tiny": Preset(
        LlamaConfig(width=32, depth=2, heads=2, kv_heads=1, mlp=64, context=32),
        batch=8,
        steps=40,
        adamw=Tuning(1e-2, 0.1),
        muon=Tuning(2e-2, 0.1),
        source="by hand; seconds long, for tests",
    ),
    "small": Preset(
        LlamaConfig(width=128, depth=3, heads=4, kv_heads=2, mlp=344, context=128),
        batch=16,
        steps=400,
        adamw=Tuning(6e-3, 0.3),
        muon=Tuning(1.2e-2, 0.3),
        source="the sweep in benchmarks/results/sweep",
    ),
    "medium": Preset(
        LlamaConfig(width=256, depth=6, heads=8, kv_heads=4, mlp=688, context=256),
        batch=32,
        steps=2000,
        adamw=Tuning(3e-3, 0.1),
        muon=Tuning(3e-3, 0.1),
        source=UNSWEPT,
    ),
    "base": Preset(
        LlamaConfig(
            width=512, depth=8, heads=8, kv_heads=4, mlp=1376, context=512, dtype="bfloat16"
        ),
        batch=64,
        steps=5000,
        adamw=Tuning(1e-3, 0.1),
        muon=Tuning(1e-3, 0.1),
        source=UNSWEPT,
    ),
    "large": Preset(
        LlamaConfig(
            width=768, depth=12, heads=12, kv_heads=4, mlp=2048, context=1024, dtype="bfloat16"
        ),
        batch=128,
        steps=10000,
        adamw=Tuning(6e-4, 0.1),
        muon=Tuning(6e-4, 0.1),
        source=UNSWEPT,
    ),
}


def preset(name: str) -> Preset:
    """The row called `name`.

    Raises:
        UsageError: when there is none.

    >>> preset("small").model.width
    128
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
