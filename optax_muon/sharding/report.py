"""The plan as a person reads it: made from `Plan.to_dict()`, a line for every lot of matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]

HEADS = (
    *("matrices", "rows over", "cols over", "layout", "worked on by", "each"),
    *("idle", "turns", "form", "GFLOP", "MiB moved", "MiB held", "modelled time"),
)


def table(plan: Entry) -> str:
    """A line for every lot, and the totals per device."""
    rows = [
        _row(bucket, assignment)
        for bucket in plan["buckets"]
        for assignment in bucket["assignments"]
    ]
    return "\n".join((_title(plan), "", *_aligned([HEADS, *rows]), "", *_totals(plan)))


def _title(plan: Entry) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    where = f"{plan['devices']} devices ({mesh})" if plan["devices"] > 1 else "one device"
    steps = f"{plan['steps']} steps in " if plan["steps"] else ""
    return f"Muon on {where}: {steps}{plan['dtype']}"


def _row(bucket: Entry, assignment: Entry) -> tuple[str, ...]:
    return (
        f"{assignment['count'] * bucket['copies']} x ({bucket['rows']} x {bucket['cols']})",
        " ".join(bucket["rows_over"]) or "-",
        " ".join(bucket["cols_over"]) or "-",
        assignment["layout"],
        _workers(bucket, assignment),
        str(assignment["owned"]),
        str(assignment["padding"]),
        str(assignment["rounds"]),
        assignment["form"] or "-",
        f"{assignment['flops'] / 1e9:.1f}",
        f"{assignment['bytes'] / 2**20:.1f}",
        f"{assignment['memory'] / 2**20:.0f}",
        _why(bucket["seconds"]) if assignment["start"] == 0 else "remainder",
    )


def _workers(bucket: Entry, assignment: Entry) -> str:
    if assignment["layout"] in ("local", "gather"):
        return "each device" if assignment["layout"] == "local" else "all alike"
    homes = math.prod(assignment["homes"].values()) * bucket["copies"]
    sharing = math.prod(assignment["shared_by"].values())
    return f"{homes} x {sharing} devices" if sharing > 1 else f"{homes} devices"


def _why(seconds: Mapping[str, float]) -> str:
    """Modelled time of a bucket, and what else it could have cost."""
    chosen = seconds["chosen"]
    others = (f"{name} {seconds[name] / chosen:.2g}x" for name in ("home", "gather"))
    return f"{chosen * 1e3:.2g} ms ({', '.join(others)})"


def _totals(plan: Entry) -> Iterable[str]:
    flops, wire = (
        f"{plan[cost] / plan[bound]:.2f} of" if plan[bound] else "1.00 of"
        for cost, bound in (("flops", "balanced_flops"), ("wire", "least"))
    )
    yield f"per device {plan['flops'] / 1e9:.1f} GFLOP, {flops} an even share"
    yield (
        f"           {plan['wire'] / 2**20:.1f} MiB arrive, {wire} the least"
        f" ({plan['bytes'] / 2**20:.1f} MiB of results of collectives)"
    )
    yield f"           {plan['memory'] / 2**20:.0f} MiB of temporary arrays at the peak"
    yield f"a step communicates {plan['comm_vs_adamw']:.3f} of what it does with distributed AdamW"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
