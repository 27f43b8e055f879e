"""The styles of curves: one table for every picture of the package, its benchmarks and its pages.

Curves of two styles differ in color, in line and in marker, so that they can be told apart in black
and white and by eyes that do not see every color. The colors are those of Okabe and Ito ("Color
Universal Design", 2002), which differ for color-blind eyes; light ones and dark ones alternate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Dashes = tuple[float, tuple[float, ...]]
"""An offset, and lengths of ink and of gaps in turn, in widths of the line."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How a curve is drawn.

    >>> Style("#000000", "--", "o").curve(points=40)["markevery"]
    5
    """

    color: str
    """Any color of matplotlib."""
    line: str | Dashes
    """Any line style of matplotlib."""
    marker: str
    """Any marker of matplotlib."""

    def curve(self, points: int = 1) -> dict[str, Any]:
        """Keywords for `Axes.plot`.

        Args:
            points: Points of the curve; about eight of them are marked.
        """
        return {
            "color": self.color,
            "linestyle": self.line,
            "marker": self.marker,
            "markevery": max(1, points // 8),
            "markersize": 5,
        }

    @property
    def dots(self) -> dict[str, Any]:
        """Keywords for `Axes.plot`, of points without a line."""
        return {"color": self.color, "linestyle": "", "marker": self.marker}


STYLES = (
    Style("#000000", "--", "o"),
    Style("#d55e00", "-", "s"),
    Style("#56b4e9", "-.", "^"),
    Style("#009e73", (0, (6, 1, 1, 1, 1, 1)), "P"),
    Style("#cc79a7", ":", "v"),
    Style("#e69f00", (0, (8, 2)), "D"),
    Style("#0072b2", (0, (3, 1, 1, 1)), "X"),
)
"""Styles that differ in everything, for curves in any order."""


def nth(number: int) -> Style:
    """The style of a curve by its number, from 0; where the table ends, markers move on.

    >>> [nth(number).marker for number in (0, 6, 7)]
    ['o', 'X', 's']
    >>> len({nth(number) for number in range(49)})
    49
    """
    turn, place = divmod(number, len(STYLES))
    row = STYLES[place]
    return dataclasses.replace(row, marker=STYLES[(place + turn) % len(STYLES)].marker)
