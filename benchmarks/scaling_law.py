"""The paper's scaling law in small: loss over FLOPs for AdamW and for Muon, with intervals.

Llamas of several sizes learn the Python sources listed in benchmarks/corpus, byte by byte, with the
same number of tokens for each parameter. Every run goes to the end of its own schedule. Learning
rate and weight decay are searched for each optimizer, in factors of two until the best is inside,
and the batch for AdamW: all of them at the two smallest sizes, the learning rate alone above them,
from the numbers of the size below (arXiv 2502.16982, appendix B, does the same). Muon has AdamW's
batch. `Muon, AdamW lr` has all of AdamW's numbers, as in the paper's section 3.2; `Muon` has its
own rate and decay. Searches have seed 0; the runs that are reported repeat the best one with three
other seeds. FLOPs are those of all matrix products in the compiled step, the optimizer's included;
6ND, beside them, leaves those and the attention scores out, as the paper does. Seconds are those of
all steps on one core, without evaluations: the median step of rounds in which all programs run.

A fit in log space is least squares of L = a C^-b, and with Huber's loss of L = e + a C^-b. The
ratio is the FLOPs of Muon over those that AdamW's fit needs for the same loss. Its interval is of
1000 draws of the mean losses: their errors have Student's t distribution, and the variance between
seeds is pooled over the sizes.

    python benchmarks/scaling_law.py
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import _curves
import _experiment
import _models
import _runs
import _table
import tyro
from _curves import Points
from _experiment import Experiment, Results
from _runs import Finished, Run

from optax_muon.cli.reports import scaling
from optax_muon.models.spec import Config
from optax_muon.training import power_law
from optax_muon.training.optimizers import REGISTRY

SCALES = {"cpu": _models.MODELS, "gpu": _models.LARGE}
"""Ladders of models by the machine that they are for."""
SEARCHED_IN_FULL = 2
"""Sizes, the smallest, at which all three numbers are searched."""
ALL = {"adamw": ("lr", "batch", "weight_decay", "lr"), "muon": ("lr", "weight_decay", "lr")}
"""What is searched there, in this order."""
OPTIMIZERS = ("adamw", "muon-carried", "muon")
HEADLINE = {
    "model_flops": "6ND, the paper's measure",
    "flops": "all matmuls, Newton-Schulz included",
    "seconds": "time on one core of a CPU",
}
"""Costs that the README compares, with the titles of the columns."""
PAPER = {"adamw": (2.608, 0.054), "muon": (2.506, 0.052)}
"""a and b of L = a C^-b in table 3 of arXiv 2502.16982, C in PFLOP/s-days."""


@dataclasses.dataclass(frozen=True)
class Options(_experiment.Options):
    """Options of the experiment."""

    scale: Literal["cpu", "gpu"] = "cpu"
    """Sizes for two cores of a CPU, or for an accelerator."""
    sizes: int = 5
    """Sizes of the ladder to train, from the smallest."""
    tokens_per_parameter: float = 20.0
    """Training tokens over the parameters that multiply them."""

    @property
    def models(self) -> Mapping[str, Config]:
        """The models of the ladder."""
        models = _models.TOY if self.quick else SCALES[self.scale]
        return dict([*models.items()][: self.sizes])

    @property
    def name(self) -> str:
        """Name of the folder and of the files."""
        other = self.tokens_per_parameter != Options.tokens_per_parameter
        parts = (f"{self.tokens_per_parameter:g}" if other else "", self.scale.removeprefix("cpu"))
        return "_".join(("scaling_law", *filter(None, parts)))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which runs the experiment needs, and which of them it reports."""

    models: Sequence[str]
    """Names of the models, the smallest first."""
    tokens_per_parameter: float

    @classmethod
    def of(cls, options: Options) -> Protocol:
        """That of the options."""
        return cls([*options.models], 1.0 if options.quick else options.tokens_per_parameter)

    def needed(self, finished: Sequence[Finished]) -> Iterator[Run]:
        """The searches, each from where the one below it ended, and the seeds of their best."""
        for size in self._sizes(finished):
            yield from size.needed

    def points(self, finished: Sequence[Finished]) -> Points[Finished]:
        """The best runs of each size, by optimizer."""
        sizes = self._sizes(finished)
        return {
            name: [size.best[name] for size in sizes if size.best.get(name)] for name in OPTIMIZERS
        }

    def _sizes(self, finished: Sequence[Finished]) -> list[Size]:
        """The sizes up to the first one at which AdamW's search is not finished."""
        sizes: list[Size] = []
        below: Best = {}
        for place, model in enumerate(self.models):
            full = place < SEARCHED_IN_FULL
            first = Run(model, "adamw", self.tokens_per_parameter, 8, 1.2e-2, 0.1)
            start = _at(below["adamw"][0], model, "adamw") if below else first
            searched = ALL["adamw"] if full else ("lr",)
            needed, adamw = _runs.tuned(finished, start, searched)
            best: Best = {"adamw": adamw}
            sizes.append(Size(needed, best))
            if not adamw:
                break
            carried = _at(adamw[0], model, "muon-carried").repeats
            start = _at(adamw[0], model, "muon")
            if below.get("muon"):
                muon = below["muon"][0]
                start = dataclasses.replace(start, lr=muon.lr, weight_decay=muon.weight_decay)
            searched = ALL["muon"] if full else ("lr",)
            needed += carried
            if not below or below.get("muon"):  # else its search would start elsewhere
                missing, best["muon"] = _runs.tuned(finished, start, searched)
                needed += missing
            best["muon-carried"] = _runs.found(finished, carried)
            below = best
        return sizes


