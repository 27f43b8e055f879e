"""The plan as a person reads it, and as a machine does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from optax_muon.sharding.layouts import GATHER, HOME, LOCAL, Lot
from optax_muon.sharding.specs import axis_sizes

if TYPE_CHECKING:
    from optax_muon.sharding.plan import Dealt, Plan

HEADS = (
    *("matrices", "rows over", "cols over", "layout", "worked on by", "each"),
    *("idle", "turns", "GFLOP", "MiB moved", "MiB held", "modelled time"),
)


def table(plan: Plan) -> str:
    """A line for every lot of matrices, and the totals per device."""
    rows = [_row(dealt, lot) for dealt in plan.buckets for lot in dealt.lots]
    return "\n".join((_title(plan), "", *_aligned([HEADS, *rows]), "", *_totals(plan)))


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything in plain numbers, strings and lists; sizes in bytes, work in operations."""
    return {
        "mesh": axis_sizes(plan.mesh),
        "devices": plan.devices,
        "dtype": str(plan.work.dtype),
        "steps": plan.work.steps,
        "flops": plan.cost.flops,
        "even_flops": plan.even_flops,
        "bytes": plan.cost.bytes,
        "wire": plan.cost.wire,
        "least": plan.cost.least,
        "memory": plan.cost.memory,
        "buckets": [_bucket(dealt) for dealt in plan.buckets],
    }


def _title(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in axis_sizes(plan.mesh).items())
    where = f"{plan.devices} devices ({mesh})" if mesh else "one device"
    return f"Muon on {where}: {plan.work.steps} steps in {plan.work.dtype}"


def _row(dealt: Dealt, lot: Lot) -> tuple[str, ...]:
    bucket, cost = dealt.bucket, lot.cost
    first = lot is dealt.lots[0]
    return (
        f"{lot.count * dealt.copies} x ({bucket.rows} x {bucket.cols})",
        " ".join(bucket.rows_over) or "-",
        " ".join(bucket.cols_over) or "-",
        lot.layout,
        _workers(dealt, lot),
        str(lot.owned),
        str(lot.padding),
        str(lot.rounds),
        f"{cost.flops / 1e9:.1f}",
        f"{cost.bytes / 2**20:.1f}",
        f"{cost.memory / 2**20:.0f}",
        _why(dealt) if first else "remainder",
    )


def _workers(dealt: Dealt, lot: Lot) -> str:
    """Who works: `64`, or `32 pairs` as `32 x 2`."""
    if lot.layout in (LOCAL, GATHER):
        return "each device" if lot.layout == LOCAL else "all alike"
    homes = lot.homes * dealt.copies
    return f"{homes} x {lot.sharing} devices" if lot.sharing > 1 else f"{homes} devices"


def _why(dealt: Dealt) -> str:
    """Modelled time of the bucket, and what else it could have cost."""
    chosen = dealt.seconds["chosen"]
    others = (f"{name} {dealt.seconds[name] / chosen:.2g}x" for name in (HOME, GATHER))
    return f"{chosen * 1e3:.2g} ms ({', '.join(others)})"


def _totals(plan: Plan) -> Iterable[str]:
    cost = plan.cost
    share = _ratio(cost.flops, plan.even_flops)
    yield f"per device {cost.flops / 1e9:.1f} GFLOP, {share} an even share"
    yield (
        f"           {cost.wire / 2**20:.1f} MiB arrive, {_ratio(cost.wire, cost.least)} the least"
        f" ({cost.bytes / 2**20:.1f} MiB of results of collectives)"
    )
    yield f"           {cost.memory / 2**20:.0f} MiB of temporary arrays at the peak"


def _ratio(cost: float, bound: float) -> str:
    return f"{cost / bound:.2f} of" if bound else "1.00 of"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _bucket(dealt: Dealt) -> dict[str, Any]:
    bucket = dealt.bucket
    return {
        "rows": bucket.rows,
        "cols": bucket.cols,
        "matrices": bucket.size * dealt.copies,
        "members": [member.path for member in bucket.members],
        "rows_over": list(bucket.rows_over),
        "cols_over": list(bucket.cols_over),
        "batch_over": list(bucket.batch_over),
        "seconds": dict(dealt.seconds),
        "lots": [_lot(lot) for lot in dealt.lots],
    }


def _lot(lot: Lot) -> dict[str, Any]:
    return {
        "layout": lot.layout,
        "count": lot.count,
        "padding": lot.padding,
        "homes": {role.axis: role.home for role in lot.roles},
        "shared_by": {role.axis: role.split for role in lot.roles},
        "owned": lot.owned,
        "rounds": lot.rounds,
        "flops": lot.cost.flops,
        "bytes": lot.cost.bytes,
        "memory": lot.cost.memory,
    }
