"""The optimizers that are compared, as data: AdamW, Muon at AdamW's numbers, Muon at its own.

All see the same batches, the same schedule (`setup.py`), and the same clipping of the gradient's
global norm; only the transformation and its two tuned numbers differ. The paper
("Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2) claims that the numbers tuned
for AdamW can be reused for Muon: the second trial. What Muon can do when it is tuned with the
same budget is the third. `presets.py` owns the numbers, `sweep.py` finds them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import optax

import optax_muon
from optax_muon.models import spec
from optax_muon.training.config import TrainConfig
from optax_muon.training.presets import HyperParams

CLIP_NORM = 1.0


def _adamw(
    schedule: optax.Schedule, weight_decay: float, views: Views
) -> optax.GradientTransformation:
    del views
    return optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay)


def _muon(
    schedule: optax.Schedule, weight_decay: float, views: Views
) -> optax.GradientTransformation:
    return optax_muon.muon(schedule, weight_decay=weight_decay, views=views)


Views = dict[str, optax_muon.View] | None

OPTIMIZERS: dict[str, Callable[[optax.Schedule, float, Views], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
}

TITLES = {"adamw": "AdamW", "muon": "Muon"}
"""The optimizers for people."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One optimizer and the numbers it runs at.

    Attributes:
        name: in `metrics.jsonl` and of the folder of its checkpoints.
        title: in tables and pictures.
        optimizer: a key of `OPTIMIZERS`.
        tuning: peak learning rate and weight decay.
    """

    name: str
    title: str
    optimizer: str
    tuning: HyperParams


@functools.cache  # `train.py` compiles a step per transformation, so the same one stays one object
def transformation(trial: Trial, setup: TrainConfig) -> optax.GradientTransformation:
    """The trial's optax chain for a run."""
    tuning, optimizer = trial.tuning, OPTIMIZERS[trial.optimizer]
    links = [
        optax.clip_by_global_norm(CLIP_NORM),
        optimizer(setup.learning_rate(tuning.lr), tuning.weight_decay, views(setup)),
    ]
    if setup.qk_clip is not None:
        attentions = spec.model(setup.model).attentions
        links.append(optax_muon.qk_clip(attentions, setup.qk_clip))
    return optax.chain(*links)


def views(setup: TrainConfig) -> Views:
    """Which matrices Muon gets; None decides by role."""
    return spec.model(setup.model).per_head_views if setup.per_head else None


def comparison(
    adamw: HyperParams, muon: HyperParams, optimizer: str | None = None
) -> tuple[Trial, ...]:
    """The trials, AdamW first; Muon's own numbers are left out where they are AdamW's.

    Args:
        adamw: AdamW's numbers.
        muon: Muon's own.
        optimizer: `adamw` or `muon` alone, at its own numbers; None is all of them.

    >>> [c.name for c in comparison(HyperParams(1e-3, 0.1), HyperParams(2e-3, 0.1))]
    ['adamw', 'muon-carried', 'muon-tuned']
    >>> [c.name for c in comparison(HyperParams(1e-3, 0.1), HyperParams(2e-3, 0.1), "muon")]
    ['muon-tuned']
    """
    trials = (
        Trial("adamw", "AdamW", "adamw", adamw),
        Trial("muon-carried", "Muon, AdamW lr", "muon", adamw),
        Trial("muon-tuned", "Muon, own lr", "muon", muon),
    )
    kept = trials if muon != adamw else trials[:2]
    return {None: kept, "adamw": kept[:1], "muon": kept[-1:]}[optimizer]
