"""The plan as a table for people: one line per assignment, and the totals per device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from optax_muon.platforms import PLATFORMS, is_known, slow_bfloat16
from optax_muon.sharding.assignment import Assignment
from optax_muon.sharding.bucket_plan import BucketPlan
from optax_muon.sharding.mesh import mesh_kind

if TYPE_CHECKING:
    from optax_muon.sharding.plan import Plan

HEADERS = (
    *("matrices", "rows over", "cols over", "layout", "worked on by", "each"),
    *("padding", "chunks", "form", "GFLOP", "MiB of results", "MiB held", "modelled time"),
)


def table(plan: Plan) -> str:
    """One line per assignment, and the totals per device.

    `GFLOP`, `MiB of results` (of collectives) and `MiB held` (temporary arrays) are per device and
    update.
    """
    title, *totals = summary(plan)
    return "\n".join((title, "", *_aligned(rows(plan)), "", *totals))


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """The table's cells, the heading first."""
    assigned = [(bucket, each) for bucket in plan.buckets for each in bucket.assignments]
    return [HEADERS, *(_row(bucket, each) for bucket, each in assigned)]


def summary(plan: Plan) -> list[str]:
    """The title, and the lines of the totals."""
    return [_title(plan), *_totals(plan)]


def _title(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_axes.items())
    devices = f"{plan.devices} devices ({mesh})" if plan.devices > 1 else "one device"
    steps = f"{plan.work.steps} steps in " if plan.work.steps else ""
    return f"Muon on {devices}: {steps}{plan.work.dtype}"


def _row(bucket_plan: BucketPlan, assignment: Assignment) -> tuple[str, ...]:
    bucket, cost = bucket_plan.bucket, assignment.cost
    return (
        f"{assignment.count * bucket_plan.copies} x ({bucket.rows} x {bucket.cols})",
        " ".join(bucket.rows_over) or "-",
        " ".join(bucket.cols_over) or "-",
        assignment.layout,
        assignment.describe(bucket_plan.copies),
        str(assignment.owned),
        str(assignment.padding),
        str(assignment.chunks),
        assignment.form or "-",
        f"{cost.flops / 1e9:.1f}",
        f"{cost.collective_bytes / 2**20:.1f}",
        f"{cost.memory / 2**20:.0f}",
        _compared(bucket_plan.seconds) if assignment.start == 0 else "remainder",
    )


def _compared(seconds: Mapping[str, float]) -> str:
    """Modelled time of a bucket, and that of the layouts that were not chosen."""
    chosen = seconds["chosen"]
    others = (f"{name} {each / chosen:.2g}x" for name, each in seconds.items() if name != "chosen")
    return f"{chosen * 1e3:.2g} ms ({', '.join(others)})"


def _totals(plan: Plan) -> Iterator[str]:
    cost = plan.cost
    yield f"per device {cost.flops / 1e9:.1f} GFLOP, {plan.load_ratio:.2f}x a balanced share"
    yield (
        f"           {cost.received_bytes / 2**20:.1f} MiB received,"
        f" {plan.received_ratio:.2f}x the lower bound"
        f" ({cost.collective_bytes / 2**20:.1f} MiB of results of collectives)"
    )
    yield f"           {cost.memory / 2**20:.0f} MiB of temporary arrays at the peak"
    yield (
        f"modelled time {plan.seconds * 1e3:.3g} ms:"
        f" {plan.product_seconds * 1e3:.2g} ms of products"
        f" + {plan.pass_seconds * 1e3:.2g} ms of passes over the arrays"
        f" + {plan.exposed_seconds * 1e3:.2g} ms of exposed communication"
        f" (of {plan.message_seconds * 1e3:.2g} ms)"
    )
    yield (
        f"a step communicates {plan.comm_vs_adamw:.3f}x the bytes of a step of distributed AdamW"
    )
    kind = plan.mesh and mesh_kind(plan.mesh)
    if kind and not is_known(kind) and plan.device in PLATFORMS:
        yield (
            f"no rates of {kind} are known: the times are those of {PLATFORMS[plan.device].kind},"
            " and only compare layouts"
        )
    if remark := slow_bfloat16(plan.work.platform, plan.work.dtype):
        yield remark


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
