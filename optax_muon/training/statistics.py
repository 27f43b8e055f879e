"""How far a mean of a few seeds can be trusted."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
"""Share of the intervals that hold the true mean."""


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the mean's 95% interval by Student's t; None of a single value.

    >>> f"{half_width([1.0, 2.0, 3.0]):.3f}"  # 4.303 / sqrt(3)
    '2.484'
    """
    if len(values) < 2:
        return None
    import scipy.special  # here, as every command imports this module

    quantile = float(scipy.special.stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def mean_with_interval(values: Sequence[float]) -> str:
    """The mean, and its interval if there are several values.

    >>> mean_with_interval([1.0, 2.0, 3.0]), mean_with_interval([1.5])
    ('2.0000 ± 2.4841', '1.5000')
    """
    half = half_width(values)
    return f"{statistics.fmean(values):.4f}" + ("" if half is None else f" ± {half:.4f}")


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and half of its 95 % interval by Student's t."""

    mean: float
    half: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def difference(mine: Sequence[float], theirs: Sequence[float]) -> Difference:
    """How far one list of losses is above another one with the same seeds.

    >>> print(difference([1.1, 1.3, 1.2], [1.0, 1.1, 1.1]))
    +0.1333 ± 0.1434
    """
    pairs = [one - other for one, other in zip(mine, theirs, strict=True)]
    half = half_width(pairs)
    return Difference(statistics.fmean(pairs), math.inf if half is None else half)
