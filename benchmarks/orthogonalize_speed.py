"""Time Newton-Schulz alone: ours form by form, optax and torch, on matrices of many shapes.

All run five steps of Keller Jordan's coefficients, the way their optimizers run them: ours as the
link `optax_muon.orthogonalize` on one leaf `[batch, rows, cols]`, optax vectorized over the batch,
torch one matrix after the other. Inputs and outputs are float32; the operands of the products are
float32 or bfloat16. Ours rounds only the operands, optax computes in the dtype of its input, and
torch computes in bfloat16, or in float32 with its cast replaced by a copy. Two buckets of 1000
small matrices are compared with one product of as many operations.

    python benchmarks/orthogonalize_speed.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import _bench
import _stacks
import _table
import _torch
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from optax_muon.polar import KELLER, Form, Gram, Panels, Plain, default_restarts

OPTAX, TORCH, PRODUCT = "optax", "torch", "one product"


@dataclasses.dataclass(frozen=True)
class OrthogonalizeTime(_bench.TimedRow):
    """One implementation on one case."""

    form: str
    """How ours evaluates the polynomial; empty for the others."""
    gflops: float
    """Operations of the plain form per second, 1e9, whatever form the implementation uses."""
    over_optax: float
    over_torch: float


SIZES = (
    *((64, 128, 128), (24, 256, 256), (6, 512, 512), (1, 1024, 1024), (1, 2048, 2048)),
    *((24, 256, 512), (3, 512, 1024), (1, 1024, 2816)),
    *((28, 64, 512), (6, 256, 1024), (3, 768, 4096), (1, 1024, 4096), (1, 4096, 1024)),
    *((16, 128, 1024), (8, 128, 4096), (6, 768, 768)),
    *((1000, 64, 512), (1000, 128, 256)),
)
LARGEST = (1, 4096, 4096)
"""In float32 only: a call takes ten seconds on two cores."""
TOY = ((3, 16, 64),)
MANY = 1000
"""The fewest matrices of a case that is compared with one product."""


def cases(quick: bool) -> list[_stacks.Case]:
    """All cases, largest last."""
    both = [_stacks.Case(*size, kind) for size in (TOY if quick else SIZES) for kind in KINDS]
    return both if quick else [*both, _stacks.Case(*LARGEST, "float32")]


KINDS = ("float32", "bfloat16")


def main(options: _bench.Options) -> None:
    """Measure and write the results."""
    measured = functools.partial(measure, repeats=options.repeats)
    _bench.run(
        options,
        "orthogonalize_speed",
        OrthogonalizeTime,
        cases(options.quick),
        measured,
        page,
        picture,
    )


def measure(case: _stacks.Case, repeats: int) -> list[OrthogonalizeTime]:
    """Time all implementations on a case."""
    x = case.normal()
    forms = forms_of(case)
    implementations: dict[str, _bench.Implementation] = {
        name: _stacks.ours(x, case.operands, form) for name, form in forms.items()
    }
    implementations[OPTAX] = _stacks.of_optax(x, case.operands)
    unmodified = case.operands == "bfloat16"
    setting = contextlib.nullcontext if unmodified else _torch.float32
    implementations[TORCH] = _torch.newton_schulz(x, setting)
    if case.batch >= MANY:
        implementations[PRODUCT] = one_product(case)
    times = _bench.measure_in_rounds(implementations, repeats)
    return [
        OrthogonalizeTime(
            str(case),
            name,
            form=str(forms.get(name, "")),
            **each.milliseconds(),
            rounds=len(each.seconds),
            gflops=round(case.plain_flops / each.quartiles[1] / 1e9, 1),
            over_optax=round(each.over(times[OPTAX]), 3),
            over_torch=round(each.over(times[TORCH]), 3),
        )
        for name, each in times.items()
    ]


def forms_of(case: _stacks.Case) -> dict[str, Form]:
    """The chosen form and, if a call is short, the others."""
    restarts = default_restarts(len(KELLER.rows), case.operands)
    others = (Plain(), Plain(Panels(4)), Gram(restarts), Gram(restarts, Panels(4)))
    few = (case.batch, case.rows, case.cols) not in (LARGEST, *TOY)
    return {"ours": case.form} | {
        f"ours, {form}": form for form in others if few and form != case.form
    }


def one_product(case: _stacks.Case) -> _bench.Implementation:
    """A square product of as many operations as the chosen form of the bucket."""
    flops = case.batch * case.form.count(*case.sides, KELLER.rows).flops
    side = round((flops / 2) ** (1 / 3))
    square = np.random.default_rng(0).standard_normal((side, side), np.float32)

    def run(x: jax.Array) -> jax.Array:
        operand = x.astype(case.operands)
        return jnp.matmul(operand, operand, preferred_element_type=jnp.float32)

    return _stacks.compiled(run, square)


def page(rows: Sequence[OrthogonalizeTime]) -> list[str]:
    """The Markdown page."""
    lines = [
        *_bench.page_head("Newton-Schulz alone", __doc__),
        "Milliseconds per call, median [quartiles]; ratios are medians over rounds. GFLOP/s: "
        "operations of the plain form divided by the time of ours.",
    ]
    for kind in KINDS:
        lines += ["", f"## {kind} operands", "", *_table.markdown(*timings(rows, kind))]
    lines += ["", "## Ours by form, over the chosen one", "", *_table.markdown(*by_form(rows))]
    buckets = [row for row in rows if row.implementation == PRODUCT]
    heads = ("bucket", "ours, ms", "one product of the same operations, ms", "ratio")
    mine = {row.case: row for row in rows if row.implementation == "ours"}
    cells = (
        (
            row.case,
            mine[row.case].median_ms,
            row.median_ms,
            f"{mine[row.case].median_ms / row.median_ms:.2f}",
        )
        for row in buckets
    )
    if buckets:
        lines += ["", "## Many small matrices", "", *_table.markdown(heads, cells)]
    return lines


def timings(
    rows: Sequence[OrthogonalizeTime], kind: str
) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Heads and cells: a line for each case, ours and the peers."""
    heads = ("matrices", "form", "ours", "optax", "torch", "/ optax", "/ torch", "GFLOP/s")
    cells = []
    for case, found in _bench.by_case(row for row in rows if row.case.endswith(kind)).items():
        one = found["ours"]
        spread = (
            f"{each.median_ms:.3g} [{each.lower_ms:.3g}, {each.upper_ms:.3g}]"
            for each in (found[name] for name in ("ours", OPTAX, TORCH))
        )
        compared = f"{one.over_optax:.2f}", f"{one.over_torch:.2f}", f"{one.gflops:.0f}"
        cells.append((case.removesuffix(kind), one.form, *spread, *compared))
    return heads, cells


def by_form(rows: Sequence[OrthogonalizeTime]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Heads and cells: a line for each case, a column for each form."""
    ours_rows = [row for row in rows if row.implementation.startswith("ours")]
    forms = sorted({row.form for row in ours_rows})
    base = {row.case: row.median_ms for row in ours_rows if row.implementation == "ours"}
    shown = {(row.case, row.form): f"{row.median_ms / base[row.case]:.2f}" for row in ours_rows}
    for row in ours_rows:
        if row.implementation == "ours":
            shown[row.case, row.form] = "**1**"
    cells = [(case, *(shown.get((case, form), "") for form in forms)) for case in base]
    return ("matrices", *forms), cells


def picture(rows: Sequence[OrthogonalizeTime]) -> Any:
    """Time of ours over optax and torch, by case."""
    mine = [row for row in rows if row.implementation == "ours"]
    series = {
        "over optax": {row.case: row.over_optax for row in mine},
        "over torch": {row.case: row.over_torch for row in mine},
    }
    title = "Newton-Schulz: time of ours over theirs"
    return _bench.ratios([row.case for row in mine], series, title, "ratio, log scale")


if __name__ == "__main__":
    main(tyro.cli(_bench.Options))
