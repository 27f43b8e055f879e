"""The plan as a picture: a band for every assignment, and below them the load of each device.

A band names the matrices, shows the mesh with the number of matrices that each device owns, and the
bytes that a device receives. The numbers per device are those of `plan_devices.py`.
"""

from __future__ import annotations

import dataclasses
import fractions
import io
import itertools
import math
import string
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image

from optax_muon import Plan
from optax_muon.cli.reports.plan_devices import Band, bands

WIDTH, HEAD, BAND, FOOT = 12.0, 1.15, 1.3, 2.9
"""Inches: the picture's width, and the heights of title, band and load chart."""
GRID = (4.2, 0.92)
"""Inches of a band's mesh: width and height."""
TINTS = {
    "local": ("#238b45", "#74c476", "#00592b", "#a1d99b"),
    "home": ("#2171b5", "#6baed6", "#08417a", "#9ecae1"),
    "split": ("#d9730d", "#fdae6b", "#a63c03", "#f7ca94"),
    "gather": ("#7a6b9e", "#b3a8cf", "#51417d", "#d0c8e4"),
}
"""Colors by layout, for one assignment after the other; blue and orange differ for all eyes."""
OTHER_TINTS = ("#b8860b", "#e3c16f", "#7d5a00", "#efd9a0")
"""Colors of a layout that has no row in `TINTS`."""
IDLE, INK, FAINT = "#ececec", "#222222", "#6b6b6b"
MIB = 2**20


def png(plan: Plan, title: str = "", dpi: int = 150) -> bytes:
    """Draw a plan as a PNG.

    Args:
        plan: The plan.
        title: Name of the model that it is made for.
        dpi: Dots per inch of a picture that is 12 inches wide.

    >>> import jax, optax_muon
    >>> params = {"kernel": jax.ShapeDtypeStruct((64, 64), "float32")}
    >>> png(optax_muon.plan(params), dpi=40)[1:4]
    b'PNG'
    """
    drawn, packed = io.BytesIO(), io.BytesIO()
    draw(plan, title).savefig(drawn, format="png", dpi=dpi)
    with Image.open(drawn) as image:
        # 64 colors are enough, and the file is a quarter of the size.
        image.convert("RGB").quantize(64).save(packed, "png", optimize=True)
    return packed.getvalue()


def draw(plan: Plan, title: str = "") -> matplotlib.figure.Figure:
    """Draw a plan; the arguments are those of `png`."""
    assignments = bands(plan)
    colors = _colors(assignments)
    height = HEAD + BAND * len(assignments) + FOOT
    figure = matplotlib.figure.Figure(figsize=(WIDTH, height))
    _write_title(figure, plan, title)
    fold = _fold(plan.mesh_axes)
    longest = max(max(_traffic(band).values()) for band in assignments) / MIB or 1.0
    for i, (name, band, color) in enumerate(zip(_letters(), assignments, colors, strict=False)):
        top = height - HEAD - BAND * i
        _write_band(figure, top, name, band, color)
        _draw_mesh(figure, top, band, color, fold)
        _draw_traffic(figure, top, band, color, longest)
    _draw_load(figure, plan, assignments, colors)
    return figure


def _colors(assignments: Sequence[Band]) -> list[str]:
    layouts = {band.assignment.layout for band in assignments}
    tints = {name: itertools.cycle(TINTS.get(name, OTHER_TINTS)) for name in layouts}
    return [next(tints[band.assignment.layout]) for band in assignments]


def _letters() -> itertools.chain[str]:
    return itertools.chain(string.ascii_uppercase, map(str, itertools.count(1)))


def _write_title(figure: matplotlib.figure.Figure, plan: Plan, title: str) -> None:
    height = figure.get_figheight()
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_axes.items())
    where = f"{math.prod(plan.mesh_axes.values())} devices: {mesh}" if mesh else "one device"
    steps = f"{plan.work.steps} steps in " if plan.work.steps else ""
    line = (
        f"one update, {steps}{plan.work.dtype}; per device {_work(plan.cost.flops)},"
        f" {plan.load_ratio:.2f}x a balanced share, {_mib(plan.cost.received_bytes)} MiB received,"
        f" {plan.received_ratio:.2f}x the lower bound, and {_mib(plan.cost.memory)} MiB held"
    )
    place = (0.2 / WIDTH, 1 - 0.38 / height)
    figure.text(*place, f"{title or 'Muon'} on {where}", fontsize=14, weight="bold", color=INK)
    figure.text(0.2 / WIDTH, 1 - 0.64 / height, line, fontsize=9.5, color=FAINT)
    for inches, words in (
        (0.2, "matrices"),
        (3.85, "who owns how many (grey: none)"),
        (8.75, "MiB received by each device"),
    ):
        place = (inches / WIDTH, 1 - 1.0 / height)
        figure.text(*place, words, fontsize=10, weight="bold", color=INK)


