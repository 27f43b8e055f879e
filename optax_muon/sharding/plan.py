"""The plan: which device works on which matrices, what moves, and what it costs. Pure data.

`planner.py` makes it, `execute.py` does what it says, `report.py` prints it. The compiled program
is held to the bytes and operations that stand here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_muon.sharding import report
from optax_muon.sharding.buckets import Bucket
from optax_muon.sharding.cost import Cost, Work
from optax_muon.sharding.layouts import Lot
from optax_muon.sharding.shards import Leaf
from optax_muon.sharding.specs import AnyMesh, axis_sizes, slow_axes


@dataclasses.dataclass(frozen=True)
class Dealt:
    """A bucket and how its matrices are dealt out."""

    bucket: Bucket
    """The matrices, as one device sees them."""
    lots: tuple[Lot, ...]
    """What is done with them."""
    copies: int
    """Buckets of other matrices like this one, on other devices (experts, say)."""
    whole: Cost
    """Of one matrix on one device."""
    seconds: Mapping[str, float]
    """Modelled time of this choice (`chosen`), and of `home` and `gather` for all matrices."""

    @property
    def cost(self) -> Cost:
        """Of one update, per device."""
        return sum((lot.cost for lot in self.lots), Cost())

    def to_dict(self) -> dict[str, Any]:
        """In plain numbers, strings and lists."""
        return {
            "rows": self.bucket.rows,
            "cols": self.bucket.cols,
            "matrices": self.bucket.size * self.copies,
            "copies": self.copies,
            "members": [member.path for member in self.bucket.members],
            "rows_over": list(self.bucket.rows_over),
            "cols_over": list(self.bucket.cols_over),
            "batch_over": list(self.bucket.batch_over),
            "seconds": dict(self.seconds),
            "lots": [lot.to_dict() for lot in self.lots],
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who works on what. Printable; `to_dict()` for machines."""

    mesh: AnyMesh | None
    """The mesh; None on one device."""
    leaves: tuple[Leaf, ...]
    """All parameters that have matrices."""
    buckets: tuple[Dealt, ...]
    """All matrices, by shape, dtype and sharding."""
    work: Work
    """How the orthogonalizer was counted."""

    @property
    def cost(self) -> Cost:
        """Of one update, per device."""
        turned = sum(2 * leaf.turned for leaf in self.leaves) * self.work.itemsize
        return sum((dealt.cost for dealt in self.buckets), Cost(bytes=turned, wire=turned))

    @property
    def even_flops(self) -> float:
        """Operations per device if the work of all matrices were spread evenly over all devices."""
        whole = sum(d.bucket.size * d.copies * d.whole.flops for d in self.buckets)
        return whole / self.devices

    @property
    def devices(self) -> int:
        """Devices that share the work: those of the mesh, or of one of its slices."""
        slow = slow_axes(self.mesh)
        return math.prod(n for axis, n in axis_sizes(self.mesh).items() if axis not in slow)

    def __str__(self) -> str:
        return report.table(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, strings and lists: sizes in bytes, work in operations."""
        return {
            "mesh": axis_sizes(self.mesh),
            "devices": self.devices,
            "dtype": str(self.work.dtype),
            "steps": self.work.steps,
            "even_flops": self.even_flops,
            **dataclasses.asdict(self.cost),
            "buckets": [dealt.to_dict() for dealt in self.buckets],
        }

    def payload(self, dtype: np.dtype) -> np.dtype:
        """Dtype that matrices travel in: the compute dtype, if it is narrower than their own."""
        payload = self.work.dtype
        if self.mesh is None or payload is None or payload.itemsize >= dtype.itemsize:
            return dtype
        # float16 would lose small gradients before they are normalised.
        return np.dtype(np.float32) if payload == np.float16 else payload
