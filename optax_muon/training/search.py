"""The search for the best numbers of a run: one number after the other, in factors of two.

A search is a function of the losses that are known, and names the runs that it still needs. So runs
can be done in any order and by several processes, and a search that was stopped goes on.

`tune` repeats the best run with seeds that the search has not seen, so that no run that was chosen
for its luck is compared.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

FACTOR = 2.0
"""Ratio of neighbouring numbers."""

Run = TypeVar("Run")
"""A frozen dataclass whose fields are what a run is given."""


def search(losses: Mapping[Run, float], start: Run, names: Sequence[str]) -> tuple[list[Run], Run]:
    """Search one number after the other until the best is inside.

    Args:
        losses: The loss of every run so far; NaN if it diverged.
        start: Where the search begins.
        names: Fields of the runs, in the order in which they are searched; one may come twice.
            Whole numbers stay whole.

    Returns:
        The runs to do next, none when the search is over, and the best run so far.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Rate:
    ...     lr: float
    >>> search({}, Rate(1.0), ["lr"])
    ([Rate(lr=1.0), Rate(lr=0.5), Rate(lr=2.0)], Rate(lr=1.0))
    >>> losses = {Rate(1.0): 3.0, Rate(0.5): 4.0, Rate(2.0): 2.0}
    >>> search(losses, Rate(1.0), ["lr"])
    ([Rate(lr=4.0)], Rate(lr=2.0))
    >>> search({**losses, Rate(4.0): 5.0}, Rate(1.0), ["lr"])
    ([], Rate(lr=2.0))
    """
    best = start
    for name in names:
        missing, best = _bracket(losses, start, best, name)
        if missing:
            return missing, best
    return [], best


def tune(
    losses: Mapping[Run, float],
    start: Run,
    names: Sequence[str],
    seeds: Sequence[int],
    search_seeds: Sequence[int] | None = None,
) -> tuple[list[Run], list[Run]]:
    """Search, then repeat the best run with other seeds.

    Args:
        losses: As `search` takes it.
        start: As `search` takes it; has a field `seed`.
        names: As `search` takes it.
        seeds: Seeds of the repetitions, without those of the search.
        search_seeds: Seeds of the search, whose mean loss it compares; the one of `start` by
            default. One is enough where runs differ more by their numbers than by their seeds.

    Returns:
        The runs to do next, and the repetitions once all of them are done. One of them is empty.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Rate:
    ...     lr: float
    ...     seed: int = 0
    >>> losses = {Rate(1.0): 2.0, Rate(0.5): 3.0, Rate(2.0): 4.0, Rate(1.0, 1): 2.5}
    >>> tune(losses, Rate(1.0), ["lr"], seeds=[1, 2])
    ([Rate(lr=1.0, seed=2)], [])
    >>> tune({**losses, Rate(1.0, 2): 2.4}, Rate(1.0), ["lr"], seeds=[1, 2])
    ([], [Rate(lr=1.0, seed=1), Rate(lr=1.0, seed=2)])
    """
    searched = [cast(Any, start).seed] if search_seeds is None else search_seeds
    means: dict[Run, float] = {}
    for run in losses:
        repeats = _with_seeds(run, searched)
        if run == repeats[0] and all(each in losses for each in repeats):
            means[run] = statistics.fmean(losses[each] for each in repeats)
    missing, best = search(means, _with_seeds(start, searched)[0], names)
    if missing:
        wanted = [each for run in missing for each in _with_seeds(run, searched)]
        return [run for run in wanted if run not in losses], []
    repeats = _with_seeds(best, seeds)
    missing = [run for run in repeats if run not in losses]
    return missing, [] if missing else repeats


def _with_seeds(run: Any, seeds: Sequence[int]) -> list[Any]:
    """The run with each of the seeds."""
    return [dataclasses.replace(run, seed=seed) for seed in seeds]


def _bracket(
    losses: Mapping[Run, float], start: Run, best: Run, name: str
) -> tuple[list[Run], Run]:
    """Both neighbours of the best value of one field, and on from there."""
    while True:
        around = [best, *neighbours(start, best, name)]
        if missing := [run for run in around if run not in losses]:
            return missing, best
        lowest = min(around, key=lambda run: _finite(losses[run]))
        if lowest == best:
            return [], best
        best = lowest


def neighbours(start: Run, run: Run, name: str) -> list[Run]:
    """Return the runs with half and with twice the value of a field.

    Values are powers of two of that of `start`, to three digits, as in tables: halved and doubled
    again, a value is the same.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Rate:
    ...     lr: float
    >>> neighbours(Rate(2.35e-3), Rate(1.18e-3), "lr")
    [Rate(lr=0.000588), Rate(lr=0.00235)]
    """
    origin, value = getattr(start, name), getattr(run, name)
    power = round(math.log2(value / origin)) if origin else 0

    def at(power: int) -> Any:
        moved = origin * FACTOR**power
        if isinstance(origin, int):
            moved = max(1, round(moved))
        elif power:
            moved = float(f"{moved:.3g}")
        return dataclasses.replace(cast(Any, run), **{name: moved})

    return [at(power - 1), at(power + 1)]


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
