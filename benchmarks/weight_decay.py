"""Does Muon need weight decay when it is trained for long? The paper's Fig. 2 in small.

A Llama learns the Python sources listed in benchmarks/corpus, with 20, 60 and 180 bytes for each
parameter: one, three and nine times the usual optimum. Every run goes to the end of its own
schedule. The learning rate is searched for each optimizer and length with seed 0, in factors of two
until the best is inside; the best is repeated with three other seeds. The paper (arXiv 2502.16982,
section 2.2) trains 800M parameters on 100B tokens: Muon without decay is ahead at first, and behind
Muon with decay in the end. Differences have the seeds paired, and a 95 % interval by Student's t.

    python benchmarks/weight_decay.py
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

import _experiment
import _runs
import _table
import matplotlib.figure
import tyro
from _experiment import Experiment, Options, Results
from _runs import Finished, Run
from _variants import SPECS
from _weights import Weighed, weighed

BASE = Run("32 x 2", "muon", 20.0, batch=4, lr=1.2e-2, weight_decay=0.1)
"""Muon at the numbers of the scaling law."""
RATIOS = (20.0, 60.0, 180.0)
"""Tokens per parameter."""
OPTIMIZERS = ("adamw", "muon", "muon-no-decay")


def experiment(options: Options) -> Experiment:
    """The experiment."""
    base, ratios = BASE, RATIOS
    if options.quick:
        base, ratios = dataclasses.replace(base, model="16 x 1"), (0.5, 1.0)
    starts = {
        (name, ratio): dataclasses.replace(base, optimizer=name, tokens_per_parameter=ratio)
        for ratio in ratios
        for name in OPTIMIZERS
    }

    def needed(finished: Sequence[Finished]) -> Iterator[Run]:
        for start in starts.values():
            yield from _runs.tuned(finished, start)[0]

    def rows(results: Results) -> Found:
        found = {key: _runs.tuned(weighed(results), start)[1] for key, start in starts.items()}
        return {key: each for key, each in found.items() if each}

    return Experiment(
        "weight_decay",
        "Muon with and without weight decay, over the length of training",
        __doc__,
        options.models,
        needed,
        lambda results: report(rows(results)),
        lambda results: picture(rows(results)),
        lambda results: summary(rows(results)),
        kind=Weighed,
    )


Found = dict[tuple[str, float], list[Weighed]]
"""The best runs of each optimizer and length, one for each seed."""


def report(found: Found) -> Iterator[str]:
    """Each length: the losses, and the sizes of weights and activations."""
    heads = (
        *("tokens per parameter", "optimizer", "lr", "held-out loss", "difference to Muon"),
        *("query RMS", "MLP RMS", "RMS of the last block's output"),
    )
    yield from _table.markdown(heads, (_row(key, found) for key in found))


def summary(found: Found) -> str:
    """What decay changes at each length."""
    parts = [
        f"{ratio:g}: {_runs.paired(found['muon-no-decay', ratio], rows)}"
        for (name, ratio), rows in found.items()
        if name == "muon" and ("muon-no-decay", ratio) in found
    ]
    if not parts:
        return ""
    return f"loss without decay over that with it, by tokens per parameter: {'; '.join(parts)}"


def _row(key: tuple[str, float], found: Found) -> tuple[object, ...]:
    name, ratio = key
    rows, muon = found[key], found.get(("muon", ratio), [])
    other = name != "muon" and muon
    change = _runs.paired(rows, muon) if other else ""
    sizes = (
        f"{statistics.fmean([getattr(row, field) for row in rows]):.3g}"
        for field in ("query_rms", "mlp_rms", "hidden_rms")
    )
    loss = f"{statistics.fmean(_runs.losses(rows)):.4f}"
    return f"{ratio:g}", SPECS[name].title, f"{rows[0].lr:g}", loss, change, *sizes


def picture(found: Found) -> matplotlib.figure.Figure:
    """Over the length: the loss, and the RMS of the weights of the MLPs."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"val_loss": "held-out loss, nats per byte", "mlp_rms": "RMS of the MLPs' weights"}
    for axes, (field, label) in zip(panels, titles.items(), strict=True):
        for name in OPTIMIZERS:
            mine = [(ratio, rows) for (each, ratio), rows in found.items() if each == name]
            means = [
                (ratio, statistics.fmean([getattr(row, field) for row in rows]))
                for ratio, rows in mine
            ]
            if means:
                row = SPECS[name]
                axes.plot(*zip(*means, strict=True), **row.style.curve(), label=row.title)
        axes.set(xscale="log", xlabel="tokens per parameter", ylabel=label)
        ratios = sorted({ratio for _, ratio in found})
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        if found:
            axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    _experiment.run(chosen, experiment(chosen))
