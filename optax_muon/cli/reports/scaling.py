"""The report of a ladder: `scaling.md` with the tables and fits, `scaling.png` with the curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.figure
from rich.table import Table

from optax_muon.cli.reports import pictures
from optax_muon.cli.reports.tables import markdown_table, terminal_table
from optax_muon.cli.reports.training import machine
from optax_muon.training.ladder import Rung
from optax_muon.training.optimizers import REGISTRY
from optax_muon.training.power_law import FITTED, Curve
from optax_muon.training.scaling import curve, flops, ratios
from optax_muon.training.statistics import mean_with_interval
from optax_muon.training.sweep import Setting

Results = Mapping[str, Sequence[tuple[Rung, Setting]]]
"""The best setting of each optimizer at each size."""


def plan_table(rungs: Sequence[Rung]) -> Table:
    """The ladder, before anything is trained."""
    heads = ("size", "parameters", "tokens", "steps", "batch", "lr to start from", "6ND of a run")
    rows = [
        (
            *(rung.name, f"{rung.parameters:,}", f"{rung.tokens:,}", f"{rung.config.steps:,}"),
            *(str(rung.config.batch), f"{rung.hyper_params.lr:g}", f"{rung.flops:.2g}"),
        )
        for rung in rungs
    ]
    return terminal_table("Ladder", [heads, *rows])


def publish(results: Results, kind: str, folder: Path) -> None:
    """Write both files."""
    (folder / "scaling.md").write_text(markdown(results, kind), encoding="utf-8")
    curves = {name: curve(sizes) for name, sizes in results.items()}
    pictures.save(figure(curves), folder / "scaling.png")


def markdown(results: Results, kind: str) -> str:
    """The sizes, the fits, the ratios and the machine."""
    lines = [
        f"# Loss over compute: {kind}",
        "",
        "Final held-out loss, nats per byte, of each optimizer at its own best learning rate: "
        "means of seeds that no search has seen, with their 95% intervals.",
        "",
        markdown_table([*_size_rows(results)]),
        "",
        *_fits(results),
        "",
        f"Made by `optax-muon scaling`. {machine()}",
        "",
    ]
    return "\n".join(lines)


def _size_rows(results: Results) -> Iterator[tuple[str, ...]]:
    yield ("size", "optimizer", "parameters", "steps", "lr", "FLOPs", "held-out loss")
    for name, sizes in results.items():
        for rung, setting in sizes:
            yield (
                *(rung.name, REGISTRY[name].title, f"{rung.parameters:,}"),
                *(f"{rung.config.steps:,}", f"{setting.first.lr:g}"),
                *(f"{flops(rung, setting):.3g}", mean_with_interval(setting.losses)),
            )


def _fits(results: Results) -> Iterator[str]:
    """The power laws, and the operations at equal loss."""
    if min(map(len, results.values())) < FITTED:
        yield f"A fit needs {FITTED} sizes."
        return
    curves = {name: curve(sizes) for name, sizes in results.items()}
    laws = [(REGISTRY[name].title, str(each.power_law("flops"))) for name, each in curves.items()]
    yield markdown_table([("optimizer", "loss, C in PFLOP/s-days"), *laws])
    yield ""
    baseline = next(iter(results))
    for name, intervals in ratios(curves, baseline).items():
        rows = [
            (rung.name, str(interval))
            for (rung, _), interval in zip(results[name], intervals, strict=True)
        ]
        heading = f"FLOPs of {REGISTRY[name].title} over {REGISTRY[baseline].title}'s"
        yield markdown_table([("at the loss of", heading), *rows])
        yield ""
    yield "A ratio is a median, with the range that holds 90 %; errors are those between the seeds."


def figure(curves: Mapping[str, Curve]) -> matplotlib.figure.Figure:
    """Loss over operations, by optimizer: a dot for each seed, and the fits."""
    drawn = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = drawn.add_subplot(
        xscale="log", yscale="log", xlabel="FLOPs", ylabel="held-out loss, nats per byte"
    )
    for name, each in curves.items():
        row, costs = REGISTRY[name], each.costs["flops"]
        pairs = zip(costs, each.losses, strict=True)
        dots = [(cost, loss) for cost, losses in pairs for loss in losses]
        if dots:
            axes.plot(*zip(*dots, strict=True), **row.style.dots, label=row.title)
        if len(costs) >= FITTED:
            line = row.style.curve() | {"marker": "", "linewidth": 1}
            axes.plot(costs, each.power_law("flops")(costs), **line)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return drawn
