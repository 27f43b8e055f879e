"""Scaling laws: power laws of loss over compute, and ratios of compute at equal loss.

Beside them the laws of what is best at a budget: how the sizes of the optimum grow with compute.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

FITTED = 3
"""Fewest sizes of a fit: two always lie on a power law."""
RESAMPLES = 1000
PFLOP_DAY = 1e15 * 86400.0
"""Operations in a PFLOP/s-day, the paper's unit of compute."""

mean = statistics.fmean


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """L = e + a C^-b, with C in PFLOP/s-days.

    >>> law = PowerLaw(2.608, 0.054)
    >>> float(law(PFLOP_DAY)), round(law.inverse(2.608) / PFLOP_DAY, 6)
    (2.608, 1.0)
    """

    a: float
    b: float
    e: float = 0.0

    def __call__(self, flops: Sequence[float] | float) -> np.ndarray:
        """The loss after this many operations."""
        return self.e + self.a * (np.asarray(flops) / PFLOP_DAY) ** -self.b

    def inverse(self, loss: float) -> float:
        """The operations until this loss; infinite at and below `e`."""
        excess = loss - self.e
        return PFLOP_DAY * (excess / self.a) ** (-1 / self.b) if excess > 0 else np.inf

    def __str__(self) -> str:
        start = f"{self.e:.3f} + " if self.e else ""
        return f"{start}{self.a:.3f} C^-{self.b:.4f}"


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one optimizer reached at each size, the smallest first."""

    costs: Mapping[str, tuple[float, ...]]
    """Costs of a run at each size, by what is counted: operations, seconds."""
    losses: tuple[tuple[float, ...], ...]
    """Losses of the seeds at each size."""

    def power_law(self, of: str, *, irreducible: bool = False) -> PowerLaw:
        """The fit of the mean losses over a cost."""
        return fit(self.costs[of], [mean(seeds) for seeds in self.losses], irreducible=irreducible)

    def resamples(self, random: np.random.Generator) -> np.ndarray:
        """Mean losses with errors, `[RESAMPLES, sizes]`; see `resampled_means`."""
        return resampled_means(self.losses, random)


def resampled_means(losses: Sequence[Sequence[float]], random: np.random.Generator) -> np.ndarray:
    """Draw what the mean losses of all sizes may be, given those of a few seeds.

    An error of a mean has Student's t distribution, and the variance between seeds is pooled over
    the sizes. Seeds drawn with replacement would say too little: of three seeds, nine tenths of
    such draws hold the true mean in 64 % of the cases.

    Args:
        losses: Losses of the seeds at each size.
        random: Draws the errors.

    Returns:
        Means, `[RESAMPLES, sizes]`; all the same where no size has two seeds.
    """
    freedom = sum(len(seeds) - 1 for seeds in losses)
    means = np.asarray([mean(seeds) for seeds in losses])
    if freedom == 0:
        return np.tile(means, (RESAMPLES, 1))
    squares = sum((len(seeds) - 1) * statistics.variance(seeds) for seeds in losses if seeds[1:])
    errors = np.sqrt(squares / freedom / np.asarray([len(seeds) for seeds in losses]))
    return means + errors * random.standard_t(freedom, size=(RESAMPLES, len(losses)))


def fit(flops: Sequence[float], losses: Sequence[float], *, irreducible: bool = False) -> PowerLaw:
    """Fit L = a C^-b by least squares in log space, or L = e + a C^-b, robustly (Huber)."""
    c, log_losses = np.log(np.asarray(flops) / PFLOP_DAY), np.log(losses)
    slope, intercept = np.polyfit(c, log_losses, 1)
    if not irreducible:
        return PowerLaw(float(np.exp(intercept)), float(-slope))
    import scipy.optimize  # here, as every command imports this module

    def residuals(x: np.ndarray) -> np.ndarray:
        e, log_a, b = x
        return np.log(e + np.exp(log_a - b * c)) - log_losses

    lowest = min(losses)
    bounds = [0, -np.inf, 0], [lowest, np.inf, np.inf]
    # Losses that rise would start at a negative exponent.
    start = np.clip((lowest / 2, intercept, -slope), *bounds)
    found = scipy.optimize.least_squares(
        residuals, start, bounds=bounds, loss="huber", f_scale=1e-3, x_scale=(1, 1, 0.1)
    )
    e, log_a, b = found.x
    return PowerLaw(float(np.exp(log_a)), float(b), float(e))


@dataclasses.dataclass(frozen=True)
class Interval:
    """The median of resamples, and the range that holds 90 % of them."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(baseline: Curve, other: Curve, place: int, of: str) -> Interval:
    """How much of the baseline's cost another optimizer needs for the loss that it has at a size.

    Args:
        baseline: The optimizer whose curve is fitted.
        other: The optimizer whose cost is compared.
        place: The size.
        of: The cost, a key of `costs`.
    """
    random = np.random.default_rng(0)
    slopes, intercepts = _line(baseline.costs[of], baseline.resamples(random).T)
    losses = other.resamples(random)[:, place]
    needed = np.exp((np.log(losses) - intercepts) / slopes)
    return interval(other.costs[of][place] / needed)


