"""Everything that one might change about Muon, on one baseline, with paired seeds.

A Llama learns the Python sources listed in benchmarks/corpus, 20 bytes for each parameter, with
every variant. Batch and weight decay are those that the scaling law found for AdamW at this size;
the learning rate is searched for each variant, in factors of two until the best is inside, by the
mean loss of four seeds: with one seed, neighbouring rates change places, and the difference between
them is as large as that between many variants. The seeds are the same for all: they decide the
initial parameters and the order of the data. A difference is that to the first row with the same
seed, with its 95 % interval by Student's t; it is called a gain or a loss only where that interval
leaves out zero. With so many rows, one in twenty does so by chance; so what gains is repeated with
four more seeds, which have chosen neither the rate nor the row. FLOPs and seconds are over those of
the first row; FLOPs are those of matrix products, and the singular value decomposition of the exact
polar factor has none.

    python benchmarks/variants.py
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

from optax_muon.training.statistics import Difference

BASE = Run("48 x 2", "muon", 20.0, batch=4, lr=6e-3, weight_decay=0.1)
"""Muon at the numbers that the scaling law found for AdamW."""
SEARCH_SEEDS = (0, 1, 2, 3)
"""Seeds of the search, and of the runs that the rows compare."""
FRESH_SEEDS = (4, 5, 6, 7)
"""Seeds of the runs that repeat what gains."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A row of the table."""

    title: str
    """Its name."""
    start: Run
    """Where its search begins."""
    searched: Sequence[str] = ("lr",)
    """The numbers that are searched."""

    def needed(self, finished: Sequence[Finished]) -> list[Run]:
        """The runs to do next."""
        return self._tuned(finished)[0]

    def best(self, finished: Sequence[Finished]) -> list[Finished]:
        """Its best runs, one for each seed."""
        return self._tuned(finished)[1]

    def repeats(self, finished: Sequence[Finished]) -> list[Run]:
        """Its best run with each of the fresh seeds; none before the search is over."""
        best = [row.run for row in self.best(finished)[:1]]
        return [dataclasses.replace(run, seed=seed) for run in best for seed in FRESH_SEEDS]

    def _tuned(self, finished: Sequence[Finished]) -> tuple[list[Run], list[Finished]]:
        return _runs.tuned(finished, self.start, self.searched, SEARCH_SEEDS, SEARCH_SEEDS)


SECTIONS = {
    "Baseline": ("muon",),
    "Scale of the update": (
        *("muon-update-norm", "muon-fixed-scale", "muon-keller-scale", "muon-spectral-scale"),
    ),
    "Orthogonalization": (
        *("muon-1-step", "muon-2-steps", "muon-3-steps", "muon-7-steps", "muon-10-steps"),
        *("muon-you", "muon-polar-express", "muon-deepseek-v4", "muon-exact", "muon-per-head"),
    ),
    "Momentum": ("muon-plain-momentum", "muon-beta-0.9", "muon-two-momenta"),
    "Decay": ("muon-no-decay", "muon-cautious-decay"),
    "After the orthogonalization": ("normuon",),
    "Other optimizers": ("adamw", "lion", "soap", "contrib-muon"),
}
"""Names of optimizers, by what they change."""
APART = "Muon, AdamW's rate apart"
"""The arm whose embedding, head and norms have a learning rate of their own."""


def arms(base: Run) -> dict[str, list[Arm]]:
    """The rows, by section."""
    sections = {
        section: [
            Arm(SPECS[name].title, dataclasses.replace(base, optimizer=name)) for name in names
        ]
        for section, names in SECTIONS.items()
    }
    apart = dataclasses.replace(base, adamw_lr=base.lr)
    sections["Learning rates"] = [Arm(APART, apart, ("adamw_lr", "lr"))]
    return sections


def experiment(options: Options) -> Experiment:
    """The experiment."""
    base = BASE
    if options.quick:
        base = dataclasses.replace(base, model="16 x 1", tokens_per_parameter=1.0)
    sections = arms(base)
    every = [arm for section in sections.values() for arm in section]

    def needed(finished: Sequence[Finished]) -> Iterator[Run]:
        for arm in every:
            yield from arm.needed(finished)
        for arm in (every[0], *gains(every, finished)):
            yield from arm.repeats(finished)

    def timed(results: Results) -> Iterator[Finished]:
        for arm in every:
            yield from arm.best(results.finished)[:1]

    return Experiment(
        "variants",
        "Variants of Muon on one tuned baseline",
        __doc__,
        options.models,
        needed,
        lambda results: report(sections, results),
        lambda results: picture(every, results),
        lambda results: summary(every, results),
        timed,
    )


def differences(every: Sequence[Arm], finished: Sequence[Finished]) -> dict[Arm, Difference]:
    """What is known of the other rows against the first one."""
    baseline = every[0].best(finished)
    return {
        arm: _runs.paired(rows, baseline)
        for arm in every[1:]
        if baseline and (rows := arm.best(finished))
    }


