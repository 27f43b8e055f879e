r"""The numbers of the polynomial iteration: named tables, and the generator of Polar Express.

One step maps every singular value of a matrix by an odd polynomial,

$$p(\sigma) = a\sigma + b\sigma^3 + c\sigma^5,$$

and a few steps drive all of them towards 1. A table of rows $(a, b, c)$ decides how fast and how
close. The factor that the rows expect the input to be divided by is
kept in the table.

The default, `KELLER`, is the table of the paper "Muon is Scalable for LLM Training"
(arXiv 2502.16982, section 2.1). `POLAR_EXPRESS` costs the same and ends closer to 1.
The iteration on matrices is in `newton_schulz.py`.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "COEFFICIENTS",
    "CUBIC",
    "DEEPSEEK_V4",
    "KELLER",
    "POLAR_EXPRESS",
    "POLAR_EXPRESS_8",
    "YOU",
    "YOU_6",
    "Coefficients",
    "Row",
    "polar_express",
]

Row: TypeAlias = tuple[float, float, float]
"""The coefficients (a, b, c) of one step."""

Float64: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Coefficients:
    r"""A table of steps, with all that belongs to it.

    Called on singular values it returns what the steps make of them, in float64:
    `KELLER(sigma)` is $p_5(\dots p_1(\sigma / \text{safety}))$, for `sigma` in units of the
    Frobenius norm of the matrix.

    >>> KELLER.take(3)
    ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    >>> KELLER([0.01, 0.1, 1.0]).round(3)
    array([0.699, 0.712, 0.696])
    >>> POLAR_EXPRESS.take(4)
    Traceback (most recent call last):
      ...
    ValueError: steps=4 does not fit polar_express, which has exactly 5 steps.
    """

    name: str
    """What the table is called in messages, in plots and in `COEFFICIENTS`."""
    rows: tuple[Row, ...]
    """One (a, b, c) per step, first step first."""
    safety: float
    """Factor on the Frobenius norm that the input is divided by. 1 is exact division; above 1
    leaves room for the rounding of the input, which a table fitted to end at 1 needs."""
    tail: Row | None
    """The row that may be repeated past the table or dropped from its end; None where the table is
    taken whole."""
    source: str
    """Where the numbers are published."""

    def take(self, steps: int | None = None) -> tuple[Row, ...]:
        """Return the rows of `steps` steps.

        Args:
            steps: How many; None takes the table as it is. More only repeats the tail, fewer
                only drops it: any other cut would leave a composition nobody has designed.

        Returns:
            The rows, first step first.

        Raises:
            ValueError: `steps` does not fit the table.
        """
        if steps is None:
            return self.rows
        steps, known = operator.index(steps), len(self.rows)
        if steps < self._fewest() or (steps > known and self.tail is None):
            raise ValueError(f"steps={steps} does not fit {self.name}, {self._accepted()}.")
        repeats = () if self.tail is None else (self.tail,) * (steps - known)
        return self.rows[:steps] + repeats

    def __call__(self, sigma: ArrayLike, steps: int | None = None) -> Float64:
        """Return what the steps make of singular values given in units of the Frobenius norm."""
        values = np.asarray(sigma, np.float64) / self.safety
        for row in self.take(steps):
            values = _polynomial(row, values)
        return values

    def _fewest(self) -> int:
        """Return the number of rows that is left when every tail row is dropped."""
        fewest = len(self.rows)
        while fewest > 1 and self.rows[fewest - 1] == self.tail:
            fewest -= 1
        return fewest

    def _accepted(self) -> str:
        if self.tail is None:
            return f"which has exactly {len(self.rows)} steps"
        return f"a table of {len(self.rows)} rows that accepts {self._fewest()} steps or more"


def _polynomial(row: Row, x: Any) -> Any:
    """Evaluate a x + b x^3 + c x^5."""
    a, b, c = row
    return x * (a + x**2 * (b + x**2 * c))


_KELLER_ROW: Row = (3.4445, -4.7750, 2.0315)
_CONVERGED_ROW: Row = (1.875, -1.25, 0.375)
_SETTLING_ROW: Row = (2.0, -1.5, 0.5)

KELLER = Coefficients(
    name="keller",
    rows=(_KELLER_ROW,) * 5,
    safety=1.0,
    tail=_KELLER_ROW,
    source="Keller Jordan, Muon, 2024; arXiv 2502.16982, section 2.1",
)
"""The paper's table: steepest at zero, and ends in a band around 1 rather than at 1."""