Best = dict[str, list[Finished]]
"""The runs at each optimizer's best numbers, one for each seed; none before all are finished."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What the experiment needs at a size."""

    needed: list[Run]
    """The runs to do, finished ones among them."""
    best: Best
    """The runs that are reported, as far as they are finished."""


def _at(row: Finished, model: str, name: str) -> Run:
    """The numbers of a row for another size and optimizer, with the seed of searches."""
    return dataclasses.replace(row.run, model=model, optimizer=name, seed=0)


def experiment(options: Options) -> Experiment:
    """The experiment."""
    ratio, protocol = options.tokens_per_parameter, Protocol.of(options)

    def points(results: Results) -> Points[Finished]:
        return protocol.points(results.finished)

    def curves(results: Results) -> dict[str, power_law.Curve]:
        return {name: _curves.curve(sizes, results) for name, sizes in points(results).items()}

    return Experiment(
        options.name,
        f"Loss over FLOPs, AdamW and Muon, {ratio:g} tokens per parameter",
        __doc__,
        options.models,
        protocol.needed,
        lambda results: report(points(results), results),
        lambda results: scaling.figure(curves(results)),
        lambda results: summary(points(results), results),
        lambda results: (rows[0] for sizes in points(results).values() for rows in sizes),
    )


def report(points: Points[Finished], results: Results) -> Iterator[str]:
    """The lines of the page: every size, the fits, the ratios."""
    yield from _table.markdown(
        (
            *("model", "optimizer", "parameters", "steps", "batch", "lr", "decay"),
            *("FLOPs", "seconds", "held-out loss", "range of seeds"),
        ),
        (
            _row(rows, results)
            for model in dict.fromkeys(rows[0].model for rows in points["adamw"])
            for sizes in points.values()
            for rows in sizes
            if rows[0].model == model
        ),
    )
    yield ""
    yield from _fit_lines(points, results)


def _row(rows: list[Finished], results: Results) -> tuple[object, ...]:
    one, losses = rows[0], _runs.losses(rows)
    seconds = results.seconds(one)
    return (
        *(one.model, REGISTRY[one.optimizer].title, f"{one.parameters:,}", f"{one.steps:,}"),
        *(one.batch, f"{one.lr:g}", f"{one.weight_decay:g}", f"{one.flops:.3g}"),
        _experiment.measured(seconds, ".0f"),
        f"{statistics.fmean(losses):.4f}",
        f"{max(losses) - min(losses):.4f}",
    )


