"""Does one learning rate fit all widths and depths? Loss over the learning rate, for each scale.

Llamas of three widths and two depths learn the Python sources listed in benchmarks/corpus, 20 bytes
for each parameter, at seven learning rates in steps of two, and at further ones until the best is
not the largest. The update of Muon is scaled as the paper's Eq. 4 does (match the RMS of AdamW's),
by Eq. 5 (a factor of the hidden size alone), by Eq. 6 (the RMS of each update made equal), as in
the original Muon, and by the spectral condition; the last three of them at the smaller depth only.
Batch and weight decay are those that the scaling law found. Every point is one run with seed 0.
`best` is the vertex of the parabola through the best point and its neighbours, over the logarithm
of the rate; `at 2x` and `at x/2` are what the two neighbours lose against the best point.

    python benchmarks/lr_transfer.py
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import _experiment
import _models
import _table
import matplotlib.figure
import numpy as np
import tyro
from _experiment import Experiment, Options, Results
from _runs import Finished, Run
from _variants import SPECS

from optax_muon.training import power_law, styles

WIDTHS, DEPTHS = (16, 32, 48), (2, 4)
MODELS = {
    f"{width} x {layers}": _models.llama(width, layers)
    for layers, width in itertools.product(DEPTHS, WIDTHS)
}
RATES = tuple(7.5e-4 * 2**power for power in range(7))
EVERYWHERE = ("adamw", "muon", "muon-fixed-scale")
"""Optimizers that are compared at both depths."""
SHALLOW = ("muon-update-norm", "muon-keller-scale", "muon-spectral-scale")
"""Optimizers that are compared at the smaller depth alone."""
OPTIMIZERS = (*EVERYWHERE, *SHALLOW)
Curves = dict[tuple[str, str], list[Finished]]
"""The runs of each optimizer and model, by the learning rate."""


def experiment(options: Options) -> Experiment:
    """The experiment."""
    models, ratio = (_models.TOY, 1.0) if options.quick else (MODELS, 20.0)
    rates = RATES[::3] if options.quick else RATES
    pairs = [
        (name, model)
        for model, config in models.items()
        for name in (OPTIMIZERS if config.num_hidden_layers == min(DEPTHS) else EVERYWHERE)
    ]

    def needed(finished: Sequence[Finished]) -> Iterator[Run]:
        losses = {row.run: row.val_loss for row in finished}
        for name, model in pairs:
            runs = [Run(model, name, ratio, 4, rate, 0.1) for rate in rates]
            while losses.keys() >= {*runs} and min(runs, key=losses.__getitem__) == runs[-1]:
                runs.append(dataclasses.replace(runs[-1], lr=2 * runs[-1].lr))
            yield from runs

    return Experiment(
        "lr_transfer",
        "Loss over the learning rate, by width, depth and scale",
        __doc__,
        models,
        needed,
        lambda results: report(_curves(results), pairs),
        lambda results: picture(_curves(results)),
        lambda results: summary(_curves(results)),
    )


def _curves(results: Results) -> Curves:
    curves: Curves = {}
    for row in sorted(results.finished, key=lambda row: row.lr):
        curves.setdefault((row.optimizer, row.model), []).append(row)
    return curves


def report(curves: Curves, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The best rate of every curve, and how the best rate moves."""
    heads = ("optimizer", "model", "best", "loss there", "at x/2", "at 2x")
    rows = [
        (SPECS[name].title, model, *_best(rows))
        for name in OPTIMIZERS
        for (each, model), rows in curves.items()
        if each == name and len(rows) >= len(RATES)
    ]
    yield from _table.markdown(heads, rows)
    yield ""
    missing = [
        f"{SPECS[name].title} at {model}"
        for name, model in pairs
        if len(curves.get((name, model), [])) < len(RATES)
    ]
    if missing:
        yield f"Still to come: {'; '.join(missing)}."
        yield ""
    for name in OPTIMIZERS:
        rates = _best_rates(curves, name)
        if len(rates) > 1:
            yield (
                f"- {SPECS[name].title}: the best rates of {len(rates)} models lie within a "
                f"factor of {max(rates) / min(rates):.1f}."
            )


def summary(curves: Curves) -> str:
    """How far the best rates lie apart, and how good each scale is at its best rate."""
    rates = {name: _best_rates(curves, name) for name in ("adamw", "muon")}
    if min(map(len, rates.values())) < 2:
        return ""
    spread = ", ".join(
        f"{SPECS[name].title} {max(found) / min(found):.1f} ({len(found)} models)"
        for name, found in rates.items()
    )
    model = f"{max(WIDTHS)} x {min(DEPTHS)}"
    losses = "; ".join(
        f"{SPECS[name].title} {min(row.val_loss for row in curves[name, model]):.4f}"
        for name in OPTIMIZERS
        if len(curves.get((name, model), [])) >= len(RATES)
    )
    return (
        f"the best rates lie within a factor of: {spread}. Loss of {model} at the best rate, one "
        f"seed: {losses}"
    )


def _best_rates(curves: Curves, name: str) -> list[float]:
    """The best rates of an optimizer's models, where they are inside."""
    found = [vertex(rows) for (each, _), rows in curves.items() if each == name]
    return [rate for rate in found if math.isfinite(rate)]


def _best(rows: list[Finished]) -> tuple[str, ...]:
    losses = [row.val_loss for row in rows]
    place = int(np.nanargmin(losses))
    sides = [losses[i] if 0 <= i < len(losses) else math.nan for i in (place - 1, place + 1)]
    return (
        _experiment.measured(vertex(rows), ".2g"),
        f"{losses[place]:.4f}",
        *(_experiment.measured(side - losses[place], "+.4f") for side in sides),
    )


def vertex(rows: Sequence[Finished]) -> float:
    """The rate at the vertex of the parabola; NaN where the best point is the first or the last."""
    losses = [row.val_loss for row in rows]
    place = int(np.nanargmin(losses))
    around = range(place - 1, place + 2)
    if around[0] < 0 or around[-1] >= len(rows) or not np.isfinite(losses[around[-1]]):
        return math.nan
    around_best = np.asarray([losses[i] for i in around])
    return float(power_law.vertex([rows[i].lr for i in around], around_best))


def picture(curves: Curves) -> matplotlib.figure.Figure:
    """A panel for each optimizer, a line for each model, over the learning rate."""
    figure = matplotlib.figure.Figure(figsize=(9, 5), dpi=150, layout="constrained")
    panels = [*figure.subplots(2, 3, sharex=True, sharey=True).flat]
    for name, axes in zip(OPTIMIZERS, panels, strict=True):
        axes.set(title=SPECS[name].title, xscale="log")
        mine = [(model, rows) for (each, model), rows in curves.items() if each == name]
        for place, (model, rows) in enumerate(mine):
            shown = [(row.lr, row.val_loss) for row in rows]
            axes.plot(*zip(*shown, strict=True), **styles.nth(place).curve(), label=model)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")
    figure.supxlabel("peak learning rate", fontsize=9)
    figure.supylabel("held-out loss, nats per byte", fontsize=9)
    return figure


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    _experiment.run(chosen, experiment(chosen))
