"""Check and time Newton-Schulz and a whole update on a GPU, in one call.

Every form, with and without the kernel for symmetric products, must match the plain form in float32
to within twice the error of the plain form in bfloat16. Then ours by form, optax and torch
orthogonalize stacks with bfloat16 operands, and ours, optax.contrib.muon and torch.optim.Muon
update Llama 3.2 1B. The ceiling is one bfloat16 product of 8192 x 8192 matrices, timed in the same
rounds; effective rates count the operations of the plain form. Only the first GPU is used.

    python benchmarks/gpu.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import _bench
import _jax
import _stacks
import _table
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import optax_muon
from optax_muon.models import spec
from optax_muon.polar import KELLER, Form, Gram, Kernel, Plain, default_restarts

Result = TypeVar("Result")
OPTAX, TORCH, CEILING = "optax", "torch", "one product"
LLAMA = "Llama 3.2 1B"
SIZES = (
    *((16, 1024, 1024), (64, 1024, 1024), (16, 1024, 4096)),
    *((1, 2048, 2048), (8, 2048, 2048), (1, 2048, 8192), (8, 2048, 8192)),
    *((1, 4096, 4096), (4, 4096, 4096), (1, 4096, 8192), (1, 4096, 16384)),
    *((1, 8192, 8192), (1, 8192, 32768), (1000, 128, 256), (1000, 64, 512)),
)
TOY = ((2, 256, 256), (1, 256, 1024))
CEILING_SIDE = 8192
CHECKED = ((2, 384, 384), (1, 500, 1100), (1, 1024, 1024), (1, 1024, 4096))


@dataclasses.dataclass(frozen=True)
class GpuTime(_bench.TimedRow):
    """One implementation on one case; all zeros if it did not run."""

    form: str
    outcome: str
    """`ran`, or the reason why it did not."""
    tflops: float = 0.0
    """Operations of the plain form per second, 1e12; for the ceiling, its own operations."""
    over_ceiling: float = 0.0
    over_optax: float = 0.0


@dataclasses.dataclass(frozen=True)
class Check:
    """A form's error on one shape."""

    case: str
    form: str
    error: float
    """Relative to the plain form in float32; NaN if it did not run."""
    allowed: float
    """Twice the error of the plain form in bfloat16."""


def main(options: _bench.Options) -> int:
    """Check, measure and write the results; returns 1 if a check failed."""
    if jax.default_backend() != "gpu":
        print(f"gpu.py needs a GPU that jax sees; here it sees {jax.default_backend()} only.")
        return 0
    checks = [check for size in CHECKED for check in checked(_stacks.Case(*size, "bfloat16"))]
    every = [_stacks.Case(*size, "bfloat16") for size in (TOY if options.quick else SIZES)]
    picked = [case for case in every if options.picks(str(case))]
    rows = [row for case in _bench.each(picked, "gpu") for row in matrices(case, options.repeats)]
    if options.picks(LLAMA) and not options.quick:
        rows += whole_update(options.repeats)
    rows = _bench.merged(options.folder / "gpu.csv", GpuTime, rows, [*map(str, every), LLAMA])
    _bench.publish(options, "gpu", GpuTime, rows, page(rows, checks), picture(rows))
    return int(any(not check.error <= check.allowed for check in checks))


def forms() -> tuple[Form, ...]:
    """The forms without a kernel, and with it."""
    restarts = default_restarts(len(KELLER.rows), "bfloat16")
    kernel = Kernel("gpu")
    return Plain(), Plain(kernel), Gram(restarts), Gram(restarts, kernel)


def checked(case: _stacks.Case) -> list[Check]:
    """The errors of all forms on a shape."""
    x = case.normal()
    truth = np.asarray(_stacks.ours(x, "float32", Plain())(), np.float64)
    norm = np.linalg.norm(truth)

    def error(form: Form) -> float:
        found, _ = attempted(lambda: np.asarray(_stacks.ours(x, "bfloat16", form)(), np.float64))
        return math.nan if found is None else float(np.linalg.norm(found - truth) / norm)

    allowed = 2 * error(Plain())
    return [Check(str(case), str(form), error(form), allowed) for form in forms()]


def matrices(case: _stacks.Case, repeats: int) -> list[GpuTime]:
    """Time all implementations on a stack."""
    x = case.normal()
    named = {"ours": case.form} | {f"ours, {form}": form for form in forms() if form != case.form}
    makers: dict[str, Callable[[], _bench.Implementation]] = {
        name: functools.partial(_stacks.ours, x, case.operands, form)
        for name, form in named.items()
    }
    makers[OPTAX] = functools.partial(_stacks.of_optax, x, case.operands)
    makers[CEILING] = ceiling
    if torch := torch_on_gpu():
        makers[TORCH] = functools.partial(torch.newton_schulz, x, contextlib.nullcontext, "cuda")
    work = {CEILING: 2 * CEILING_SIDE**3}
    return timed(str(case), makers, {n: str(f) for n, f in named.items()}, repeats, work, case)


