"""The paper's scaling law in small: loss over FLOPs for AdamW and for Muon, with intervals.

Llamas of five sizes learn the Python sources listed in benchmarks/corpus, byte by byte, with 20
tokens for each parameter. Every run goes to the end of its own schedule. Learning rate, batch and
weight decay are searched for each optimizer, in factors of two until the best is inside: all three
at the two smallest sizes, the learning rate alone above them, from the numbers of the size below
(arXiv 2502.16982, appendix B, does the same). `muon-carried` is Muon at AdamW's numbers, as in the
paper's section 3.2; `muon` has its own. The best run of each size is repeated with two more seeds.
FLOPs are those of all matrix products in the compiled step, the optimizer's included; 6ND, beside
them, leaves those and the attention scores out, as the paper does.

A fit is least squares in log space, of L = a C^-b and of L = e + a C^-b. The ratio is the FLOPs of
Muon over those that AdamW's fit needs for the same loss. Its interval is of 1000 resamples of the
seeds.

    python benchmarks/scaling_law.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import _bench
import _fits
import _runs
import _table
import matplotlib.figure
import tyro
from _runs import Finished, Ladder, Run

from optax_muon.training.optimizers import REGISTRY

TOKENS_PER_PARAMETER = 20.0
SEEDS = 3
SEARCHED_IN_FULL = 2
"""Sizes, the smallest, at which all three numbers are searched."""
ALL, NARROW = ("lr", "batch", "weight_decay", "lr"), ("lr",)
OPTIMIZERS = ("adamw", "muon-carried", "muon")
COSTS = {
    "model_flops": "6ND over AdamW's",
    "flops": "all FLOPs over AdamW's",
    "seconds": "seconds over AdamW's",
}
"""What is compared at equal loss, with the titles of the columns."""
PAPER = {"adamw": (2.608, 0.054), "muon": (2.506, 0.052)}
"""a and b of L = a C^-b in table 3 of arXiv 2502.16982, C in PFLOP/s-days."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the experiment."""

    workers: int = 1
    """Worker processes; on CPUs one core each."""
    sizes: int = 5
    """Sizes of the ladder to train, from the smallest."""
    only_report: bool = False
    """Write the report of the finished runs, and train nothing."""
    quick: bool = False
    """Check in toy sizes that the script works; the results go to runs/bench."""
    out: Path | None = None
    """Folder for the results; benchmarks/results/scaling_law by default."""
    corpus: Path = Path("runs/corpus")
    """Folder of the text, which is downloaded to it once."""

    @property
    def ladder(self) -> Ladder:
        """The models, and where the runs are written."""
        models = _runs.TOY if self.quick else dict([*_runs.MODELS.items()][: self.sizes])
        default = _bench.HERE.parent / "runs" / "bench" if self.quick else _bench.HERE / "results"
        folder = self.out or default / "scaling_law"
        return Ladder(models, folder / "runs.csv", self.corpus)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which runs the experiment needs."""

    models: Sequence[str]
    """Names of the models, the smallest first."""
    tokens_per_parameter: float = TOKENS_PER_PARAMETER

    def needed(self, finished: Sequence[Finished]) -> Iterator[Run]:
        """The searches, each from where the one below it ended, and the seeds of their best."""
        start = Run(self.models[0], "adamw", self.tokens_per_parameter, 8, 1.2e-2, 0.1)
        for place, model in enumerate(self.models):
            names = ALL if place < SEARCHED_IN_FULL else NARROW
            missing, adamw = _runs.search(finished, dataclasses.replace(start, model=model), names)
            yield from missing
            if missing:
                return
            start = adamw
            yield from self._seeds(adamw)
            yield from self._seeds(dataclasses.replace(adamw, optimizer="muon-carried"))
            missing, muon = _runs.search(finished, self._muon_start(finished, adamw, place), names)
            yield from missing or self._seeds(muon)

    def best(self, finished: Sequence[Finished], model: str, name: str) -> list[Finished]:
        """The runs of a size at an optimizer's best numbers, one for each seed."""
        mine = [r for r in finished if (r.model, r.optimizer) == (model, name)]
        runs = {row.run: row for row in mine}
        complete = [
            [runs[run] for run in self._seeds(row.run) if run in runs]
            for row in mine
            if row.seed == 0
        ]
        complete = [rows for rows in complete if len(rows) == SEEDS]
        return min(complete, key=lambda rows: rows[0].val_loss, default=[])

    def _muon_start(self, finished: Sequence[Finished], adamw: Run, place: int) -> Run:
        """Muon's best numbers of the size below, or AdamW's of this size."""
        below = self.best(finished, self.models[place - 1], "muon") if place else []
        start = below[0].run if below else adamw
        return dataclasses.replace(start, model=adamw.model, optimizer="muon", seed=0)

    def _seeds(self, run: Run) -> list[Run]:
        return [dataclasses.replace(run, seed=seed) for seed in range(SEEDS)]


