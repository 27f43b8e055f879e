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
    rows = [_row(bucket, lot) for bucket in plan["buckets"] for lot in bucket["lots"]]
    return "\n".join((_title(plan), "", *_aligned([HEADS, *rows]), "", *_totals(plan)))


def _title(plan: Entry) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    where = f"{plan['devices']} devices ({mesh})" if plan["devices"] > 1 else "one device"
    return f"Muon on {where}: {plan['steps']} steps in {plan['dtype']}"


def _row(bucket: Entry, lot: Entry) -> tuple[str, ...]:
    return (
        f"{lot['count'] * bucket['copies']} x ({bucket['rows']} x {bucket['cols']})",
        " ".join(bucket["rows_over"]) or "-",
        " ".join(bucket["cols_over"]) or "-",
        lot["layout"],
        _workers(bucket, lot),
        str(lot["owned"]),
        str(lot["padding"]),
        str(lot["rounds"]),
        lot["form"] or "-",
        f"{lot['flops'] / 1e9:.1f}",
        f"{lot['bytes'] / 2**20:.1f}",
        f"{lot['memory'] / 2**20:.0f}",
        _why(bucket["seconds"]) if lot["start"] == 0 else "remainder",
    )


def _workers(bucket: Entry, lot: Entry) -> str:
    if lot["layout"] in ("local", "gather"):
        return "each device" if lot["layout"] == "local" else "all alike"
    homes = math.prod(lot["homes"].values()) * bucket["copies"]
    sharing = math.prod(lot["shared_by"].values())
    return f"{homes} x {sharing} devices" if sharing > 1 else f"{homes} devices"


def _why(seconds: Mapping[str, float]) -> str:
    """Modelled time of a bucket, and what else it could have cost."""
    chosen = seconds["chosen"]
    others = (f"{name} {seconds[name] / chosen:.2g}x" for name in ("home", "gather"))
    return f"{chosen * 1e3:.2g} ms ({', '.join(others)})"


def _totals(plan: Entry) -> Iterable[str]:
    flops, wire = (
        f"{plan[cost] / plan[bound]:.2f} of" if plan[bound] else "1.00 of"
        for cost, bound in (("flops", "even_flops"), ("wire", "least"))
    )
    yield f"per device {plan['flops'] / 1e9:.1f} GFLOP, {flops} an even share"
    yield (
        f"           {plan['wire'] / 2**20:.1f} MiB arrive, {wire} the least"
        f" ({plan['bytes'] / 2**20:.1f} MiB of results of collectives)"
    )
    yield f"           {plan['memory'] / 2**20:.0f} MiB of temporary arrays at the peak"
    yield f"a step communicates {plan['against_adamw']:.3f} of what it does with distributed AdamW"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