def interval(samples: Sequence[float] | np.ndarray) -> Interval:
    """The interval of resamples.

    >>> print(interval(range(101)))
    50.00 [5.00, 95.00]
    """
    return Interval(*np.quantile(samples, (0.05, 0.5, 0.95)).tolist())


@dataclasses.dataclass(frozen=True)
class Growth:
    """y = k C^p, with C in operations: how an optimal number grows with a budget.

    >>> law = Growth(0.0483, 0.511)
    >>> print(law, f"{law(1e20):.1e}")
    0.0483 C^0.511 8.0e+08
    """

    k: float
    p: float

    def __call__(self, flops: Sequence[float] | float) -> np.ndarray:
        """The number at this many operations."""
        return self.k * np.asarray(flops) ** self.p

    def __str__(self) -> str:
        return f"{self.k:.3g} C^{self.p:.3f}"


def growth(flops: Sequence[float], values: Sequence[float]) -> Growth:
    """Fit y = k C^p by least squares in log space.

    >>> print(growth([1e3, 1e5], [10.0, 100.0]))
    0.316 C^0.500
    """
    slope, intercept = _line(flops, np.asarray(values))
    return Growth(float(np.exp(intercept)), float(slope))


def exponents(flops: Sequence[float], values: np.ndarray) -> np.ndarray:
    """The exponents `p` of many fits: of values `[budgets, k]`, `[k]`.

    >>> exponents([1e3, 1e5], np.asarray([[10.0, 10.0], [100.0, 1000.0]])).round(3).tolist()
    [0.5, 1.0]
    """
    return _line(flops, values)[0]


def _line(flops: Sequence[float], values: np.ndarray) -> np.ndarray:
    """Slope and intercept in log space."""
    return np.polyfit(np.log(flops), np.log(values), 1)


def vertex(values: Sequence[float], losses: np.ndarray) -> np.ndarray:
    """Where the parabola through losses is lowest, over the logarithm of what was varied.

    With more than three values the parabola is that of least squares. The lowest place between the
    values is taken: one of their ends, if the parabola bends down or its vertex lies beyond.

    Args:
        values: What was varied, `[n]`, positive.
        losses: Losses `[n]`, or of many resamples, `[n, k]`.

    Returns:
        The lowest place, `[]` or `[k]`.

    >>> f"{vertex([1.0, 2.0, 4.0], np.asarray([1.1, 1.0, 1.1])):.3f}"
    '2.000'
    >>> f"{vertex([1.0, 2.0, 4.0], np.asarray([1.2, 1.1, 1.05])):.3f}"
    '4.000'
    """
    logarithms = np.log(values)
    x = logarithms - logarithms.mean()
    a, b, c = np.polyfit(x, losses, 2)
    inside = np.clip(-b / (2 * np.where(a == 0, 1.0, a)), x.min(), x.max())
    places = np.stack([np.full_like(inside, x.min()), inside, np.full_like(inside, x.max())])
    lowest = ((a * places + b) * places + c).argmin(axis=0)
    return np.exp(np.take_along_axis(places, lowest[None], axis=0)[0] + logarithms.mean())