def _write_band(
    figure: matplotlib.figure.Figure, top: float, name: str, band: Band, color: str
) -> None:
    """What the matrices are, and who works on them."""
    height = figure.get_figheight()
    heading, *lines = _words(band)
    chip = {"boxstyle": "square,pad=0.25", "facecolor": color, "edgecolor": "none"}
    ink, y = _ink(color), (top - 0.22) / height
    figure.text(0.25 / WIDTH, y, name, fontsize=9, weight="bold", color=ink, bbox=chip)
    figure.text(0.5 / WIDTH, y, heading, fontsize=11, weight="bold", color=INK)
    for i, line in enumerate(lines):
        place = (0.2 / WIDTH, (top - 0.42 - 0.18 * i) / height)
        figure.text(*place, line, fontsize=8.5, color=INK)


def _words(band: Band) -> list[str]:
    bucket, assignment = band.bucket_plan.bucket, band.assignment
    over = (
        f"{side} over {' '.join(axes)}"
        for side, axes in (
            ("rows", bucket.rows_over),
            ("columns", bucket.cols_over),
            ("matrices", bucket.batch_over),
        )
        if axes
    )
    chunks = f"in {assignment.chunks} chunks, " if assignment.chunks > 1 else ""
    return [
        f"{assignment.count * band.bucket_plan.copies} x ({bucket.rows} x {bucket.cols})",
        textwrap.shorten(band.members, 52, placeholder=" ..."),
        ", ".join(over) or "whole on every device",
        f"{assignment.layout}: {_workers(band)}",
        f"{chunks}{_work(assignment.cost.flops)}, {_mib(assignment.cost.memory)} MiB held",
    ]


def _workers(band: Band) -> str:
    """Who works on the matrices: the homes, how many idle, and how often they exist."""
    if not band.assignment.mechanism.homes:
        return band.assignment.describe(band.bucket_plan.copies)
    homes, sharing = int(band.owner.max()) + 1, band.assignment.sharing
    idle = homes - len(np.unique(band.owner[band.owned > 0]))
    repeated = len(band.owner) // (homes * sharing)
    size = f" of {sharing} devices" if sharing > 1 else ""
    words = [f"{homes} {'homes' if homes > 1 else 'home'}{size}", f"{band.assignment.owned} each"]
    words += [f"{idle} idle"] if idle else []
    words += [f"repeated {repeated} times"] if repeated > 1 else []
    return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Fold:
    """A mesh as a rectangle: its devices as `[rows, cols]`, and the axes along each side."""

    order: np.ndarray
    down: str
    across: str


def _fold(mesh: Mapping[str, int]) -> Fold:
    """Arrange a mesh in a rectangle about four times as wide as high."""
    names, sizes = list(mesh), tuple(mesh.values())
    order = np.arange(math.prod(sizes)).reshape(sizes)
    if len(sizes) < 2:
        row = 2 ** math.ceil(math.log2(2 * math.sqrt(order.size)))
        wide = order.size % row == 0 and order.size > 16
        return Fold(order.reshape(-1, row if wide else order.size), "", " ".join(names))
    folds = []
    for cut in range(1, len(sizes)):
        flat = order.reshape(math.prod(sizes[:cut]), -1)
        first, last = " x ".join(names[:cut]), " x ".join(names[cut:])
        folds += [Fold(flat, first, last), Fold(flat.T, last, first)]
    return min(folds, key=lambda f: abs(math.log(f.order.shape[1] / f.order.shape[0] / 4)))


def _draw_mesh(
    figure: matplotlib.figure.Figure, top: float, band: Band, color: str, fold: Fold
) -> None:
    """The devices, colored by how many matrices they own; white lines separate the homes."""
    (wide, high), (rows, cols) = GRID, fold.order.shape
    cell = (wide / cols, high / rows)
    axes = _axes(figure, 3.85, top - 0.12 - high, wide, high)
    owned, first = band.owned[fold.order], band.first[fold.order]
    share = owned / max(band.assignment.owned, 1)
    axes.imshow(_shades(color, share), aspect="auto", interpolation="nearest")
    _part(axes, band.owner[fold.order], min(cell) * 72)
    if cell[0] > 0.24 and cell[1] > 0.14:
        for (i, j), count in np.ndenumerate(owned):
            ink = _ink(color) if count else FAINT
            text = _cell(
                int(count), band.assignment.sharing, int(first[i, j]) if min(cell) > 0.4 else None
            )
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=ink)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(fold.across, fontsize=8, color=FAINT, labelpad=3)
    axes.set_ylabel(fold.down, fontsize=8, color=FAINT, rotation=0, ha="right", va="center")
    axes.spines[:].set_visible(False)


def _cell(count: int, sharing: int, first: int | None) -> str:
    """Number of matrices, or fraction of one, and their indices if there is room."""
    number = str(fractions.Fraction(count, sharing)) if count < sharing else f"{count / sharing:g}"
    if first is None or not count:
        return number
    last = first + count - 1
    return f"{number}\nno. {first}" if count == 1 else f"{number}\nno. {first}-{last}"


