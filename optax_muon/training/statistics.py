"""How far a mean of a few seeds can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import scipy.stats

CONFIDENCE = 0.95
"""Share of the intervals that hold the true mean."""


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the mean's 95% interval by Student's t; None of a single value.

    >>> f"{half_width([1.0, 2.0, 3.0]):.3f}"  # 4.303 / sqrt(3)
    '2.484'
    """
    if len(values) < 2:
        return None
    quantile = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def mean_with_interval(values: Sequence[float]) -> str:
    """The mean, and its interval if there are several values.

    >>> mean_with_interval([1.0, 2.0, 3.0]), mean_with_interval([1.5])
    ('2.0000 ± 2.4841', '1.5000')
    """
    half = half_width(values)
    return f"{statistics.fmean(values):.4f}" + ("" if half is None else f" ± {half:.4f}")
