"""Time the compilation of an update and measure the program as a model gets deeper.

The parameters are the matrices of a Llama of width 64, 7 per layer: one leaf each, or scanned into
7 leaves. They are so small that only their number matters. Seconds include lowering and
compilation, with caches cleared before; the program's size is that of its HLO text.

    python benchmarks/compile_time.py
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import _bench
import _jax
import _table
import _trees
import jax
import jax.numpy as jnp
import matplotlib.figure
import optax
import tyro

import optax_muon
from optax_muon.training.styles import STYLES

OURS, OPTAX = "ours", "optax"
LAYERS = (4, 16, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A depth, with one leaf per matrix or scanned."""

    layers: int
    scanned: bool

    def __str__(self) -> str:
        return f"{7 * self.layers} {'scanned' if self.scanned else 'unrolled'}"


@dataclasses.dataclass(frozen=True)
class CompileTime(_bench.TimedRow):
    """One implementation on one tree."""

    hlo_bytes: int
    over_optax: float
    over_shallowest: float
    """Ratio to the median of the same implementation at the smallest depth."""


def main(options: _bench.Options) -> None:
    """Measure and write the results."""
    layers = (1, 2) if options.quick else LAYERS
    cases = [Case(depth, scanned) for scanned in (False, True) for depth in layers]
    jax.jit(jnp.sin).lower(0.0).compile()  # the first compilation also starts the compiler
    measured = functools.partial(measure, rounds=min(3, options.repeats))
    _bench.run(options, "compile_time", CompileTime, cases, measured, page, picture, growth)


def measure(case: Case, rounds: int) -> list[CompileTime]:
    """Compile the update of a tree with ours and with optax, in every round."""
    params = _trees.abstract(_trees.matrices_of_llama(case.layers, scanned=case.scanned))
    implementations = {
        OURS: optax_muon.muon(**_jax.MUON),
        OPTAX: _jax.contrib_muon(params),
    }
    taken: dict[str, list[float]] = {name: [] for name in implementations}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        for name, tx in implementations.items():
            seconds, sizes[name] = compiled(tx, params)
            taken[name].append(seconds)
    times = {name: _bench.Times(tuple(seconds)) for name, seconds in taken.items()}
    return [
        CompileTime(
            str(case),
            name,
            **each.milliseconds(),
            rounds=rounds,
            hlo_bytes=sizes[name],
            over_optax=round(each.over(times[OPTAX]), 3),
            over_shallowest=0.0,
        )
        for name, each in times.items()
    ]


def compiled(tx: optax.GradientTransformation, params: Any) -> tuple[float, int]:
    """Seconds to compile an update from scratch, and bytes of its HLO text."""
    jax.clear_caches()
    start = time.perf_counter()
    program = _jax.compile_update(tx, params)
    return time.perf_counter() - start, len(program.as_text())


def growth(rows: Sequence[CompileTime]) -> list[CompileTime]:
    """The rows with their growth over the least depth of the same kind."""
    first: dict[tuple[str, str], float] = {}
    for row in rows:
        first.setdefault((row.implementation, row.case.split()[1]), row.median_ms)
    return [
        dataclasses.replace(
            row,
            over_shallowest=round(
                row.median_ms / first[row.implementation, row.case.split()[1]], 3
            ),
        )
        for row in rows
    ]


def page(rows: Sequence[CompileTime]) -> list[str]:
    """The Markdown page."""
    heads = ("matrices", "implementation", "seconds", "/ optax", "/ shallowest", "HLO, kB")
    cells = (
        (
            row.case,
            row.implementation,
            f"{row.median_ms / 1e3:.2f} [{row.lower_ms / 1e3:.2f}, {row.upper_ms / 1e3:.2f}]",
            f"{row.over_optax:.2f}",
            f"{row.over_shallowest:.2f}",
            f"{row.hlo_bytes / 1e3:.0f}",
        )
        for row in rows
    )
    return [*_bench.page_head("Compiling an update", __doc__), *_table.markdown(heads, cells)]


def picture(rows: Sequence[CompileTime]) -> matplotlib.figure.Figure:
    """Seconds by the number of matrices."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        title="Compiling an update", xlabel="matrices", ylabel="seconds", xscale="log", yscale="log"
    )
    for kind, filled in (("unrolled", "full"), ("scanned", "none")):
        for name, style in zip((OPTAX, OURS), STYLES, strict=False):
            mine = [row for row in rows if row.implementation == name and row.case.endswith(kind)]
            points = [(int(row.case.split()[0]), row.median_ms / 1e3) for row in mine]
            if points:
                curve = {**style.curve(), "fillstyle": filled, "label": f"{name}, {kind}"}
                axes.plot(*zip(*points, strict=True), **curve)
    depths = sorted({int(row.case.split()[0]) for row in rows})
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(tyro.cli(_bench.Options))
