"""Compile orthogonalizations for TPUs that we do not own, and read the compiler's cycle estimates.

The compiler for TPUs notes with most instructions how many clock cycles it expects of them. That is
a model of the compiler's, not a measurement. `optax_muon.hlo.cycles` sums the estimates; the limit
is what the products of the cheapest form take if the matrix units never wait: operations over
operations per cycle. Inputs and outputs are float32, products have bfloat16 operands, five steps.

    pip install -e '.[tpu]' && python benchmarks/tpu_cycles.py

Every row is compiled in a process of its own with a time limit. Rows that are already in the table
are kept: delete a line of results/tpu_cycles.csv to compile it again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import _table
import _topologies
import jax
import jax.numpy as jnp
import matplotlib.figure
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import _muon as contrib

from optax_muon.polar import KELLER, Gram, Plain, gram_newton_schulz, newton_schulz

TABLE = Path(__file__).parent / "results" / "tpu_cycles.csv"
PAGE, PLOT = TABLE.with_suffix(".md"), TABLE.with_suffix(".png")
LIMIT = 240
"""Seconds of processor time that a row may take."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs."""

    topology: str
    """The smallest slice that libtpu knows."""
    flops_per_cycle: int
    """Operations of all matrix units per cycle: 2 x units x rows x columns."""


CHIPS = {
    "v5p": Chip("v5p:2x2x1", 2 * 8 * 128 * 128),
    "v5e": Chip("v5e:2x2", 2 * 4 * 128 * 128),
}

SHAPES = {
    "Llama 8B, attention": (4096, 4096),
    "Llama 8B, MLP": (4096, 14336),
    "Llama 1B, MLP": (2048, 5632),
    "DeepSeek, expert": (7168, 2048),
    "ViT-L, MLP": (1024, 4096),
    "ViT-L, MLP, 8 of them": (8, 1024, 4096),
}


def plain_loop(x: jax.Array) -> jax.Array:
    """Keller Jordan's loop as he writes it, in bfloat16, on a stack [..., m, n]."""
    a, b, c = KELLER.rows[0]
    y = x.astype(jnp.bfloat16)
    y = y.mT if y.shape[-2] > y.shape[-1] else y
    y = y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if x.shape[-2] > x.shape[-1] else y).astype(x.dtype)


def of_optax(x: jax.Array) -> jax.Array:
    """What `optax.contrib.muon` computes of a stack, in its dtype, float32."""

    def one(x: jax.Array) -> jax.Array:
        return contrib.orthogonalize_via_newton_schulz(x, jnp.asarray(KELLER.rows[0]))

    return one(x) if x.ndim == 2 else jax.vmap(one)(x)


IMPLEMENTATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "optax-muon": newton_schulz,
    "optax-muon, restart at 3": lambda x: gram_newton_schulz(x, restarts=(3,)),
    "plain jnp loop": plain_loop,
    "optax.contrib.muon": of_optax,
}


@dataclasses.dataclass(frozen=True)
class CompiledProduct:
    """One orthogonalization on one device, in cycles as the compiler estimates them."""

    chip: str
    case: str
    shape: str
    implementation: str
    outcome: str
    """`compiled`, or the reason why not."""
    products: int = 0
    """Cycles of matrix products, with what is fused into them."""
    rest: int = 0
    """Cycles of everything else that has an estimate."""
    limit: int = 0
    """Cycles of the products of the cheapest form at the peak of the matrix units."""

    @property
    def over_limit(self) -> float:
        """All cycles over the limit."""
        return (self.products + self.rest) / self.limit if self.limit else math.nan


def fill_table() -> None:
    """Compile the rows that are not in the table yet."""
    rows = _topologies.fill(
        TABLE,
        CompiledProduct,
        itertools.product(CHIPS, SHAPES, IMPLEMENTATIONS),
        lambda row: (row.chip, row.case, row.implementation),
        in_process,
    )
    PAGE.write_text(page(rows))
    draw(rows)