def _shades(color: str, share: np.ndarray) -> np.ndarray:
    """From the color of an idle device to that of the assignment: `[rows, cols, 3]`."""
    idle, full = (np.array(matplotlib.colors.to_rgb(c)) for c in (IDLE, color))
    strength = np.where(share > 0, 0.35 + 0.65 * share, 0.0)[..., None]
    return idle + strength * (full - idle)


def _ink(color: str) -> str:
    """White or black, whichever is legible on a color."""
    light = float(np.dot(matplotlib.colors.to_rgb(color), (0.3, 0.59, 0.11)))
    return INK if light > 0.55 else "white"


def _part(axes: Axes, owner: np.ndarray, cell: float) -> None:
    """Lines between devices, thick between homes; the short side of a cell has `cell` points."""
    for thick in (False, True):
        right = np.argwhere((owner[:, 1:] != owner[:, :-1]) == thick) + np.array([-0.5, 0.5])
        below = np.argwhere((owner[1:] != owner[:-1]) == thick) + np.array([0.5, -0.5])
        lines = [[(x, y), (x, y + 1)] for y, x in right] + [[(x, y), (x + 1, y)] for y, x in below]
        width = min(2.0, cell / 5) if thick else min(0.4, cell / 20)
        axes.add_collection(LineCollection(lines, colors="white", linewidths=width))


def _draw_traffic(
    figure: matplotlib.figure.Figure, top: float, band: Band, color: str, longest: float
) -> None:
    """Bytes received before, during and after the work."""
    axes = _axes(figure, 9.6, top - 0.95, 1.75, 0.8)
    traffic = _traffic(band)
    sizes = [size / MIB for size in traffic.values()]
    axes.barh(range(3), sizes, height=0.72, color=color)
    for i, size in enumerate(sizes):
        ink = INK if size else FAINT
        axes.text(size + longest / 60, i, _mib(size * MIB), va="center", fontsize=8, color=ink)
    axes.set(xlim=(0, longest), ylim=(2.5, -0.5), xticks=[])
    axes.set_yticks(range(3), [*traffic], fontsize=8)
    axes.tick_params(length=0, colors=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#bbbbbb")


def _traffic(band: Band) -> dict[str, int]:
    """Bytes received by a device, by purpose."""
    traffic = band.assignment.cost.traffic
    return {
        "on the way in": traffic.inward,
        "while working": traffic.working,
        "on the way back": traffic.outward,
    }


def _draw_load(
    figure: matplotlib.figure.Figure,
    plan: Plan,
    assignments: Sequence[Band],
    colors: Sequence[str],
) -> None:
    """Work of every device, assignment by assignment; grey is waiting, or work on padding."""
    devices = math.prod(plan.mesh_axes.values())
    unit, factor = _unit(plan.cost.flops)
    axes = _axes(figure, 0.85, 0.55, WIDTH - 2.6, FOOT - 1.1)
    edges, base = np.arange(devices + 1), 0.0
    for name, band, color in zip(_letters(), assignments, colors, strict=False):
        height = band.assignment.cost.flops / factor
        axes.stairs(np.full(devices, base + height), edges, baseline=base, fill=True, color=IDLE)
        busy = base + band.busy / factor
        axes.stairs(busy, edges, baseline=base, fill=True, color=color)
        if height > plan.cost.flops / factor / 16:
            axes.text(devices * 1.008, base + height / 2, name, va="center", color=INK)
        base += height
        axes.axhline(base, color="white", linewidth=0.8)
    if devices <= 128:
        axes.vlines(edges, 0, base, color="white", linewidth=min(2.0, 64 / devices))
    balanced = plan.balanced_flops / factor
    axes.axhline(balanced, color=INK, linestyle="--", linewidth=1.2)
    figure_x = axes.get_yaxis_transform()
    axes.text(
        1.035, balanced, "a balanced\nshare", transform=figure_x, va="center", fontsize=9, color=INK
    )
    axes.set(xlim=(0, devices), ylim=(0, 1.04 * max(base, balanced)))
    axes.set_title("work of each device", loc="left", fontsize=10, weight="bold", color=INK)
    axes.set_xlabel("device, in the order of the mesh; grey: waiting for others", fontsize=9)
    numbers = range(0, devices, max(devices // 16, 1))
    axes.set_xticks([number + 0.5 for number in numbers], [str(number) for number in numbers])
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _axes(
    figure: matplotlib.figure.Figure, left: float, bottom: float, width: float, height: float
) -> Axes:
    """Axes placed in inches."""
    tall = figure.get_figheight()
    return figure.add_axes((left / WIDTH, bottom / tall, width / WIDTH, height / tall))


def _unit(flops: float) -> tuple[str, float]:
    return next(
        (name, size)
        for name, size in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1.0))
        if flops >= size or size == 1.0
    )


def _work(flops: float) -> str:
    unit, size = _unit(flops)
    return f"{flops / size:.3g} {unit}"


def _mib(bytes_: float) -> str:
    mib = bytes_ / MIB
    return "0" if not mib else f"{mib:.0f}" if mib >= 100 else f"{mib:.2g}"
