"""The report of a sweep: `sweep.md` with the table, `sweep.png` with the curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure

from optax_muon.cli.reports import pictures
from optax_muon.cli.reports.tables import markdown_table
from optax_muon.cli.reports.training import machine
from optax_muon.training.optimizers import REGISTRY
from optax_muon.training.statistics import mean_with_interval
from optax_muon.training.styles import nth
from optax_muon.training.sweep import Point, Setting, best, settings

COLUMNS = ("optimizer", "lr", "decay", "held-out loss")


def publish(points: Sequence[Point], heading: str, unit: str, folder: Path) -> None:
    """Write both files; `unit` is what a token is."""
    (folder / "sweep.md").write_text(markdown(points, heading, unit), encoding="utf-8")
    plot(points, unit, folder / "sweep.png")


def markdown(points: Sequence[Point], heading: str, unit: str) -> str:
    """The table, the best settings and the machine."""
    winners = [setting for name in _names(points) if (setting := best(points, name))]
    every = settings(points)
    seeds = max(len(setting.points) for setting in every)
    repeated = f" Means of {seeds} seeds, with their 95% intervals." if seeds > 1 else ""
    lines = [
        f"# Sweep: {heading}",
        "",
        f"Final held-out loss, nats per {unit}; runs of a seed have the same batches.{repeated}",
        "",
        markdown_table([COLUMNS, *(_row(setting, setting in winners) for setting in every)]),
        "",
        *(
            f"- Best {REGISTRY[setting.first.optimizer].title}: lr {_rates(setting.first)}, "
            f"decay {setting.first.weight_decay:g}."
            for setting in winners
        ),
        "",
        f"Made by `optax-muon sweep`. {machine()}",
        "",
    ]
    return "\n".join(lines)


def plot(points: Sequence[Point], unit: str, path: Path) -> None:
    """Loss over learning rate, a line for each optimizer, decay and rate of AdamW's part."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="peak learning rate", ylabel=f"final held-out loss, nats per {unit}"
    )
    lines: dict[str, list[Setting]] = {}
    for setting in sorted(settings(points), key=lambda setting: setting.first.lr):
        lines.setdefault(_line(setting.first), []).append(setting)
    for place, (label, mine) in enumerate(sorted(lines.items())):
        curve = [(setting.first.lr, setting.loss) for setting in mine]
        axes.plot(*zip(*curve, strict=True), **nth(place).curve(), label=label)
    rates = sorted({point.lr for point in points})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    pictures.save(figure, path)


def _names(points: Sequence[Point]) -> list[str]:
    """The optimizers, in the order of their first points."""
    return list(dict.fromkeys(point.optimizer for point in points))


def _line(point: Point) -> str:
    """What the points of a line share."""
    apart = "" if point.adamw_lr is None else f", AdamW's lr {point.adamw_lr:g}"
    return f"{REGISTRY[point.optimizer].title}, decay {point.weight_decay:g}{apart}"


def _row(setting: Setting, is_best: bool) -> list[str]:
    point, losses = setting.first, setting.losses
    loss = mean_with_interval(losses) if math.isfinite(setting.loss) else "diverged"
    loss = f"**{loss}**" if is_best else loss
    title = REGISTRY[point.optimizer].title
    return [title, _rates(point), f"{point.weight_decay:g}", loss]


def _rates(point: Point) -> str:
    """The learning rates."""
    apart = "" if point.adamw_lr is None else f", AdamW's {point.adamw_lr:g}"
    return f"{point.lr:g}{apart}"