def _fit_lines(points: Points[Finished], results: Results) -> Iterator[str]:
    """The fits beside the paper's, and the ratios, once there are three sizes."""
    curves = _curves.fitted(points, results)
    if len(curves) < 2:
        yield f"Fits and ratios need {power_law.FITTED} sizes; the larger ones are still to come."
        return
    rows = []
    for name, curve in curves.items():
        a, b = PAPER.get(name, (float("nan"),) * 2)
        fit, offset = curve.power_law("flops"), curve.power_law("flops", irreducible=True)
        paper = f"{a:g} C^-{b:g}" if name in PAPER else "-"
        rows.append((REGISTRY[name].title, fit, offset, paper))
    heads = ("optimizer", "L = a C^-b", "L = e + a C^-b", "paper, C in PFLOP/s-days")
    yield from _table.markdown(heads, rows)
    yield ""
    yield from _curves.ratios(points, results)
    yield ""
    yield f"{_curves.RATIOS} The paper's ratio of 6ND is 0.52."


def headline(options: Options) -> Iterator[str]:
    """The ratios at the largest size as a table, and what was trained, in Markdown."""
    results = _experiment.load(options, experiment(options))
    points = Protocol.of(options).points(results.finished)
    first, last = points["adamw"][0][0], points["adamw"][-1][0]
    yield (
        f"Llamas of {first.parameters:,} to {last.parameters:,} parameters were trained on "
        f"{last.tokens_per_parameter:g} tokens per parameter, each run to the end of its schedule. "
        "The learning rate is tuned for both optimizers at every size, weight decay at the two "
        "smallest, and the batch for AdamW. For the loss that it reaches at the largest size, Muon "
        "needs this fraction of the FLOPs and of the time that AdamW needs (three seeds; in "
        "brackets the range that holds 90 %):"
    )
    yield ""
    rows = (
        (title, *(_ratio(points, results, name, of) or "" for of in HEADLINE))
        for title, name in (("tuned", "muon"), ("with AdamW's numbers", "muon-carried"))
    )
    yield from _table.markdown(("Muon", *HEADLINE.values()), rows)


def _ratio(
    points: Points[Finished], results: Results, name: str, of: str
) -> power_law.Interval | None:
    """What an optimizer's largest size costs over AdamW's fit; None before that is known."""
    curves = _curves.fitted(points, results)
    if set(curves) != set(OPTIMIZERS) or not _curves.is_measured(curves, of):
        return None
    return power_law.ratio(curves["adamw"], curves[name], len(points[name]) - 1, of)


def summary(points: Points[Finished], results: Results) -> str:
    """The ratios at the largest size."""
    ratio = functools.partial(_ratio, points, results)
    if ratio("muon", "flops") is None:
        return ""
    rows = points["muon"]
    first, last = rows[0][0], rows[-1][0]
    return (
        f"at {last.parameters:,} parameters {ratio('muon', 'model_flops')} of AdamW's FLOPs as "
        f"6ND, the paper's measure, with its own rate, {ratio('muon-carried', 'model_flops')} with "
        f"AdamW's numbers; {ratio('muon', 'flops')} and {ratio('muon-carried', 'flops')} of all "
        f"FLOPs, Newton-Schulz included{_in_time(ratio('muon', 'seconds'))}; {len(rows)} sizes "
        f"from {first.flops:.1g} to {last.flops:.1g} FLOPs, {last.tokens_per_parameter:g} tokens "
        "per parameter, 3 seeds"
    )


def _in_time(ratio: power_law.Interval | None) -> str:
    return f"; {ratio} of the time on one core" if ratio else ""


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    _experiment.run(chosen, experiment(chosen))
