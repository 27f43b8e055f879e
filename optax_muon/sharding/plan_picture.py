"""The plan as a picture: a band for every assignment, and below them the load of each device.

A band names the matrices, shows the mesh with the number of matrices that each device owns, and the
bytes that a device receives. The numbers per device are those of `plan_devices.py`, and the shapes
those of `drawing.py`; letters name the bands, so that nobody has to tell colors apart.
"""

from __future__ import annotations

import dataclasses
import fractions
import itertools
import math
import string
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_muon.drawing import Drawing, Line, Rectangle, Words
from optax_muon.sharding.plan_devices import Band, bands

if TYPE_CHECKING:
    from optax_muon.sharding.plan import Plan

Shapes = Iterator[Rectangle | Line | Words]

WIDTH, HEAD, BAND, FOOT = 864.0, 83.0, 94.0, 209.0
"""Points: the picture's width, and the heights of title, band and load chart."""
GRID = (302.0, 66.0)
"""Points of a band's mesh: width and height."""
LEFT, MESH, TRAFFIC = 14.0, 277.0, 691.0
"""Where the words, the mesh and the bytes of a band begin."""
FEWEST = 3.0
"""Points of a device below which no lines are drawn between devices."""
TINTS = {
    "local": ("#238b45", "#74c476", "#00592b", "#a1d99b"),
    "home": ("#2171b5", "#6baed6", "#08417a", "#9ecae1"),
    "split": ("#d9730d", "#fdae6b", "#a63c03", "#f7ca94"),
    "gather": ("#7a6b9e", "#b3a8cf", "#51417d", "#d0c8e4"),
}
"""Colors by layout, for one assignment after the other; blue and orange differ for all eyes."""
OTHER_TINTS = ("#b8860b", "#e3c16f", "#7d5a00", "#efd9a0")
"""Colors of a layout that has no row in `TINTS`."""
IDLE, INK, FAINT, WHITE = "#ececec", "#222222", "#6b6b6b", "#ffffff"
MIB = 2**20


def draw(plan: Plan, title: str = "") -> Drawing:
    """Draw a plan.

    Args:
        plan: The plan.
        title: Name of the model that it is made for.
    """
    assignments = bands(plan.mesh_axes, plan.buckets)
    colors = _colors(assignments)
    height = HEAD + BAND * len(assignments) + FOOT
    fold = _fold(plan.mesh_axes)
    longest = max((max(_traffic(band).values()) for band in assignments), default=0) or 1
    shapes = [*_headings(plan, title)]
    for i, (name, band, color) in enumerate(zip(_letters(), assignments, colors, strict=False)):
        top = HEAD + BAND * i
        shapes += _band_words(top, name, band, color)
        shapes += _mesh(top, band, color, fold)
        shapes += _received(top, band, color, longest)
    shapes += _load(plan, assignments, colors, HEAD + BAND * len(assignments))
    said = "; ".join(f"{band.assignment.layout} {_described(band)[0]}" for band in assignments)
    return Drawing(WIDTH, height, shapes, f"{_title(plan, title)}: {said}")


def _colors(assignments: Sequence[Band]) -> list[str]:
    layouts = {band.assignment.layout for band in assignments}
    tints = {name: itertools.cycle(TINTS.get(name, OTHER_TINTS)) for name in layouts}
    return [next(tints[band.assignment.layout]) for band in assignments]


def _letters() -> Iterator[str]:
    return itertools.chain(string.ascii_uppercase, map(str, itertools.count(1)))


def _title(plan: Plan, title: str) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_axes.items())
    where = f"{math.prod(plan.mesh_axes.values())} devices: {mesh}" if mesh else "one device"
    return f"{title or 'Muon'} on {where}"


def _headings(plan: Plan, title: str) -> Shapes:
    steps = f"{plan.work.steps} steps in " if plan.work.steps else ""
    line = (
        f"one update, {steps}{plan.work.dtype}; per device {_work(plan.cost.flops)},"
        f" {plan.load_ratio:.2f}x a balanced share, {_mib(plan.cost.received_bytes)} MiB received,"
        f" {plan.received_ratio:.2f}x the lower bound, and {_mib(plan.cost.memory)} MiB held"
    )
    yield Words(LEFT, 23, _title(plan, title), 14, INK, bold=True)
    yield Words(LEFT, 44, line, 9.5, FAINT)
    for x, words in (
        (LEFT, "matrices"),
        (MESH, "who owns how many (grey: none)"),
        (TRAFFIC - 61, "MiB received by each device"),
    ):
        yield Words(x, 69, words, 10, INK, bold=True)


