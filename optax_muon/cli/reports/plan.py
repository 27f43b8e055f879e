"""The plan's picture as a PNG: the drawing of `Plan.picture`, in pixels."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patches import Rectangle as RectanglePatch
from PIL import Image

from optax_muon import Plan
from optax_muon.drawing import Drawing, Line, Rectangle, Words


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
    figure(plan.picture(title)).savefig(drawn, format="png", dpi=dpi)
    with Image.open(drawn) as image:
        # 64 colors are enough, and the file is a quarter of the size.
        image.convert("RGB").quantize(64).save(packed, "png", optimize=True)
    return packed.getvalue()


def figure(drawing: Drawing) -> matplotlib.figure.Figure:
    """The drawing as a figure, a point of the one a point of the other."""
    drawn = matplotlib.figure.Figure(figsize=(drawing.width / 72, drawing.height / 72))
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.axis("off")
    for order, shape in enumerate(drawing.shapes):
        if isinstance(shape, Words):
            anchor = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
            weight = "bold" if shape.bold else "normal"
            style: dict[str, Any] = {"color": shape.color, "weight": weight, "zorder": order}
            for y, line in shape.lines:
                axes.text(shape.x, y, line, size=shape.size, ha=anchor, va="center", **style)
        else:
            axes.add_artist(_patch(shape, order))
    return drawn


def _patch(shape: Rectangle | Line, order: int) -> Patch | Line2D:
    if isinstance(shape, Rectangle):
        place, size = (shape.x, shape.y), (shape.width, shape.height)
        return RectanglePatch(place, *size, color=shape.color, linewidth=0, zorder=order)
    style: Any = (0, (4, 3)) if shape.dashed else "-"
    xs, ys = (shape.x1, shape.x2), (shape.y1, shape.y2)
    width, color = shape.width, shape.color
    return Line2D(xs, ys, color=color, linewidth=width, linestyle=style, zorder=order)
