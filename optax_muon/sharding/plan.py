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

from optax_muon.matrices.views import BoundView
from optax_muon.sharding import report
from optax_muon.sharding.buckets import Bucket
from optax_muon.sharding.cost import Cost, WorkModel
from optax_muon.sharding.mesh import AnyMesh, axis_sizes, slow_axes
from optax_muon.sharding.search import LOCAL, Assignment
from optax_muon.sharding.shards import Leaf


@dataclasses.dataclass(frozen=True)
class BucketPlan:
    """A bucket and how its matrices are dealt out."""

    bucket: Bucket
    """The matrices, as one device sees them."""
    assignments: tuple[Assignment, ...]
    """What is done with them."""
    copies: int
    """Buckets of other matrices like this one, on other devices (experts, say)."""
    whole: Cost
    """Of one matrix on one device."""
    seconds: Mapping[str, float]
    """Modelled time of this choice (`chosen`), and of `home` and `gather` for all matrices."""

    @property
    def turned(self) -> bool:
        """Whether the matrices come to the orthogonalizer transposed, and by no other way."""
        return self.bucket.turned and all(
            assignment.layout == LOCAL for assignment in self.assignments
        )

    @property
    def cost(self) -> Cost:
        """Of one update, per device."""
        return sum((assignment.cost for assignment in self.assignments), Cost())

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
            "assignments": [assignment.to_dict() for assignment in self.assignments],
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who works on what. Printable; `to_dict()` for machines."""

    mesh: AnyMesh | None
    """The mesh; None on one device."""
    leaves: tuple[Leaf, ...]
    """All parameters that have matrices."""
    buckets: tuple[BucketPlan, ...]
    """All matrices, by shape, dtype and sharding."""
    work: WorkModel
    """How the orthogonalizer was counted."""
    unknown_shardings: bool = False
    """Whether the leaves lie on a mesh of which nothing is known: all moves are the compiler's."""

    @property
    def cost(self) -> Cost:
        """Of one update, per device."""
        turned = sum(2 * leaf.turned for leaf in self.leaves) * self.work.itemsize
        return sum(
            (bucket_plan.cost for bucket_plan in self.buckets), Cost(bytes=turned, wire=turned)
        )

    @property
    def balanced_flops(self) -> float:
        """Operations per device if the work of all matrices were spread evenly over all devices."""
        whole = sum(d.bucket.size * d.copies * d.whole.flops for d in self.buckets)
        return whole / self.devices

    @property
    def comm_vs_adamw(self) -> float:
        """Bytes that a step of training communicates, over those with distributed AdamW.

        Per parameter, AdamW scatters 4 bytes of gradient and gathers 4 of parameter; Muon moves
        what the plan says on top (arXiv 2502.16982, section 2.3).
        """
        sizes = (d.bucket.size * d.copies * d.bucket.rows * d.bucket.cols for d in self.buckets)
        return 1 + self.cost.bytes / max(8 * sum(sizes), 1)

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
            "balanced_flops": self.balanced_flops,
            "comm_vs_adamw": self.comm_vs_adamw,
            **dataclasses.asdict(self.cost),
            "buckets": [bucket_plan.to_dict() for bucket_plan in self.buckets],
        }

    def check(self, bounds: Mapping[str, BoundView]) -> None:
        """See that the plan was made for these matrices.

        Raises:
          ValueError: a parameter with other matrices than planned.
        """
        planned = {leaf.path: leaf.whole for leaf in self.leaves}
        for path in {**planned, **bounds}:
            here, there = _words(bounds.get(path)), _words(planned.get(path))
            if here != there:
                raise ValueError(
                    f"{path} has {here}, and the plan was made for {there}; make the plan of these"
                    " parameters, with these views."
                )

    def payload(self, dtype: np.dtype) -> np.dtype:
        """Dtype that matrices travel in: the compute dtype, where it is half of their own."""
        payload = self.work.dtype
        if self.mesh is None or payload is None or dtype.kind == "c":
            return dtype
        if payload.itemsize >= min(dtype.itemsize, 4):  # who stores 64 bits means them
            return dtype
        # float16 would lose small gradients before they are normalised.
        return np.dtype(np.float32) if payload == np.float16 else payload


def _words(bound: BoundView | None) -> str:
    """Matrices as an error message names them."""
    if bound is None:
        return "no matrices"
    blocks = " + ".join(f"{b.batch} x ({b.rows} x {b.cols})" for b in bound.blocks)
    return f"the shape {bound.shape} read as {blocks}"