YOU = Coefficients(
    name="you",
    rows=(
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    safety=1.0,
    tail=None,
    source='You Jiacheng, 2024; "quintic" in NVIDIA Emerging-Optimizers, "dion" in optax',
)
"""One row per step, as steep as `KELLER` and much closer to 1 above a hundredth of the norm."""

YOU_6 = Coefficients(
    name="you_6",
    rows=(
        (3955 / 1024, -8306 / 1024, 5008 / 1024),
        (3735 / 1024, -6681 / 1024, 3463 / 1024),
        (3799 / 1024, -6499 / 1024, 3211 / 1024),
        (4019 / 1024, -6385 / 1024, 2906 / 1024),
        (2677 / 1024, -3029 / 1024, 1162 / 1024),
        (2172 / 1024, -1833 / 1024, 682 / 1024),
    ),
    safety=1.0,
    tail=None,
    source="You Jiacheng, 2024; modded-nanogpt",
)
"""Six steps that never pass 1 on the unit interval."""

POLAR_EXPRESS = Coefficients(
    name="polar_express",
    rows=(
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    safety=1.02,
    tail=None,
    source="Amsel et al., Polar Express, arXiv 2505.16932; table of modded-nanogpt",
)
"""Minimax steps for singular values above a thousandth: `polar_express()` as published."""

POLAR_EXPRESS_8 = Coefficients(
    name="polar_express_8",
    rows=(
        (8.237312490495555, -23.1577474145582, 16.680568411445915),
        (4.082441999064829, -2.8930477353325843, 0.5252849256975644),
        (3.9263479922546485, -2.854746803476524, 0.5318022422894979),
        (3.2982187133085197, -2.4245419810267106, 0.4863200835884415),
        (2.2970369434552587, -1.6366255812590325, 0.4002628455953631),
        (1.8763805351440381, -1.23478965777222, 0.3589188750166826),
        (1.856442348565278, -1.2132449881003775, 0.3568003487859341),
        (1.8749978971827306, -1.2499957943500184, 0.3749978971672879),
    ),
    safety=1.01,
    tail=_CONVERGED_ROW,
    source="arXiv 2505.16932; table of NVIDIA Emerging-Optimizers and Megatron",
)
"""`polar_express(steps=8, safety=0.01)`: the polar factor itself, to rounding."""

DEEPSEEK_V4 = Coefficients(
    name="deepseek_v4",
    rows=(_KELLER_ROW,) * 8 + (_SETTLING_ROW,) * 2,
    safety=1.0,
    tail=_SETTLING_ROW,
    source="DeepSeek-V4, arXiv 2606.19348",
)
"""Eight steep steps and two that settle at 1; ten steps amplify rounding on low-rank input."""

CUBIC = Coefficients(
    name="cubic",
    rows=(
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ),
    safety=1.0,
    tail=None,
    source="How Much Orthogonalization Does Muon Need?, arXiv 2606.00371",
)
"""Degree 3: two products a step instead of three, for a band of 0.7 to 1.3."""

COEFFICIENTS: Mapping[str, Coefficients] = MappingProxyType(
    {table.name: table for table in tuple(globals().values()) if isinstance(table, Coefficients)}
)
"""Every table above by name: a new constant is found here, and the tests run over all of them."""


def polar_express(
    steps: int = 5, lower: float = 1e-3, cushion: float = 0.02, safety: float = 0.02
) -> Coefficients:
    r"""Compute the Polar Express table: the best step after step, each for where the last one ends.

    Step $t$ is the odd quintic that minimises $\max |1 - p(\sigma)|$ over the interval
    $[l_t, u_t]$ the singular values have reached, starting with $u_1 = 1$; then
    $l_{t+1} = p(l_t)$ and $u_{t+1} = 2 - l_{t+1}$.

    >>> table = polar_express()
    >>> [round(a, 6) for a, b, c in table.rows]
    [8.156555, 4.04293, 3.891668, 3.285754, 2.346541]
    >>> float(abs(table(1e-3) - 1.0).round(3)), float(abs(table(1.0) - 1.0).round(3))
    (0.153, 0.096)

    Args:
        steps: How many rows. 5 costs what the paper's table costs.
        lower: Smallest singular value to serve, in units of the Frobenius norm. Below bfloat16's
            epsilon of 4e-3 there is little to gain.
        cushion: Least l/u a step is designed for, which bounds its slope and so its rounding.
        safety: Relative room above 1, in the norm and in every row but the last.

    Returns:
        The table; it is taken whole, because another number of steps is another table.

    Raises:
        ValueError: `steps` is below 1, or `lower` is not between 0 and 1.

    Source: Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932, section 3.
    """
    if steps < 1:
        raise ValueError(f"polar_express: steps={steps} was given, 1 or more is accepted.")
    if not 0 < lower < 1:
        raise ValueError(f"polar_express: lower={lower} was given, 0 < lower < 1 is accepted.")
    rows: list[Row] = []
    upper, room = 1.0, 1.0 + safety
    for step in range(steps):
        row = _centred(_minimax(max(lower, cushion * upper), upper), lower, upper)
        if step < steps - 1:
            row = (row[0] / room, row[1] / room**3, row[2] / room**5)
        rows.append(row)
        lower = float(_polynomial(row, lower))
        upper = 2.0 - lower
    return Coefficients(
        name=f"polar_express_{steps}_generated",
        rows=tuple(rows),
        safety=room,
        tail=None,
        source="Amsel et al., Polar Express, arXiv 2505.16932, section 3",
    )


def _minimax(lower: float, upper: float) -> Row:
    """Return the odd quintic nearest to 1 on [lower, upper], by exchange of its extremes."""
    if lower / upper >= 1 - 5e-6:  # the exchange is singular here; this is its limit
        return (1.875 / upper, -1.25 / upper**3, 0.375 / upper**5)
    left, right = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error, last = 1.0, np.inf
    while abs(error - last) > 1e-15:
        nodes = np.array([lower, left, right, upper])
        system = np.stack([nodes, nodes**3, nodes**5, [1, -1, 1, -1]], axis=1)
        last = error
        a, b, c, error = np.linalg.solve(system, np.ones(4)).tolist()
        spread = np.sqrt(9 * b * b - 20 * a * c)
        left, right = np.sqrt((-3 * b + np.array([-spread, spread])) / (10 * c)).tolist()
    return (a, b, c)


def _centred(row: Row, lower: float, upper: float) -> Row:
    """Scale a row so that the two ends of the interval land at equal distance from 1."""
    a, b, c = row
    scale = float(2.0 / (_polynomial(row, lower) + _polynomial(row, upper)))
    return (a * scale, b * scale, c * scale)
