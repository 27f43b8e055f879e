"""The report of a run with routers: attention logits and expert load, as a table and a picture.

The largest attention logit and the share above 100 are the paper's figure 7 (arXiv 2502.16982); the
imbalance of experts is that of the worst layer, the largest load over the mean, less one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from optax_muon.cli.reports import pictures
from optax_muon.training.loop import StepMetrics
from optax_muon.training.optimizers import Trial

COLUMNS = ("optimizer", "largest logit", "at the end", "above 100", "imbalance", "router entropy")

ALT = (
    "Two panels over the steps, a curve for each optimizer: the imbalance of experts in the worst "
    "layer, and the largest attention logit."
)
"""What the picture shows, for those who do not see it."""

LAST = 0.1
"""Fraction of the steps over which the final imbalance is averaged; single steps are noisy."""

MetricsByTrial = Mapping[Trial, Sequence[StepMetrics]]


def table(runs: MetricsByTrial) -> list[Sequence[str]]:
    """The heading, and a row for every trial."""
    return [COLUMNS, *(_row(trial.title, metrics) for trial, metrics in runs.items())]


def explain() -> str:
    """How to read the table."""
    return (
        "largest logit: of attention, over all layers and steps, and in the last step; above 100: "
        "the largest share of a step's logits above 100. imbalance: the largest load of an expert "
        f"over the mean load, less one, in the worst layer, the mean of the last {LAST:.0%} of the "
        "steps. router entropy: of the scores in the last step, in nats."
    )


def plot(runs: MetricsByTrial, path: Path) -> None:
    """Imbalance and largest attention logit over the steps."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for trial, metrics in runs.items():
        steps = [each.step for each in metrics]
        style = {**trial.spec.style.curve(len(steps)), "label": trial.title, "linewidth": 1.2}
        upper.plot(steps, _series(metrics, "imbalance"), **style)
        lower.plot(steps, _series(metrics, "max_logit"), **style)
    upper.set(ylabel="imbalance of experts,\nworst layer", ylim=0)
    lower.set(ylabel="largest attention logit", xlabel="step")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    upper.legend(frameon=False, handlelength=4)
    pictures.save(figure, path)


def _row(title: str, metrics: Sequence[StepMetrics]) -> Sequence[str]:
    logits, imbalance = _series(metrics, "max_logit"), _series(metrics, "imbalance")
    last = max(1, round(LAST * len(metrics)))
    return (
        title,
        f"{logits.max():.1f}",
        f"{logits[-1]:.1f}",
        f"{_series(metrics, 'high_logits').max():.1e}",
        f"{imbalance[-last:].mean():.2f}",
        f"{_series(metrics, 'router_entropy')[-1]:.3f}",
    )


def _series(metrics: Sequence[StepMetrics], name: str) -> np.ndarray:
    """A number of every step; NaN where the model has none."""
    return np.array([each.model.get(name) for each in metrics], np.float64)
