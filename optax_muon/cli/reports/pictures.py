"""Pictures: axes of held-out losses; and files, a PNG and an SVG that is the same in every run."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "optax-muon"}
"""Texts stay texts, which can be searched and read aloud; names in the file are not random."""


def loss_axes(**labels: str) -> tuple[matplotlib.figure.Figure, Axes]:
    """A figure and its axes for held-out losses over steps: a log scale with plain numbers.

    Args:
        **labels: The `ylabel`, and a `title` if there is one.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="step", yscale="log", **labels)
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def loss_alt(ends: Iterable[tuple[str, float]]) -> str:
    """What curves on `loss_axes` show, for those who do not see them.

    >>> loss_alt([("AdamW", 1.25), ("Muon", 1.0)])
    'Curves of the held-out loss over the steps; they end at AdamW 1.250, Muon 1.000.'
    """
    ended = ", ".join(f"{label} {loss:.3f}" for label, loss in ends)
    return f"Curves of the held-out loss over the steps; they end at {ended}."


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
    path.with_suffix(".svg").write_text(svg(figure), encoding="utf-8")


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
