"""Count the operations and bytes of a compiled update, and compare them with lower bounds.

Operations are those of the matrix products in the compiled program, counted in every iteration of a
loop, over those of plain Newton-Schulz. Bytes are those that the program reads and writes according
to XLA, which counts the body of a loop once: programs with loops are marked, and their true figure
is higher. The lower bound is one pass: for a matrix, gradient, momentum and parameter are read,
momentum and parameter written; a leaf of AdamW has one more moment. Nothing is timed.

    python benchmarks/flops_and_bytes.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import _bench
import _jax
import _table
import _trees
import jax.numpy as jnp
import optax
import tyro

import optax_muon
from optax_muon.hlo import flops
from optax_muon.matrices import assign, paths
from optax_muon.polar import KELLER, Plain

OURS, OURS_SHORT, OPTAX = "ours float32", "ours bfloat16", "optax float32"
SHAPES = (
    *((128, 128), (256, 256), (512, 512), (1024, 1024), (2048, 2048), (4096, 4096)),
    *((512, 1024), (1024, 2816), (64, 512), (256, 1024), (1024, 4096), (4096, 1024)),
    *((512, 4096), (128, 4096), (24, 256, 1024), (1000, 128, 256)),
)
TOY = ((16, 64),)


@dataclasses.dataclass(frozen=True)
class UpdateWork:
    """The work of one implementation on one tree."""

    case: str
    implementation: str
    gflop: float
    """Operations of the products, 1e9."""
    over_plain: float
    """Ratio to the operations of plain Newton-Schulz."""
    mbyte: float
    """Bytes that XLA counts, 1e6."""
    over_least: float
    """Ratio to the bytes of one pass over gradients, parameters and state."""
    loops: str
    """`loops` if the program has any: XLA counts their bytes once."""


def main(options: _bench.Options) -> None:
    """Count and write the results."""
    cases = every(options.quick)

    def measured(case: str) -> list[UpdateWork]:
        return measure(case, _trees.abstract(cases[case]()))

    _bench.run(options, "flops_and_bytes", UpdateWork, list(cases), measured, page, picture)


def every(quick: bool) -> dict[str, Callable[[], _trees.Tree]]:
    """Single matrices or stacks, and the trees."""
    single = {
        " x ".join(map(str, shape)): functools.partial(_single, shape)
        for shape in (TOY if quick else SHAPES)
    }
    return single | (_trees.TOYS if quick else _trees.TREES)


def _single(shape: tuple[int, ...]) -> _trees.Tree:
    return {"kernel": shape} if len(shape) == 2 else {"experts": {"up_proj": shape}}


def measure(case: str, params: Any) -> list[UpdateWork]:
    """Compile the update of a tree with each optimizer and count its work."""
    short = functools.partial(optax_muon.newton_schulz, dtype=jnp.bfloat16)
    transformations = {
        OURS: optax_muon.muon(**_jax.MUON),
        OURS_SHORT: optax_muon.muon(**_jax.MUON, orthogonalizer=short),
        OPTAX: _jax.contrib_muon(params),
    }
    plain, least = least_work(params)
    return [counted(case, name, tx, params, plain, least) for name, tx in transformations.items()]


def counted(
    case: str,
    name: str,
    tx: optax.GradientTransformation,
    params: Any,
    plain: int,
    least: int,
) -> UpdateWork:
    """The counts of one program."""
    program = _jax.compile_update(tx, params)
    text = program.as_text()
    operations, traffic = flops(text), program.cost_analysis()["bytes accessed"]
    return UpdateWork(
        case,
        name,
        gflop=round(operations / 1e9, 4),
        over_plain=round(operations / plain, 4),
        mbyte=round(traffic / 1e6, 3),
        over_least=round(traffic / least, 3),
        loops="loops" if " while(" in text else "",
    )


def least_work(params: Any) -> tuple[int, int]:
    """Operations of plain Newton-Schulz, and bytes of one pass, over a tree."""
    operations = least = 0
    views = assign.assign(params)
    for path, leaf in paths.named_leaves(params).items():
        view = views[path]
        least += leaf.size * leaf.dtype.itemsize * (7 if view is None else 5)
        for block in () if view is None else view.bind(leaf.shape).blocks:
            short, long = sorted((block.rows, block.cols))
            operations += block.batch * Plain().count(short, long, KELLER.rows).flops
    return operations, least


def page(rows: Sequence[UpdateWork]) -> list[str]:
    """The Markdown page."""
    names = (OURS, OURS_SHORT, OPTAX)
    heads = (
        "parameters",
        *(f"operations, {name} / plain" for name in names),
        *(f"bytes, {name} / lower bound" for name in names),
    )
    cells = (
        (
            case,
            *(f"{found[name].over_plain:.3f}" for name in names),
            *(_bytes(found[name]) for name in names),
        )
        for case, found in _bench.by_case(rows).items()
    )
    title = "Operations and bytes of a compiled update"
    marked = "(≥): the program has loops."
    return [*_bench.page_head(title, __doc__), *_table.markdown(heads, cells), "", marked]


def _bytes(row: UpdateWork) -> str:
    return f"{row.over_least:.1f}{' (≥)' if row.loops else ''}"


def picture(rows: Sequence[UpdateWork]) -> Any:
    """Operations over those of plain Newton-Schulz."""
    cases = list(dict.fromkeys(row.case for row in rows))
    series = {
        name: {row.case: row.over_plain for row in rows if row.implementation == name}
        for name in (OURS, OURS_SHORT, OPTAX)
    }
    title = "Operations of a compiled update over plain Newton-Schulz's"
    return _bench.ratios(cases, series, title, "ratio, log scale")


if __name__ == "__main__":
    main(tyro.cli(_bench.Options))
