"""Compile orthogonalizations for TPUs that we do not own, and read the compiler's cycle estimates.

The compiler for TPUs notes with most instructions how many clock cycles it expects of them. That is
a model of the compiler's, not a measurement. `optax_muon.hlo.cycles` sums the estimates. The limit
is what the products of the cheaper form take if the matrix units never wait: operations over
operations per cycle, where the Gram form has the restarts that bfloat16 needs, before steps 2 and
4. With one restart before step 3 it would do less, and diverge on some matrices: the least limit.
Inputs and outputs are float32, products have bfloat16 operands, five steps. Ours is compiled with
the compiler's defaults, and in some rows with `OPTIONS`.

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
from typing import Any

import _table
import _topologies
import jax
import jax.numpy as jnp
import matplotlib.figure
from _topologies import CHIPS, Chip
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import _muon as contrib

from optax_muon.cli.reports import pictures
from optax_muon.polar import (
    KELLER,
    Barrier,
    Gram,
    Plain,
    choose_form,
    gram_newton_schulz,
    newton_schulz,
)
from optax_muon.training.styles import STYLES

TABLE = Path(__file__).parent / "results" / "tpu_cycles.csv"
PAGE, PLOT = TABLE.with_suffix(".md"), TABLE.with_suffix(".png")
LIMIT = 240
"""Seconds of processor time that a row may take."""


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    # By default a fusion may use 16 MiB of VMEM, and large products read their operands too often.
    "24 MiB of VMEM": {"xla_tpu_scoped_vmem_limit_kib": 24576},
    "32 MiB of VMEM": {"xla_tpu_scoped_vmem_limit_kib": 32768},
}
"""Compiler options by their name in the table."""


TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5p": "v5p:2x2x1",
    "v5e": "v5e:2x2",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:1x2x1",
}
"""A slice of each chip that libtpu knows, with four devices."""

SHAPES = {
    "Llama 8B, attention": (4096, 4096),
    "Llama 8B, MLP": (4096, 14336),
    "Llama 1B, MLP": (2048, 5632),
    "DeepSeek, expert": (7168, 2048),
    "ViT-L, MLP": (1024, 4096),
    "ViT-L, MLP, 8 of them": (8, 1024, 4096),
    "ViT-L, attention, 24 of them": (24, 1024, 1024),
    "Llama 1B, attention": (2048, 2048),
    "Moonlight, attention": (2048, 3072),
    "Moonlight, expert, 8 of them": (8, 1408, 2048),
    "Llama 70B, attention": (8192, 8192),
    "Llama 70B, MLP": (8192, 28672),
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
    "plain": lambda x: newton_schulz(x, form=Plain(Barrier())),
    "Gram 3": gram_newton_schulz,
    "plain jnp loop": plain_loop,
    "optax.contrib.muon": of_optax,
}
OURS = ("plain", "Gram 3")
"""Forms of `newton_schulz`, as they are printed."""


@dataclasses.dataclass(frozen=True)
class CompiledProduct:
    """One orthogonalization on one device, in cycles as the compiler estimates them."""

    chip: str
    case: str
    shape: str
    implementation: str
    """A form of ours, or a peer."""
    options: str
    """A key of `OPTIONS`."""
    outcome: str
    """`compiled`, or the reason why not."""
    products: int = 0
    """Cycles of matrix products, with what is fused into them."""
    rest: int = 0
    """Cycles of everything else that has an estimate."""
    limit: int = 0
    """Cycles of the products of the cheaper form at the peak of the matrix units."""
    least: int = 0
    """The same of the form with the fewest operations, restarted once."""

    @property
    def over_limit(self) -> float:
        """All cycles over the limit."""
        return (self.products + self.rest) / self.limit if self.limit else math.nan

    @property
    def is_chosen(self) -> bool:
        """Whether it is the form that `newton_schulz` chooses."""
        return self.implementation == chosen(self.case)

    @property
    def title(self) -> str:
        """The implementation as the page names it."""
        return (
            f"ours, {self.implementation}" if self.implementation in OURS else self.implementation
        )


def fill_table() -> None:
    """Compile the rows that are not in the table yet."""
    rows = _topologies.fill(
        TABLE,
        CompiledProduct,
        cases(),
        lambda row: (row.chip, row.case, row.implementation, row.options),
        in_process,
    )
    PAGE.write_text(page(rows))
    draw(rows)


_TOGETHER = tuple(SHAPES)[:6]
CASES = {
    "v4": ("Llama 8B, attention", "ViT-L, attention, 24 of them"),
    "v5p": tuple(SHAPES),
    "v5e": _TOGETHER[:4],
    "v6e": ("Llama 8B, attention", "Llama 1B, MLP", "DeepSeek, expert"),
    "7x": ("Llama 8B, attention", "Llama 8B, MLP", "Llama 1B, MLP", "DeepSeek, expert"),
}
"""What is compiled for each chip."""
WITH_PEERS = {"v5p": _TOGETHER, "v5e": _TOGETHER}
"""What is compiled of the peers: elsewhere our forms only."""
WITH_OPTIONS = {"v5p": "32 MiB of VMEM", "v6e": "24 MiB of VMEM"}
"""The options under which the chosen form of a shape in `_TOGETHER` is compiled as well."""


def cases() -> list[tuple[str, str, str, str]]:
    """Chip, case, implementation and options of every row."""
    return [
        (chip, case, name, options)
        for chip in CHIPS
        for case, name in itertools.product(CASES[chip], IMPLEMENTATIONS)
        if name in OURS or case in WITH_PEERS.get(chip, ())
        for options in options_of(chip, case, name)
    ]


def options_of(chip: str, case: str, name: str) -> tuple[str, ...]:
    """The options under which an implementation is compiled, the compiler's defaults first."""
    more = chip in WITH_OPTIONS and case in _TOGETHER and name == chosen(case)
    return ("", WITH_OPTIONS[chip]) if more else ("",)


