"""What the benchmarks share: options, interleaved measurements, and pages of results.

In every round, the implementations of a case run one after the other in one process, so whatever
slows the machine slows all of them. The ratio of two implementations is the median of their ratios
within single rounds. A time is that of one call, including the wait for its result, after a warm-up
call; compilation is never part of it.
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

from optax_muon.cli.reports import pictures
from optax_muon.training import styles

HERE = Path(__file__).parent
MIN_SECONDS = 0.02
"""The shortest measurement; shorter calls are repeated within it."""
MAX_SECONDS = 20.0
"""The longest that the rounds of a case may take, unless that leaves fewer than `MIN_ROUNDS`."""
MIN_ROUNDS = 3
"""The fewest rounds of a case."""
PAUSE = 0.005
"""Seconds between implementations, in which the threads of one library stop spinning."""

Case = TypeVar("Case")
Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that every benchmark has."""

    only: tuple[str, ...] = ()
    """Measure the cases whose names contain one of these; other rows of the table stay."""
    repeats: int = 9
    """Rounds of a case; long cases have fewer."""
    quick: bool = False
    """Check in toy sizes that the script works; the results go to runs/bench."""
    out: Path | None = None
    """Folder for the results; benchmarks/results by default."""

    @property
    def folder(self) -> Path:
        """Folder for the results."""
        default = HERE.parent / "runs" / "bench" if self.quick else HERE / "results"
        return self.out or default

    def picks(self, case: str) -> bool:
        """Whether to measure a case."""
        return not self.only or any(part in case for part in self.only)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call, round by round."""

    seconds: tuple[float, ...]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile, seconds."""
        if len(self.seconds) == 1:
            return self.seconds * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    def over(self, other: Times) -> float:
        """Median, over the rounds, of the ratio to another implementation of the same case."""
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
    rounds: int
    """Number of measurements."""


Implementation = Callable[[], Any]
"""Does the work once and returns the arrays to wait for."""


def measure_in_rounds(
    implementations: Mapping[str, Implementation], repeats: int, longest: float = MAX_SECONDS
) -> dict[str, Times]:
    """Time compiled implementations, all of them once in every round."""
    guess = {name: _seconds(run, 1) for name, run in implementations.items()}
    calls = {name: max(1, math.ceil(MIN_SECONDS / guess[name])) for name in implementations}
    one_round = sum(guess[name] * calls[name] for name in implementations)
    rounds = min(repeats, max(MIN_ROUNDS, int(longest / one_round)))
    taken: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(rounds):
        for name, run in implementations.items():
            time.sleep(PAUSE)
            taken[name].append(_seconds(run, calls[name]))
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}


def _seconds(run: Implementation, calls: int) -> float:
    """Mean seconds of a call. On CPU, calls that nobody waits for would overlap."""
    wait = jax.default_backend() == "cpu"
    start = time.perf_counter()
    for _ in range(calls):
        done = run()
        if wait:
            jax.block_until_ready(done)
    jax.block_until_ready(done)
    return (time.perf_counter() - start) / calls


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; NaN if there are no values."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan


def each(cases: Sequence[Case], title: str) -> Iterable[Case]:
    """The cases, with a progress bar."""
    return track(cases, description=title, console=Console(stderr=True))


def merged(path: Path, kind: type[Row], rows: Sequence[Row], cases: Sequence[str]) -> list[Row]:
    """The new rows and those of other cases from the file, in the order of the cases."""
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
    """Measure the picked cases and write the results.

    Args:
        options: Which cases to measure, and where the results go.
        name: Name of the files.
        kind: The dataclass of the rows.
        cases: All cases; `str(case)` is the name in its rows.
        measure: Makes the rows of a case.
        page: Makes the lines of the Markdown page.
        picture: Makes the figure.
        finish: Completes rows that depend on other rows, once all are known.
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
    """Write `name`.csv, .md, .png and .svg; the page ends with the figure and the machine."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    _table.write(folder / f"{name}.csv", kind, rows)
    pictures.save(figure, folder / f"{name}.png")
    lines = [*page, "", f"![{pictures.alt(figure)}]({name}.png)", "", machine()]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print("\n".join(lines))
    console.print(f"Written to {folder / name}.csv, .md, .png and .svg")


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """The rows of each case by implementation, in their order."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.implementation] = row
    return found


def page_head(title: str, description: str | None) -> list[str]:
    """The title of a page and its script's description, without first line and command."""
    text = (description or "").partition("\n\n")[2].partition("\n\n    python")[0]
    return [f"# {title}", "", text, ""]


def machine() -> str:
    """The processor or accelerator, the number of cores, and the versions."""
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
    """The name of the processor, from Linux if it has one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def ratios(
    cases: Sequence[str], series: Mapping[str, Mapping[str, float]], title: str, label: str
) -> matplotlib.figure.Figure:
    """A row for each case and a dot for each series, on a logarithmic axis with a line at 1."""
    figure = matplotlib.figure.Figure(
        figsize=(9, 1.6 + 0.3 * len(cases)), dpi=120, layout="constrained"
    )
    axes = figure.add_subplot(title=title, xlabel=label, xscale="log")
    places = {case: len(cases) - 1 - index for index, case in enumerate(cases)}
    for number, (name, values) in enumerate(series.items()):
        shown = [(value, places[case]) for case, value in values.items() if case in places]
        if shown:
            axes.plot(*zip(*shown, strict=True), **styles.nth(number).dots, label=name, alpha=0.8)
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
