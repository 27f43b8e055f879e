"""The pictures of `optax-muon spectra`: a panel for every group of matrices.

`entropies` is the paper's Figure 4, `singular_values` its Figures 9 and 10 (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from optax_muon.training.optimizers import REGISTRY
from optax_muon.training.spectra import GROUPS, SpectraRow, SpectraTrial, Spectrum
from optax_muon.training.styles import STYLES, Style

UNKNOWN = STYLES[-1]
"""Style of a trial whose name is not in the registry of optimizers, such as an import."""
PANEL = (3.6, 2.7)
"""Inches: width and height."""
ACROSS = 3
"""Panels of a row."""
RANKS = np.linspace(0, 1, 101)
"""Where spectra of different lengths are compared, as parts of their length."""


def entropies(
    trials: Sequence[SpectraTrial], lines: Sequence[SpectraRow]
) -> matplotlib.figure.Figure:
    """SVD entropy over steps: the mean, and a band between the quartiles of the matrices."""
    groups = [group for group in GROUPS if any(line.group == group for line in lines)]
    figure, panels = _panels(
        groups, "step (line: mean of the matrices, band: quartiles)", "SVD entropy"
    )
    for group, axes in zip(groups, panels, strict=True):
        count = next(line.matrices for line in lines if line.group == group)
        axes.set_title(_title(group, count), fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for trial in trials:
            style = _style(trial)
            mine = [r for r in lines if (r.trial, r.group) == (trial.name, group)]
            steps = [line.step for line in mine]
            curve = style.curve(len(steps)) | {"markersize": 4}
            axes.plot(steps, [line.entropy for line in mine], **curve)
            band = [line.entropy_lower for line in mine], [line.entropy_upper for line in mine]
            if len(steps) == 1:  # a band of one step has no width
                axes.vlines(steps, *band, color=style.color, alpha=0.4)
                axes.set_xticks(steps)
            else:
                axes.fill_between(steps, *band, color=style.color, alpha=0.15, linewidth=0)
    _legend(figure, _named(trials, {line.trial for line in lines}))
    return figure


def singular_values(
    trials: Sequence[SpectraTrial], found: Sequence[Spectrum]
) -> matplotlib.figure.Figure:
    """Singular values over the largest by rank: the median matrix, and a band of the quartiles.

    Curves with markers are of the last checkpoint; thin ones are of the first, without a band.
    """
    groups = [group for group in GROUPS if any(s.group == group for s in found)]
    figure, panels = _panels(
        groups,
        "rank / all ranks (line: median matrix, band: quartiles)",
        "singular value / largest",
    )
    for group, axes in zip(groups, panels, strict=True):
        for trial in trials:
            style = _style(trial)
            mine = [s for s in found if (s.trial, s.group) == (trial.name, group)]
            steps = sorted({spectrum.step for spectrum in mine})
            for step in {steps[0], steps[-1]} if steps else ():
                curves = _curves([spectrum for spectrum in mine if spectrum.step == step])
                axes.set_title(_title(group, len(curves)), fontsize=10)
                lower, median, upper = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
                if step == steps[-1]:
                    axes.plot(RANKS, median, **style.curve(len(RANKS)) | {"markersize": 4})
                    color = style.color
                    axes.fill_between(RANKS, lower, upper, color=color, alpha=0.15, linewidth=0)
                else:
                    axes.plot(RANKS, median, color=style.color, linestyle=style.line, linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
    present = {spectrum.trial for spectrum in found}
    _legend(figure, [*_named(trials, present), *_styles(sorted({s.step for s in found}))])
    return figure


def _style(trial: SpectraTrial) -> Style:
    """The style of the trial in the run's loss.png."""
    return REGISTRY[trial.name].style if trial.name in REGISTRY else UNKNOWN


def _panels(
    groups: Sequence[str], across: str, up: str
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    cols = min(ACROSS, len(groups))
    lines = math.ceil(len(groups) / cols)
    size = (max(PANEL[0] * cols, 6), PANEL[1] * lines + 0.5)
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    panels = [figure.add_subplot(lines, cols, i + 1) for i in range(len(groups))]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.2)
    figure.supxlabel(across, fontsize=10)
    figure.supylabel(up, fontsize=10)
    return figure, panels


def _curves(group: Sequence[Spectrum]) -> np.ndarray:
    """The singular values of all matrices at `RANKS`, `[matrices, ranks]`."""

    def at_ranks(values: np.ndarray) -> np.ndarray:
        return np.interp(RANKS, np.linspace(0, 1, len(values)), values)

    return np.stack([at_ranks(values) for spectrum in group for values in spectrum.values])


def _title(group: str, matrices: int) -> str:
    return f"{group}: {matrices} {'matrix' if matrices == 1 else 'matrices'}"


def _named(trials: Sequence[SpectraTrial], present: set[str]) -> list[Line2D]:
    return [
        Line2D([], [], **_style(trial).curve(), label=trial.title)
        for trial in trials
        if trial.name in present
    ]


def _styles(steps: Sequence[int]) -> list[Line2D]:
    """What markers and thin lines mean, where there is more than one step."""
    if len(steps) == 1:
        return []
    return [
        Line2D([], [], color="black", marker=".", label=f"step {steps[-1]}"),
        Line2D([], [], color="black", linewidth=0.8, label=f"step {steps[0]}"),
    ]


def _legend(figure: matplotlib.figure.Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        handlelength=4,
    )