def chosen(case: str) -> str:
    """The form that `newton_schulz` chooses for TPUs."""
    m, n = sorted(SHAPES[case][-2:])
    return str(choose_form(m, n, KELLER.rows, dtype="bfloat16", platform="tpu"))


def in_process(chip: str, case: str, implementation: str, options: str) -> CompiledProduct:
    """Compile a row in a process of its own."""
    found = _topologies.in_process(__file__, (chip, case, implementation, options), LIMIT)
    if isinstance(found, str):
        return CompiledProduct(chip, case, in_words(SHAPES[case]), implementation, options, found)
    return CompiledProduct(**found)


def compile_row(chip: str, case: str, implementation: str, options: str) -> CompiledProduct:
    """Compile an orthogonalization for one device and read the program."""
    from chips import chips

    from optax_muon.hlo import cycles

    mesh = chips(TOPOLOGIES[chip], {"chip": 4}, AxisType.Auto)
    shape = SHAPES[case]
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    lowered = jax.jit(IMPLEMENTATIONS[implementation], out_shardings=x.sharding).lower(x)
    found = cycles(lowered.compile(OPTIONS[options]).as_text())
    return CompiledProduct(
        chip,
        case,
        in_words(shape),
        implementation,
        options,
        "compiled",
        found.products,
        found.rest,
        *limits(shape, CHIPS[chip]),
    )


def limits(shape: Sequence[int], chip: Chip) -> tuple[int, int]:
    """The fewest cycles of the products of five steps: with restarts (2, 4), and with (3,)."""
    m, n = sorted(shape[-2:])
    plain, *grams = (
        form.count(m, n, KELLER.rows).flops for form in (Plain(), Gram((2, 4)), Gram((3,)))
    )
    cycles = [math.prod(shape[:-2]) * min(plain, gram) / chip.flops_per_cycle for gram in grams]
    return round(cycles[0]), round(cycles[1])


def in_words(shape: Sequence[int]) -> str:
    """A shape in words."""
    return " x ".join(map(str, shape))


HEADS = (
    *("matrices", "implementation", "options", "products", "rest"),
    *("limit", "over the limit", "over the least"),
)


INTRODUCTION = """\
Made by `benchmarks/tpu_cycles.py`, which says what is compiled. Million clock cycles of one device
as the TPU compiler estimates them: a model, not a measurement. The limit is that of the cheaper
form's products at the peak of the matrix units; the Gram form has the restarts that bfloat16 needs,
and one restart only for the least limit. The chosen form of ours is in bold."""


ALT = (
    "Bars of the cycles over the limit, a panel for each chip and a group for each shape: ours, "
    "ours with more VMEM, a plain loop, and optax.contrib.muon."
)
"""What the picture shows, for those who do not see it."""


def page(rows: Sequence[CompiledProduct]) -> str:
    """The Markdown page."""
    title = "# Orthogonalizations for TPUs, by the compiler's estimate"
    lines = [title, "", INTRODUCTION, "", _topologies.versions()]
    for chip in CHIPS:
        cells = [
            (
                f"{row.case}: {row.shape}",
                f"**ours, {row.implementation}**" if row.is_chosen else row.title,
                row.options,
                *(f"{n / 1e6:.2f}" for n in (row.products, row.rest, row.limit)),
                f"{row.over_limit:.2f}",
                f"{(row.products + row.rest) / row.least:.2f}",
            )
            if row.outcome == "compiled"
            else (f"{row.case}: {row.shape}", row.title, row.options, row.outcome, *[""] * 4)
            for row in sorted(rows, key=lambda row: list(SHAPES).index(row.case))
            if row.chip == chip
        ]
        lines += ["", f"## {chip}", "", *_table.markdown(HEADS, cells)]
    return "\n".join([*lines, "", f"![{ALT}]({PLOT.name})", ""])


def draw(rows: Sequence[CompiledProduct]) -> None:
    """All cycles over the limit: a panel for each chip, a group for each shape."""
    figure = matplotlib.figure.Figure(figsize=(15, 12), dpi=120, layout="constrained")
    drawn = {
        "ours": lambda row: row.is_chosen and not row.options,
        "ours, more VMEM": lambda row: row.is_chosen and row.options,
        "plain jnp loop": lambda row: row.implementation == "plain jnp loop",
        "optax.contrib.muon": lambda row: row.implementation == "optax.contrib.muon",
    }
    for axes, chip in zip(figure.subplots(len(CHIPS), 1, sharex=True), CHIPS, strict=True):
        looks = zip(STYLES, ("", "//", "..", "xx"), strict=False)
        for i, ((name, shows), (style, hatch)) in enumerate(zip(drawn.items(), looks, strict=True)):
            found = {r.case: r.over_limit for r in rows if r.chip == chip and shows(r)}
            place = [j + 0.2 * (i - 1.5) for j in range(len(SHAPES))]
            heights = [found.get(case, math.nan) for case in SHAPES]
            look = {"color": style.color, "hatch": hatch, "edgecolor": "white", "label": name}
            axes.bar(place, heights, 0.19, **look)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=f"TPU {chip}", ylabel="cycles over the limit")
        names = (f"{case.replace(', ', chr(10))}\n{in_words(s)}" for case, s in SHAPES.items())
        axes.set_xticks(range(len(SHAPES)), [*names], fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, ncols=4, loc="upper left")
    pictures.save(figure, PLOT)


if __name__ == "__main__":
    _topologies.main(sys.argv[1:], compile_row, fill_table)
