"""The report of a sweep: `sweep.md` with the table, `sweep.png` with the curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure

from optax_muon.cli.reports.tables import markdown_table
from optax_muon.cli.reports.training import machine
from optax_muon.training.optimizers import REGISTRY
from optax_muon.training.sweep import Point, best

COLUMNS = ("optimizer", "lr", "decay", "held-out loss")
LINES = ("-", "--", ":", "-.")


def publish(points: Sequence[Point], heading: str, unit: str, folder: Path) -> None:
    """Write both files; `unit` is what a token is."""
    (folder / "sweep.md").write_text(markdown(points, heading, unit))
    plot(points, unit, folder / "sweep.png")


def markdown(points: Sequence[Point], heading: str, unit: str) -> str:
    """The table, the best points and the machine."""
    winners = [point for name in _names(points) if (point := best(points, name))]
    lines = [
        f"# Sweep: {heading}",
        "",
        f"Final held-out loss, nats per {unit}; every point is one whole run on the same batches.",
        "",
        markdown_table([COLUMNS, *(_row(point, point in winners) for point in points)]),
        "",
        *(f"- Best {_title(p)}: lr {p.lr:g}, decay {p.weight_decay:g}." for p in winners),
        "",
        f"Made by `optax-muon sweep`. {machine()}",
        "",
    ]
    return "\n".join(lines)


def plot(points: Sequence[Point], unit: str, path: Path) -> None:
    """Loss over learning rate, a line per optimizer and weight decay."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="peak learning rate", ylabel=f"final held-out loss, nats per {unit}"
    )
    decays = sorted({point.weight_decay for point in points})
    for spec in (REGISTRY[name] for name in _names(points)):
        for decay, line in zip(decays, LINES, strict=False):
            mine = [p for p in points if (p.optimizer, p.weight_decay) == (spec.name, decay)]
            mine.sort(key=lambda point: point.lr)
            axes.plot(
                [p.lr for p in mine],
                [p.val_loss for p in mine],
                color=spec.color,
                linestyle=line,
                marker="o",
                label=f"{spec.title}, decay {decay:g}",
            )
    rates = sorted({point.lr for point in points})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _names(points: Sequence[Point]) -> list[str]:
    """The optimizers, in the order of their first points."""
    return list(dict.fromkeys(point.optimizer for point in points))


def _title(point: Point) -> str:
    return REGISTRY[point.optimizer].title


def _row(point: Point, is_best: bool) -> list[str]:
    loss = f"{point.val_loss:.4f}" if math.isfinite(point.val_loss) else "diverged"
    loss = f"**{loss}**" if is_best else loss
    return [_title(point), f"{point.lr:g}", f"{point.weight_decay:g}", loss]
