"""Drawings of rectangles, lines and words, as SVG: what a plan is drawn with, without a library.

Places and lengths are in points, 72 to an inch, from the upper left corner; sizes of words too.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

__all__ = ["Drawing", "Line", "Rectangle", "Words"]

SPACING = 1.2
"""Distance of lines of words, over their size."""


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """A filled rectangle."""

    x: float
    """Left side."""
    y: float
    """Upper side."""
    width: float
    """Width."""
    height: float
    """Height."""
    color: str
    """`#rrggbb`."""

    def svg(self) -> str:
        """As an element of SVG."""
        place = f'x="{self.x:.4g}" y="{self.y:.4g}"'
        size = f'width="{self.width:.4g}" height="{self.height:.4g}"'
        return f'<rect {place} {size} fill="{self.color}"/>'


@dataclasses.dataclass(frozen=True)
class Line:
    """A straight line."""

    x1: float
    """Where it begins."""
    y1: float
    """Where it begins."""
    x2: float
    """Where it ends."""
    y2: float
    """Where it ends."""
    color: str
    """`#rrggbb`."""
    width: float = 1.0
    """Width."""
    dashed: bool = False
    """Whether it is dashed."""

    def svg(self) -> str:
        """As an element of SVG."""
        ends = f'x1="{self.x1:.4g}" y1="{self.y1:.4g}" x2="{self.x2:.4g}" y2="{self.y2:.4g}"'
        dashes = ' stroke-dasharray="4 3"' if self.dashed else ""
        return f'<line {ends} stroke="{self.color}" stroke-width="{self.width:.3g}"{dashes}/>'


@dataclasses.dataclass(frozen=True)
class Words:
    """Words on one line or more, around a height."""

    x: float
    """Where they begin, end or have their middle; see `anchor`."""
    y: float
    """The height of their middle."""
    text: str
    """The words; `\\n` begins a line."""
    size: float
    """Size of the letters."""
    color: str
    """`#rrggbb`."""
    bold: bool = False
    """Whether they are bold."""
    anchor: str = "start"
    """Which part of them is at `x`: `start`, `middle` or `end`."""

    @property
    def lines(self) -> list[tuple[float, str]]:
        """Each line and the height of its middle."""
        lines = self.text.split("\n")
        first = self.y - (len(lines) - 1) / 2 * SPACING * self.size
        return [(first + number * SPACING * self.size, each) for number, each in enumerate(lines)]

    def svg(self) -> str:
        """As elements of SVG; letters stand a third of their size below their middle."""
        style = f'font-size="{self.size:g}" fill="{self.color}" text-anchor="{self.anchor}"'
        weight = ' font-weight="bold"' if self.bold else ""
        return "".join(
            f'<text x="{self.x:.4g}" y="{y + 0.35 * self.size:.4g}" {style}{weight}>'
            f"{html.escape(line)}</text>"
            for y, line in self.lines
        )


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Shapes on a white ground, the later ones above the earlier ones."""

    width: float
    """Width."""
    height: float
    """Height."""
    shapes: Sequence[Rectangle | Line | Words]
    """What is drawn."""
    title: str = ""
    """What it shows, for those who do not see it."""

    def svg(self) -> str:
        """The drawing as SVG.

        >>> words = Words(10, 10, "<a>", 8, "#000000")
        >>> print(Drawing(20, 20, [words], "A & B").svg())
        <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20" role="img" ...>
        <title>A &amp; B</title>
        <rect x="0" y="0" width="20" height="20" fill="#ffffff"/>
        <text x="10" y="12.8" font-size="8" fill="#000000" text-anchor="start">&lt;a&gt;</text>
        </svg>
        """
        box = f'viewBox="0 0 {self.width:g} {self.height:g}" role="img"'
        style = f'style="max-width:{self.width:g}pt;width:100%;font-family:sans-serif"'
        ground = Rectangle(0, 0, self.width, self.height, "#ffffff")
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style}>',
                f"<title>{html.escape(self.title)}</title>",
                *(shape.svg() for shape in (ground, *self.shapes)),
                "</svg>",
            )
        )