def _band_words(top: float, name: str, band: Band, color: str) -> Shapes:
    """What the matrices are, and who works on them."""
    heading, *lines = _described(band)
    yield Rectangle(LEFT, top + 8, 15, 15, color)
    yield Words(LEFT + 7.5, top + 15.5, name, 9, _ink(color), bold=True, anchor="middle")
    yield Words(LEFT + 22, top + 15.5, heading, 11, INK, bold=True)
    for i, line in enumerate(lines):
        yield Words(LEFT, top + 32 + 13 * i, line, 8.5, INK)


def _described(band: Band) -> list[str]:
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


def _mesh(top: float, band: Band, color: str, fold: Fold) -> Shapes:
    """The devices, colored by how many matrices they own; white lines separate the homes."""
    (wide, high), (rows, cols) = GRID, fold.order.shape
    cell, y0 = (wide / cols, high / rows), top + 9
    owned, first = band.owned[fold.order], band.first[fold.order]
    most = max(band.assignment.owned, 1)
    for i, row in _runs(owned):
        for j, count in _runs(row):
            shade = _shade(color, count / most)
            x, y = MESH + j.start * cell[0], y0 + i.start * cell[1]
            yield Rectangle(x, y, len(j) * cell[0], len(i) * cell[1], shade)
    if min(cell) >= FEWEST:
        yield from _borders(band.owner[fold.order], y0, cell)
    if cell[0] > 17 and cell[1] > 10:
        for (i, j), count in np.ndenumerate(owned):
            ink = _ink(_shade(color, count / most)) if count else FAINT
            number = int(first[i, j]) if min(cell) > 29 else None
            text = _cell(int(count), band.assignment.sharing, number)
            x, y = MESH + (j + 0.5) * cell[0], y0 + (i + 0.5) * cell[1]
            yield Words(x, y, text, 7.5, ink, anchor="middle")
    if fold.across:
        yield Words(MESH + wide / 2, y0 + high + 9, fold.across, 8, FAINT, anchor="middle")
    if fold.down:
        yield Words(MESH - 4, y0 + high / 2, fold.down, 8, FAINT, anchor="end")


def _runs(values: np.ndarray) -> Iterator[tuple[range, Any]]:
    """Stretches of equal values along the first axis: large meshes are few rectangles."""
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or not np.array_equal(values[end], values[start]):
            yield range(start, end), values[start]
            start = end


def _borders(owner: np.ndarray, y0: float, cell: tuple[float, float]) -> Shapes:
    """Lines between devices, thick between homes."""
    wide, high = cell
    for thick in (False, True):
        width = min(2.0, min(cell) / 5) if thick else min(0.4, min(cell) / 20)
        for i, j in np.argwhere((owner[:, 1:] != owner[:, :-1]) == thick):
            x, y = MESH + (j + 1) * wide, y0 + i * high
            yield Line(x, y, x, y + high, WHITE, width)
        for i, j in np.argwhere((owner[1:] != owner[:-1]) == thick):
            x, y = MESH + j * wide, y0 + (i + 1) * high
            yield Line(x, y, x + wide, y, WHITE, width)


def _cell(count: int, sharing: int, first: int | None) -> str:
    """Number of matrices, or fraction of one, and their indices if there is room."""
    number = str(fractions.Fraction(count, sharing)) if count < sharing else f"{count / sharing:g}"
    if first is None or not count:
        return number
    last = first + count - 1
    return f"{number}\nno. {first}" if count == 1 else f"{number}\nno. {first}-{last}"


def _shade(color: str, share: float) -> str:
    """From the color of an idle device to that of the assignment."""
    strength = 0.35 + 0.65 * share if share > 0 else 0.0
    pairs = zip(_rgb(IDLE), _rgb(color), strict=True)
    mixed = (round(idle + strength * (full - idle)) for idle, full in pairs)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _ink(color: str) -> str:
    """White or black, whichever is legible on a color."""
    light = float(np.dot(_rgb(color), (0.3, 0.59, 0.11))) / 255
    return INK if light > 0.55 else WHITE


