"""Pictures as files: a PNG, and an SVG of the same name that is the same in every run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure

SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "optax-muon"}
"""Texts stay texts, which can be searched and read aloud; names in the file are not random."""


def svg(figure: matplotlib.figure.Figure) -> str:
    """The figure as an SVG, the same in every run.

    >>> figure = matplotlib.figure.Figure()
    >>> _ = figure.text(0.5, 0.5, "a word")
    >>> "a word" in svg(figure) and svg(figure) == svg(figure)
    True
    """
    drawn = io.StringIO()
    with matplotlib.rc_context(SVG):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"


def save(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write the figure to `path`, a PNG, and beside it as an SVG."""
    figure.savefig(path)
    path.with_suffix(".svg").write_text(svg(figure))


def alt(figure: matplotlib.figure.Figure) -> str:
    """What a figure of axes shows, for those who do not see it: its title, axes and curves.

    >>> figure = matplotlib.figure.Figure()
    >>> axes = figure.add_subplot(title="Speed", xlabel="size", ylabel="seconds")
    >>> _ = axes.plot([1, 2], label="ours")
    >>> alt(figure)
    'Plot: Speed; seconds over size; ours.'
    """
    words: list[str] = []
    for axes in figure.axes:
        named = [each for each in (axes.get_ylabel(), axes.get_xlabel()) if each]
        labels = axes.get_legend_handles_labels()[1]
        words += [axes.get_title(), " over ".join(named), "; ".join(map(str, labels))]
    said = dict.fromkeys(" ".join(each.split()) for each in words)
    return f"Plot: {'; '.join(filter(None, said))}."