def whole_update(repeats: int) -> list[GpuTime]:
    """Time updates of a float32 Llama; the products of its matrices have bfloat16 operands."""
    tree = spec.model(spec.named_configs()["llama3-1b"]).abstract_params
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), (2, len(leaves)))
    params, grads = (
        structure.unflatten(
            jax.random.normal(key, leaf.shape) for key, leaf in zip(row, leaves, strict=True)
        )
        for row in keys
    )
    makers: dict[str, Callable[[], _bench.Implementation]] = {
        "ours": lambda: _jax.Update(optax_muon.muon(**_jax.MUON), params, grads),
        OPTAX: lambda: _jax.Update(_jax.contrib_muon(params), params, grads),
    }
    if torch := torch_on_gpu():
        makers[TORCH] = lambda: torch.Update(params, grads, contextlib.nullcontext, "cuda")
    return timed(LLAMA, makers, {}, repeats, {}, None)


def timed(
    case: str,
    makers: dict[str, Callable[[], _bench.Implementation]],
    named: dict[str, str],
    repeats: int,
    work: dict[str, int],
    stack: _stacks.Case | None,
) -> list[GpuTime]:
    """Time the implementations that run once; those that fail get a row with the reason."""
    ready: dict[str, _bench.Implementation] = {}
    failed = []
    for name, make in makers.items():
        run, outcome = attempted(functools.partial(ran_once, make))
        if run is None:
            failed.append(GpuTime(case, name, 0.0, 0.0, 0.0, 0, named.get(name, ""), outcome))
        else:
            ready[name] = run
    times = _bench.measure_in_rounds(ready, repeats)
    operations = {name: work.get(name, stack.plain_flops if stack else 0) for name in ready}
    rate = {name: operations[name] / times[name].quartiles[1] for name in ready}
    return failed + [
        GpuTime(
            case,
            name,
            **each.milliseconds(),
            rounds=len(each.seconds),
            form=named.get(name, ""),
            outcome="ran",
            tflops=round(rate[name] / 1e12, 1),
            over_ceiling=round(rate[name] / rate[CEILING], 3) if CEILING in rate else 0.0,
            over_optax=round(each.over(times[OPTAX]), 3) if OPTAX in times else 0.0,
        )
        for name, each in times.items()
    ]


def ran_once(make: Callable[[], _bench.Implementation]) -> _bench.Implementation:
    """Make an implementation and run it once."""
    run = make()
    jax.block_until_ready(run())
    return run


def attempted(work: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result and `ran`, or None and the reason: one failure must not cost the other rows."""
    try:
        return work(), "ran"
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return None, f"{type(error).__name__}: {first[:200]}"


def ceiling() -> _bench.Implementation:
    """One large product of bfloat16 matrices."""
    square = np.random.default_rng(0).standard_normal((CEILING_SIDE,) * 2, np.float32)
    operand = jnp.asarray(square, jnp.bfloat16)
    return functools.partial(
        jax.jit(jnp.matmul).lower(operand, operand).compile(), operand, operand
    )


def torch_on_gpu() -> Any:
    """The implementations of torch, or None if it sees no GPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    usable = importlib.import_module("torch").cuda.is_available()
    return importlib.import_module("_torch") if usable else None


def page(rows: Sequence[GpuTime], checks: Sequence[Check]) -> list[str]:
    """The Markdown page."""
    heads = ("case", "implementation", "form", "ms", "TFLOP/s", "/ ceiling", "/ optax")
    cells = (
        (
            row.case,
            row.implementation,
            row.form,
            f"{row.median_ms:.3f} [{row.lower_ms:.3f}, {row.upper_ms:.3f}]",
            f"{row.tflops:.0f}" if row.tflops else "",
            f"{row.over_ceiling:.2f}" if row.over_ceiling else "",
            f"{row.over_optax:.2f}" if row.over_optax else "",
        )
        if row.outcome == "ran"
        else (row.case, row.implementation, row.form, row.outcome, "", "", "")
        for row in rows
    )
    errors = (
        (
            check.case,
            check.form,
            f"{check.error:.2e}",
            f"{check.allowed:.2e}",
            "yes" if check.error <= check.allowed else "**no**",
        )
        for check in checks
    )
    return [
        *_bench.page_head("On a GPU", __doc__),
        "## Errors against the plain form in float32",
        "",
        *_table.markdown(("matrices", "form", "error", "allowed", "within"), errors),
        "",
        "## Times",
        "",
        *_table.markdown(heads, cells),
    ]


def picture(rows: Sequence[GpuTime]) -> Any:
    """Effective rates over the ceiling."""
    ran = [row for row in rows if row.over_ceiling and row.implementation != CEILING]
    names = {row.form or row.implementation for row in ran}
    series = {
        name: {
            row.case: row.over_ceiling for row in ran if (row.form or row.implementation) == name
        }
        for name in sorted(names)
    }
    cases = list(dict.fromkeys(row.case for row in ran))
    title = "Effective rate over that of one large product"
    return _bench.ratios(cases, series, title, "ratio, log scale")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(_bench.Options)))
