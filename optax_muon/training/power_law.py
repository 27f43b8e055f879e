"""Scaling laws: power laws of loss over compute, and ratios of compute at equal loss."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence

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

    def resamples(self, random: np.random.Generator) -> Iterator[list[float]]:
        """Mean losses of seeds drawn with replacement, again and again."""
        for _ in range(RESAMPLES):
            yield [float(random.choice(seeds, len(seeds)).mean()) for seeds in self.losses]


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
    start, bounds = (lowest / 2, intercept, -slope), ([0, -np.inf, 0], [lowest, np.inf, np.inf])
    found = scipy.optimize.least_squares(
        residuals, start, bounds=bounds, loss="huber", f_scale=1e-3, x_scale=(1, 1, 0.1)
    )
    e, log_a, b = found.x
    return PowerLaw(float(np.exp(log_a)), float(b), float(e))


@dataclasses.dataclass(frozen=True)
class Interval:
    """The median of resamples, and the range that holds nine tenths of them."""

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
    found = []
    for fitted, losses in zip(baseline.resamples(random), other.resamples(random), strict=True):
        needed = fit(baseline.costs[of], fitted).inverse(losses[place])
        found.append(other.costs[of][place] / needed)
    low, middle, high = np.quantile(found, (0.05, 0.5, 0.95)).tolist()
    return Interval(low, middle, high)
