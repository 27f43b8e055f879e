"""How large should an update of Muon be? The paper's Table 8 in small.

A Llama learns the Python sources listed in benchmarks/corpus, 20 bytes for each parameter, with
AdamW at its own best learning rate and decay, and with Muon at the same numbers and updates of five
sizes: `match_rms(rms)`. The paper (arXiv 2502.16982, appendix A) has 0.2 and 0.4 best, and takes
0.2. Root mean squares are those of the weights at the end of training, means of the seeds.

    python benchmarks/update_rms.py
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
from _weights import Weighed, weighed

from optax_muon.training.optimizers import REGISTRY

BASE = Run("48 x 2", "adamw", 20.0, batch=4, lr=6e-3, weight_decay=0.1)
"""AdamW at the numbers of the scaling law."""
ROWS = {
    "adamw": ("AdamW", 3.679, 1.01e-2, 1.25e-2),
    "muon-rms-0.05": ("0.05", 3.503, 5.74e-3, 8.01e-3),
    "muon-rms-0.1": ("0.1", 3.374, 8.44e-3, 1.27e-2),
    "muon": ("0.2", 3.325, 1.57e-2, 2.35e-2),
    "muon-rms-0.4": ("0.4", 3.314, 2.95e-2, 4.51e-2),
    "muon-rms-0.8": ("0.8", 3.543, 7.23e-2, 8.73e-2),
}
"""RMS of an update by the name of the optimizer, and what the paper's table has for it: the loss,
the RMS of the query projections and that of the MLPs."""


def experiment(options: Options) -> Experiment:
    """The experiment."""
    base = BASE
    if options.quick:
        base = dataclasses.replace(base, model="16 x 1", tokens_per_parameter=1.0)
    runs = {name: dataclasses.replace(base, optimizer=name).repeats for name in ROWS}

    def needed(finished: Sequence[Finished]) -> Iterator[Run]:
        del finished
        for repeats in runs.values():
            yield from repeats

    def rows(results: Results) -> dict[str, list[Weighed]]:
        return {name: _runs.found(weighed(results), each) for name, each in runs.items()}

    return Experiment(
        "update_rms",
        "Loss over the size of an update",
        __doc__,
        options.models,
        needed,
        lambda results: report(rows(results)),
        lambda results: picture(rows(results)),
        lambda results: summary(rows(results)),
        kind=Weighed,
    )


def report(found: dict[str, list[Weighed]]) -> Iterator[str]:
    """Each size of an update, beside the paper's numbers."""
    heads = (
        *("RMS of an update", "held-out loss", "difference to 0.2", "query RMS", "MLP RMS"),
        *("paper: loss", "query RMS", "MLP RMS"),
    )
    yield from _table.markdown(heads, (_row(name, found) for name in ROWS if found[name]))


def summary(found: dict[str, list[Weighed]]) -> str:
    """The best size, and how the others compare."""
    if not all(found.values()):
        return ""
    parts = [
        f"{ROWS[name][0]}: {_runs.paired(rows, found['muon'])}"
        for name, rows in found.items()
        if name != "muon"
    ]
    return f"loss over that of RMS 0.2: {'; '.join(parts)}"


def _row(name: str, found: dict[str, list[Weighed]]) -> tuple[object, ...]:
    title, loss, query, mlp = ROWS[name]
    rows, losses = found[name], _runs.losses(found[name])
    change = "" if name == "muon" else _runs.paired(rows, found["muon"])
    measured = (statistics.fmean([getattr(row, field) for row in rows]) for field in FIELDS)
    numbers = (f"{value:.3g}" for value in (*measured, loss, query, mlp))
    return title, f"{statistics.fmean(losses):.4f}", change, *numbers


FIELDS = ("query_rms", "mlp_rms")


def picture(found: dict[str, list[Weighed]]) -> matplotlib.figure.Figure:
    """The loss over the size of an update: a dot for each seed, a line through the means."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="RMS of an update", ylabel="held-out loss, nats per byte"
    )
    sizes = {float(ROWS[name][0]): rows for name, rows in found.items() if name != "adamw" and rows}
    for size, rows in sizes.items():
        axes.plot([size] * len(rows), _runs.losses(rows), **REGISTRY["muon"].style.dots)
    means = [(size, statistics.fmean(_runs.losses(rows))) for size, rows in sizes.items()]
    if means:
        axes.plot(*zip(*means, strict=True), color=REGISTRY["muon"].style.color, label="Muon")
        axes.set_xticks([*sizes], [f"{size:g}" for size in sizes])
        axes.minorticks_off()
    if found["adamw"]:
        level = statistics.fmean(_runs.losses(found["adamw"]))
        axes.axhline(level, color=REGISTRY["adamw"].style.color, linestyle="--", label="AdamW")
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    _experiment.run(chosen, experiment(chosen))