def main(options: Options) -> None:
    """Train what is missing, and write the report."""
    ladder, protocol = options.ladder, Protocol([*options.ladder.models])
    if options.quick:
        protocol = dataclasses.replace(protocol, tokens_per_parameter=1.0)
    if not options.only_report:
        ladder.complete(protocol.needed, options.workers)
    finished = ladder.finished()
    points = {
        name: [rows for model in protocol.models if (rows := protocol.best(finished, model, name))]
        for name in OPTIMIZERS
    }
    results = _bench.Options(quick=options.quick, out=ladder.table.parent)
    page = [*_bench.page_head("Loss over FLOPs, AdamW and Muon", __doc__), *report(points)]
    _bench.publish(results, "scaling_law", Finished, _flat(points), page, picture(points))


Points = dict[str, list[list[Finished]]]
"""The runs of each size at an optimizer's best numbers, by optimizer; seeds inside."""


def _flat(points: Points) -> list[Finished]:
    return [row for sizes in points.values() for rows in sizes for row in rows]


def report(points: Points) -> list[str]:
    """The lines of the page: every size, the fits, the ratios."""
    sizes = _table.markdown(
        (
            *("model", "optimizer", "parameters", "steps", "batch", "lr", "decay"),
            *("FLOPs", "seconds", "held-out loss", "range of seeds"),
        ),
        (_row(rows) for place in range(len(points["adamw"])) for rows in _at(points, place)),
    )
    return [*sizes, "", *_fit_lines(points), ""]


def _at(points: Points, place: int) -> Iterator[list[Finished]]:
    return (sizes[place] for sizes in points.values() if place < len(sizes))


def _row(rows: list[Finished]) -> tuple[object, ...]:
    one, losses = rows[0], [row.val_loss for row in rows]
    return (
        *(one.model, REGISTRY[one.optimizer].title, f"{one.parameters:,}", f"{one.steps:,}"),
        *(one.batch, f"{one.lr:g}", f"{one.weight_decay:g}", f"{one.flops:.3g}"),
        f"{_fits.mean([row.seconds for row in rows]):.0f}",
        f"{_fits.mean(losses):.4f}",
        f"{max(losses) - min(losses):.4f}",
    )


def _fit_lines(points: Points) -> Iterator[str]:
    """The fits beside the paper's, and the ratios, once there are three sizes."""
    if min(map(len, points.values())) < 3:
        yield "Fits and ratios need three sizes; the runs of the larger ones are still to come."
        return
    curves = {name: _curve(sizes) for name, sizes in points.items()}
    rows = []
    for name, curve in curves.items():
        a, b = PAPER.get(name, (float("nan"),) * 2)
        fit, offset = curve.power_law(), curve.power_law(irreducible=True)
        paper = f"{a:g} C^-{b:g}" if name in PAPER else "-"
        rows.append((REGISTRY[name].title, fit, offset, paper))
    heads = ("optimizer", "L = a C^-b", "L = e + a C^-b", "paper, C in PFLOP/s-days")
    yield from _table.markdown(heads, rows)
    yield ""
    ratios = [
        (
            REGISTRY[name].title,
            model,
            *(str(_fits.ratio(curves["adamw"], curves[name], place, of)) for of in COSTS),
        )
        for name in OPTIMIZERS[1:]
        for place, model in enumerate(row[0].model for row in points[name])
    ]
    heads = ("optimizer", "at the loss of", *COSTS.values())
    yield from _table.markdown(heads, ratios)
    yield ""
    yield "Ratios are medians [5%, 95%] of the resamples. The paper's ratio of 6ND is 0.52."


def _curve(sizes: list[list[Finished]]) -> _fits.Curve:
    return _fits.Curve(
        flops=tuple(rows[0].flops for rows in sizes),
        model_flops=tuple(rows[0].model_flops for rows in sizes),
        seconds=tuple(_fits.mean([row.seconds for row in rows]) for rows in sizes),
        losses=tuple(tuple(row.val_loss for row in rows) for rows in sizes),
    )


def picture(points: Points) -> matplotlib.figure.Figure:
    """Loss over FLOPs: a dot for each seed, and the fits."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="FLOPs", ylabel="held-out loss, nats per byte"
    )
    for (name, sizes), marker in zip(points.items(), "os^", strict=True):
        dots = [(row.flops, row.val_loss) for rows in sizes for row in rows]
        if not dots:
            continue
        row = REGISTRY[name]
        axes.plot(*zip(*dots, strict=True), marker, color=row.color, label=row.title)
        if len(sizes) >= 3:
            curve = _curve(sizes)
            axes.plot(curve.flops, curve.power_law()(curve.flops), color=row.color, linewidth=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
