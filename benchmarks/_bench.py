"""What the benchmarks share: options, implementations measured in turn, and pages of results.

Implementations of a case run one after the other, turn by turn in one process, so that whatever
slows the machine slows all of them. Their ratio is the median of the ratios of single turns. A time
is that of one call, waited for, after a call that warms up; compilation is never part of it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import _table
import jax
import matplotlib.figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parent
SHORTEST = 0.02
"""Seconds that a measurement takes at least; short calls are repeated in it."""
LONGEST = 20.0
"""Seconds that the turns of a case take at most, unless there would be fewer than `LEAST`."""
LEAST = 3
"""Turns of a case, however long."""
PAUSE = 0.005
"""Seconds between implementations, for the threads of one library to stop spinning."""

Case = TypeVar("Case")
Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that every benchmark has."""

    only: tuple[str, ...] = ()
    """Cases to measure, by parts of their names; the others stay in the table as they stand."""
    repeats: int = 9
    """Turns of a case; long cases have fewer."""
    quick: bool = False
    """Toy sizes, written to runs/bench: whether the script works, not how fast anything is."""
    out: Path | None = None
    """Folder of the results; benchmarks/results if not given."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        usual = HERE.parent / "runs" / "bench" if self.quick else HERE / "results"
        return self.out or usual

    def picks(self, case: str) -> bool:
        """Whether a case is to be measured."""
        return not self.only or any(part in case for part in self.only)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call, turn by turn."""

    seconds: tuple[float, ...]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile, seconds."""
        if len(self.seconds) == 1:
            return self.seconds * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    def over(self, other: Times) -> float:
        """Median ratio to another implementation of the same turns."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def milliseconds(self) -> dict[str, float]:
        """The quartiles as fields of a row."""
        names = ("lower_ms", "median_ms", "upper_ms")
        return {
            name: round(1e3 * value, 4) for name, value in zip(names, self.quartiles, strict=True)
        }


@dataclasses.dataclass(frozen=True)
class TimedRow:
    """One implementation on one case: the fields that every timed table begins with."""

    case: str
    """The case, as it is printed."""
    implementation: str
    """What was timed."""
    lower_ms: float
    """Lower quartile, milliseconds."""
    median_ms: float
    """Median, milliseconds."""
    upper_ms: float
    """Upper quartile, milliseconds."""
    turns: int
    """How many measurements."""


Implementation = Callable[[], Any]
"""Does the work once, and returns what to wait for."""


def in_turn(
    implementations: Mapping[str, Implementation], repeats: int, longest: float = LONGEST
) -> dict[str, Times]:
    """Measure implementations that are compiled, in turn."""
    guess = {name: _seconds(run, 1) for name, run in implementations.items()}
    calls = {name: max(1, math.ceil(SHORTEST / guess[name])) for name in implementations}
    turn = sum(guess[name] * calls[name] for name in implementations)
    turns = min(repeats, max(LEAST, int(longest / turn)))
    taken: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(turns):
        for name, run in implementations.items():
            time.sleep(PAUSE)
            taken[name].append(_seconds(run, calls[name]))
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}


def _seconds(run: Implementation, calls: int) -> float:
    """Seconds of one of some calls. A CPU would run calls that do not wait side by side."""
    wait = jax.default_backend() == "cpu"
    start = time.perf_counter()
    for _ in range(calls):
        done = run()
        if wait:
            jax.block_until_ready(done)
    jax.block_until_ready(done)
    return (time.perf_counter() - start) / calls


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; not a number where there are no values."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan


def each(cases: Sequence[Case], title: str) -> Iterable[Case]:
    """The cases, with a bar of progress."""
    return track(cases, description=title, console=Console(stderr=True))


def merged(path: Path, kind: type[Row], rows: Sequence[Row], cases: Sequence[str]) -> list[Row]:
    """The new rows and those of other cases that stand in the file, in the order of the cases."""
    new = {row.case for row in rows}
    kept = [row for row in _table.read(path, kind) if row.case in cases and row.case not in new]
    return sorted([*kept, *rows], key=lambda row: cases.index(row.case))


def run(
    options: Options,
    name: str,
    kind: type[Row],
    cases: Sequence[Case],
    measure: Callable[[Case], Iterable[Row]],
    page: Callable[[Sequence[Row]], Sequence[str]],
    picture: Callable[[Sequence[Row]], matplotlib.figure.Figure],
    finish: Callable[[Sequence[Row]], list[Row]] = list,
) -> None:
    """Measure the cases that are picked, and write the tables.

    Args:
        options: Which cases, and where the tables go.
        name: Name of the files.
        kind: The dataclass of the rows.
        cases: All of them; `str` names a case, in its rows too.
        measure: Makes the rows of a case.
        page: The lines of the table for people.
        picture: The figure of the same rows.
        finish: Completes rows that depend on others, once all of them are there.
    """
    picked = [case for case in cases if options.picks(str(case))]
    rows = [row for case in each(picked, name) for row in measure(case)]
    rows = finish(merged(options.folder / f"{name}.csv", kind, rows, [*map(str, cases)]))
    publish(options, name, kind, rows, page(rows), picture(rows))


def publish(
    options: Options,
    name: str,
    kind: type[Row],
    rows: Sequence[Row],
    page: Sequence[str],
    figure: matplotlib.figure.Figure,
) -> None:
    """Write `name`.csv, .md and .png; the page gets the picture and the machine at its end."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    _table.write(folder / f"{name}.csv", kind, rows)
    figure.savefig(folder / f"{name}.png")
    lines = [*page, "", f"![{name}]({name}.png)", "", machine()]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print("\n".join(lines))
    console.print(f"Written to {folder / name}.csv, .md and .png")


def about(description: str | None) -> str:
    """A script's description without its first line and without the command."""
    return (description or "").partition("\n\n")[2].partition("\n\n    python")[0]


def machine() -> str:
    """Processor, device, cores and versions."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("jax", "optax", "torch"))
    device = jax.devices()[0]
    where = _processor() if device.platform == "cpu" else device.device_kind
    return (
        f"Measured on {where}, {len(os.sched_getaffinity(0))} CPU cores, with "
        f"Python {platform.python_version()}, {versions}."
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor by its name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def ratios(
    cases: Sequence[str], series: Mapping[str, Mapping[str, float]], title: str, label: str
) -> matplotlib.figure.Figure:
    """A row per case, a dot per series, on a logarithmic axis with a line at 1."""
    figure = matplotlib.figure.Figure(
        figsize=(9, 1.6 + 0.3 * len(cases)), dpi=120, layout="constrained"
    )
    axes = figure.add_subplot(title=title, xlabel=label, xscale="log")
    places = {case: len(cases) - 1 - index for index, case in enumerate(cases)}
    for name, values in series.items():
        shown = [(value, places[case]) for case, value in values.items() if case in places]
        if shown:
            axes.plot(*zip(*shown, strict=True), "o", label=name, alpha=0.8)
    axes.axvline(1, color="#6b7280", linewidth=1)
    axes.set_yticks(list(places.values()), list(places), fontsize=8)
    low, high = axes.get_xlim()
    marks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
    axes.xaxis.set_major_locator(FixedLocator([mark for mark in marks if low <= mark <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