def _received(top: float, band: Band, color: str, longest: float) -> Shapes:
    """Bytes received before, during and after the work."""
    for i, (purpose, size) in enumerate(_traffic(band).items()):
        y = top + 21 + 19 * i
        yield Words(TRAFFIC - 5, y, purpose, 8, INK, anchor="end")
        length = 126 * size / longest
        yield Rectangle(TRAFFIC, y - 7, length, 14, color)
        yield Words(TRAFFIC + length + 4, y, _mib(size), 8, INK if size else FAINT)
    yield Line(TRAFFIC, top + 12, TRAFFIC, top + 68, FAINT, 0.8)


def _traffic(band: Band) -> dict[str, int]:
    """Bytes received by a device, by purpose."""
    traffic = band.assignment.cost.traffic
    return {
        "on the way in": traffic.inward.total,
        "while working": traffic.working.total,
        "on the way back": traffic.outward.total,
    }


def _load(plan: Plan, assignments: Sequence[Band], colors: Sequence[str], top: float) -> Shapes:
    """Work of every device, assignment by assignment; grey is waiting, or work on padding."""
    devices = math.prod(plan.mesh_axes.values())
    unit, factor = _unit(plan.cost.flops)
    left, wide, high = 61.0, WIDTH - 187, FOOT - 79
    floor = top + FOOT - 40
    total = sum(band.assignment.cost.flops for band in assignments)
    scale = high / (1.04 * max(total, plan.balanced_flops, 1))
    each, base = wide / devices, floor
    for name, band, color in zip(_letters(), assignments, colors, strict=False):
        height = band.assignment.cost.flops * scale
        yield Rectangle(left, base - height, wide, height, IDLE)
        for run, busy in _runs(band.busy):
            tall = float(busy) * scale
            yield Rectangle(left + run.start * each, base - tall, len(run) * each, tall, color)
        if height > high / 16:
            yield Words(left + wide + 7, base - height / 2, name, 9, INK)
        base -= height
        yield Line(left, base, left + wide, base, WHITE, 0.8)
    if devices <= 128:
        for edge in range(1, devices):
            x = left + edge * each
            yield Line(x, floor, x, base, WHITE, min(2.0, 64 / devices))
    balanced = floor - plan.balanced_flops * scale
    yield Line(left, balanced, left + wide, balanced, INK, 1.2, dashed=True)
    yield Words(left + wide + 24, balanced, "a balanced\nshare", 9, INK)
    yield Words(left, floor - high - 10, "work of each device", 10, INK, bold=True)
    yield from _axes(left, wide, floor, high, devices)
    for value in _ticks(high / scale / factor):
        y = floor - value * factor * scale
        yield Words(left - 5, y, f"{value:g}", 8, INK, anchor="end")
        yield Line(left - 3, y, left, y, INK, 0.8)
    yield Words(left - 5, floor - high - 10, unit, 9, INK, anchor="end")


def _axes(left: float, wide: float, floor: float, high: float, devices: int) -> Shapes:
    """The two axes, and the numbers of the devices."""
    yield Line(left, floor, left + wide, floor, INK, 0.8)
    yield Line(left, floor, left, floor - high, INK, 0.8)
    for number in range(0, devices, max(devices // 16, 1)):
        x = left + (number + 0.5) * wide / devices
        yield Words(x, floor + 9, str(number), 8, INK, anchor="middle")
    words = "device, in the order of the mesh; grey: waiting for others"
    yield Words(left + wide / 2, floor + 25, words, 9, INK, anchor="middle")


def _ticks(most: float) -> list[float]:
    """About four round numbers from 0 up to `most`.

    >>> _ticks(7.3)
    [0.0, 2.0, 4.0, 6.0]
    """
    step = 10.0 ** math.floor(math.log10(most / 2)) if most > 0 else 1.0
    step *= next(factor for factor in (1, 2, 5) if most / (step * factor) < 5)
    return [number * step for number in range(int(most / step) + 1)]


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