def gains(every: Sequence[Arm], finished: Sequence[Finished]) -> list[Arm]:
    """The rows that are clearly better than the first one."""
    changes = differences(every, finished)
    return [arm for arm, change in changes.items() if change.is_clear and change.mean < 0]


def report(sections: dict[str, list[Arm]], results: Results) -> Iterator[str]:
    """A table for each section."""
    baseline = sections["Baseline"][0].best(results.finished)
    if not baseline:
        yield "The baseline is not finished yet."
        return
    heads = ("variant", "lr", "held-out loss", "difference", "", "FLOPs", "seconds")
    for section, every in sections.items():
        rows = [
            _row(arm, found, baseline, results)
            for arm in every
            if (found := arm.best(results.finished))
        ]
        if rows:
            yield from (f"## {section}", "", *_table.markdown(heads, rows), "")
    yield from _confirmation([arm for each in sections.values() for arm in each], results)
    missing = [
        arm.title for every in sections.values() for arm in every if not arm.best(results.finished)
    ]
    if missing:
        yield f"Still to come: {'; '.join(missing)}."


def differences_repeated(
    every: Sequence[Arm], finished: Sequence[Finished]
) -> dict[Arm, Difference]:
    """What is left of the gains with fresh seeds, of those that are repeated."""
    baseline = _runs.found(finished, every[0].repeats(finished))
    return {
        arm: _runs.paired(rows, baseline)
        for arm in gains(every, finished)
        if baseline and (rows := _runs.found(finished, arm.repeats(finished)))
    }


def _confirmation(every: Sequence[Arm], results: Results) -> Iterator[str]:
    """The lines about what is left of the gains."""
    if changes := differences_repeated(every, results.finished):
        yield from ("## What gains, with four fresh seeds", "")
        rows = ((arm.title, change, _verdict(change)) for arm, change in changes.items())
        yield from (*_table.markdown(("variant", "difference", ""), rows), "")


def summary(every: Sequence[Arm], results: Results) -> str:
    """Which variants differ from Muon, and how many do not."""
    changes = differences(every, results.finished)
    if not changes:
        return ""
    repeated = differences_repeated(every, results.finished)
    fresh = {arm: f", with fresh seeds {change}" for arm, change in repeated.items()}
    clear = {arm: change for arm, change in changes.items() if change.is_clear}
    better, worse = (
        [
            f"{arm.title} {change}{fresh.get(arm, '')}"
            for arm, change in clear.items()
            if (change.mean < 0) is gain
        ]
        for gain in (True, False)
    )
    return (
        f"better: {'; '.join(better) or 'none'}. Worse: {'; '.join(worse) or 'none'}. "
        f"Within the interval: {len(changes) - len(clear)} of {len(changes)}"
    )


def _row(
    arm: Arm, rows: list[Finished], baseline: list[Finished], results: Results
) -> tuple[object, ...]:
    one, first = rows[0], baseline[0]
    numbers = f"{one.lr:g}" + (f", AdamW's {one.adamw_lr:g}" if one.adamw_lr else "")
    change = _runs.paired(rows, baseline)
    seconds = results.seconds(one) / results.seconds(first)
    return (
        *(arm.title, numbers, f"{statistics.fmean(_runs.losses(rows)):.4f}"),
        *(("", "") if rows == baseline else (change, _verdict(change))),
        *(f"{one.flops / first.flops:.3f}", _experiment.measured(seconds, ".2f")),
    )


def _verdict(change: Difference) -> str:
    """What an interval says."""
    if not change.is_clear:
        return "within the interval"
    return "loss" if change.mean > 0 else "gain"


def picture(every: Sequence[Arm], results: Results) -> matplotlib.figure.Figure:
    """The differences to the baseline, with their intervals."""
    shown = [(arm.title, rows) for arm in every if (rows := arm.best(results.finished))]
    figure = matplotlib.figure.Figure(
        figsize=(7, 1.2 + 0.24 * len(shown)), dpi=150, layout="constrained"
    )
    axes = figure.add_subplot(xlabel="held-out loss over Muon's, nats per byte")
    places = range(len(shown) - 1, -1, -1)
    for place, (_, rows) in zip(places, shown[1:], strict=False):
        change = _runs.paired(rows, shown[0][1])
        filled = "full" if change.is_clear else "none"
        axes.errorbar(
            change.mean,
            place - 1,
            xerr=change.half,
            fmt="o",
            color=SPECS["muon"].style.color,
            fillstyle=filled,
        )
    axes.axvline(0, color="#6b7280", linewidth=1)
    axes.set_yticks(range(len(shown) - 2, -1, -1), [title for title, _ in shown[1:]], fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    _experiment.run(chosen, experiment(chosen))
