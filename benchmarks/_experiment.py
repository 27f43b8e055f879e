"""What the experiments share: options, the runs that are still needed, and pages of results."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import _bench
import _models
import _runs
import _table
import matplotlib.figure
from _runs import Finished, Ladder

from optax_muon.models.spec import Config


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every experiment."""

    workers: int = 1
    """Worker processes; on CPUs one core each."""
    time: bool = False
    """Measure the time of the steps again; for a machine that does nothing else."""
    only_report: bool = False
    """Write the report of the finished runs, and train nothing."""
    quick: bool = False
    """Check in toy sizes that the script works; the results go to runs/bench."""
    out: Path | None = None
    """Folder for the results; benchmarks/results/NAME by default."""
    corpus: Path = Path("runs/corpus")
    """Folder of the text, which is downloaded to it once."""

    @property
    def models(self) -> Mapping[str, Config]:
        """The models by name."""
        return _models.TOY if self.quick else _models.MODELS

    def folder(self, name: str) -> Path:
        """The folder of an experiment's results."""
        default = _bench.HERE.parent / "runs" / "bench" if self.quick else _bench.HERE / "results"
        return self.out or default / name


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The time of a step of one program."""

    model: str
    """A key of the ladder."""
    optimizer: str
    """A key of `_variants.SPECS`."""
    batch: int
    """Sequences in a step."""
    seconds: float
    """Wall time of a step, seconds: the median of `ROUNDS`, in each of which all programs run."""


TIMES = "step_seconds.csv"
"""Name of the file of the times."""
ROUNDS = 15
"""Measurements of each step."""


@dataclasses.dataclass(frozen=True)
class Results:
    """All that an experiment has found so far."""

    finished: Sequence[Finished]
    """The runs."""
    times: Sequence[StepTime] = ()
    """The times of their steps, as far as they are measured."""

    def seconds(self, row: Finished) -> float:
        """Wall time of all steps of a run, seconds; NaN where it is not measured."""
        found = (t.seconds for t in self.times if _program(t) == _program(row))
        return row.steps * next(found, math.nan)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained, and how it is shown."""

    name: str
    """Name of the folder and of the files."""
    title: str
    """Title of the page."""
    description: str | None
    """The docstring of the script."""
    models: Mapping[str, Config]
    """The models by name."""
    needed: _runs.Needed
    """Which runs it needs."""
    report: Callable[[Results], Iterable[str]]
    """The lines of the page."""
    picture: Callable[[Results], matplotlib.figure.Figure]
    """The figure."""
    summary: Callable[[Results], str]
    """The outcome in a sentence, for `page.py`; empty before there is one."""
    timed: Callable[[Results], Iterable[Finished]] = lambda results: ()
    """The runs whose time is reported."""
    kind: type[Finished] = Finished
    """The rows of its table."""


def run(options: Options, experiment: Experiment) -> None:
    """Train what is missing, and write the report."""
    folder = options.folder(experiment.name)
    ladder = _ladder(options, experiment)
    if not options.only_report:
        ladder.complete(experiment.needed, options.workers)
    results = load(options, experiment)
    if options.time:
        results = dataclasses.replace(results, times=_step_times(ladder, experiment.timed(results)))
        _table.write(folder / TIMES, StepTime, results.times)
    head = _bench.page_head(experiment.title, experiment.description)
    page, figure = [*head, *experiment.report(results)], experiment.picture(results)
    written = _bench.Options(quick=options.quick, out=folder)
    _bench.publish(written, experiment.name, experiment.kind, results.finished, page, figure)


def load(options: Options, experiment: Experiment) -> Results:
    """What an experiment has found so far."""
    times = _table.read(options.folder(experiment.name) / TIMES, StepTime)
    return Results(_ladder(options, experiment).finished(), times)


def measured(value: float, form: str) -> str:
    """A number in a table; a dash where it is not measured."""
    return "-" if math.isnan(value) else format(value, form)


def _ladder(options: Options, experiment: Experiment) -> Ladder:
    table = options.folder(experiment.name) / f"{experiment.name}.csv"
    return Ladder(experiment.models, table, options.corpus, experiment.kind)


def _step_times(ladder: Ladder, rows: Iterable[Finished]) -> list[StepTime]:
    """The times of the steps of these runs."""
    programs = {_program(row): row.run for row in rows}
    times = ladder.step_seconds([*programs.values()], ROUNDS)
    return [
        StepTime(*program, round(statistics.median(seconds), 6))
        for program, seconds in zip(programs, times, strict=True)
    ]


def _program(of: StepTime | Finished) -> tuple[str, str, int]:
    """What decides how long a step takes."""
    return of.model, of.optimizer, of.batch