def in_process(chip: str, case: str, implementation: str) -> CompiledProduct:
    """Compile a row in a process of its own."""
    found = _topologies.in_process(__file__, (chip, case, implementation), LIMIT)
    if isinstance(found, str):
        return CompiledProduct(chip, case, in_words(SHAPES[case]), implementation, found)
    return CompiledProduct(**found)


def compile_row(chip: str, case: str, implementation: str) -> CompiledProduct:
    """Compile an orthogonalization for one device and read the program."""
    from chips import chips

    from optax_muon.hlo import cycles

    mesh = chips(CHIPS[chip].topology, {"chip": 4}, AxisType.Auto)
    shape = SHAPES[case]
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    text = jax.jit(IMPLEMENTATIONS[implementation]).lower(x).compile().as_text()
    found = cycles(text)
    return CompiledProduct(
        chip,
        case,
        in_words(shape),
        implementation,
        "compiled",
        found.products,
        found.rest,
        limit_of(shape, CHIPS[chip]),
    )


def limit_of(shape: Sequence[int], chip: Chip) -> int:
    """The fewest cycles that the products of five steps can take, plain or with one restart."""
    m, n = sorted(shape[-2:])
    forms = (Plain(), Gram((3,)))
    work = min(form.count(m, n, KELLER.rows).flops for form in forms)
    return round(math.prod(shape[:-2]) * work / chip.flops_per_cycle)


def in_words(shape: Sequence[int]) -> str:
    """A shape in words."""
    return " x ".join(map(str, shape))


HEADS = ("matrices", "implementation", "products", "rest", "limit", "over the limit")


INTRODUCTION = """\
Made by `benchmarks/tpu_cycles.py`, which says what is compiled. Million clock cycles of one device
as the TPU compiler estimates them: a model, not a measurement. The limit is that of the cheapest
form's products at the peak of the matrix units."""


def page(rows: Sequence[CompiledProduct]) -> str:
    """The Markdown page."""
    title = "# Orthogonalizations for TPUs, by the compiler's estimate"
    lines = [title, "", INTRODUCTION, "", _topologies.versions()]
    for chip in CHIPS:
        cells = [
            (
                f"{row.case}: {row.shape}",
                row.implementation,
                *(f"{n / 1e6:.2f}" for n in (row.products, row.rest, row.limit)),
                f"{row.over_limit:.2f}",
            )
            if row.outcome == "compiled"
            else (f"{row.case}: {row.shape}", row.implementation, row.outcome, "", "", "")
            for row in rows
            if row.chip == chip
        ]
        lines += ["", f"## {chip}", "", *_table.markdown(HEADS, cells)]
    return "\n".join([*lines, "", f"![cycles over the limit]({PLOT.name})", ""])


def draw(rows: Sequence[CompiledProduct]) -> None:
    """All cycles over the limit: a panel for each chip, a group for each shape."""
    figure = matplotlib.figure.Figure(figsize=(11, 7), dpi=120, layout="constrained")
    for axes, chip in zip(figure.subplots(len(CHIPS), 1, sharex=True), CHIPS, strict=True):
        for i, name in enumerate(IMPLEMENTATIONS):
            found = {
                r.case: r.over_limit for r in rows if (r.chip, r.implementation) == (chip, name)
            }
            place = [j + 0.2 * (i - 1.5) for j in range(len(SHAPES))]
            axes.bar(place, [found.get(case, math.nan) for case in SHAPES], 0.19, label=name)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=f"TPU {chip}", ylabel="cycles over the limit")
        axes.set_xticks(range(len(SHAPES)), [f"{c}\n{in_words(s)}" for c, s in SHAPES.items()])
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, ncols=4, loc="upper left")
    figure.savefig(PLOT)


if __name__ == "__main__":
    _topologies.main(sys.argv[1:], compile_row, fill_table)
