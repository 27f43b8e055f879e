"""The plan: which device works on which matrices, what moves, and what it costs. Pure data.

`planner.py` makes it, `execute.py` runs it, `report.py` prints it. Tests hold the compiled program
to the bytes and operations of the plan.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_muon.drawing import Drawing
from optax_muon.matrices.views import BoundView
from optax_muon.notebook import html_table
from optax_muon.sharding import plan_picture, report
from optax_muon.sharding.bucket_plan import BucketPlan
from optax_muon.sharding.cost import Cost, CostModel, Received, Traffic, WorkModel
from optax_muon.sharding.mesh import AnyMesh, axis_sizes, slow_axes
from optax_muon.sharding.shards import LeafShard
from optax_muon.sharding.timeline import exposed_seconds


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which devices work on what: `print` it, read its fields, or write `to_dict()` as JSON."""

    mesh: AnyMesh | None
    """The mesh; None on one device."""
    leaves: tuple[LeafShard, ...]
    """All parameters that have matrices."""
    buckets: tuple[BucketPlan, ...]
    """All matrices, by shape, dtype and sharding."""
    work: WorkModel
    """How the orthogonalizer was counted."""
    model: CostModel
    """The rates behind modelled times."""
    device: str
    """What it runs on: `tpu`, `gpu`, `cpu`, or JAX's `device_kind`."""
    taken: frozenset[str] = frozenset()
    """Mesh axes that it leaves alone: those of a `shard_map` or `vmap` that it was made in, and
    those of `unknown_shardings`."""
    unknown_shardings: bool = False
    """True if shardings are unknown (Auto axes under trace): the compiler moves tiles there."""

    @property
    def mesh_axes(self) -> dict[str, int]:
        """Names and sizes of the mesh axes that it uses; empty on one device."""
        return axis_sizes(self.mesh, self.taken)

    @property
    def in_order(self) -> tuple[BucketPlan, ...]:
        """The buckets as they are run: those first whose devices receive the least to begin."""
        return tuple(sorted(self.buckets, key=lambda each: each.cost.traffic.inward.total))

    @property
    def cost(self) -> Cost:
        """Cost of one update, per device."""
        return sum((bucket_plan.cost for bucket_plan in self.buckets), self._resharding)

    @property
    def _resharding(self) -> Cost:
        each_way = sum(leaf.resharded_entries for leaf in self.leaves) * self.work.itemsize
        received = Received(all_to_all=each_way)
        return Cost(collective_bytes=2 * each_way, traffic=Traffic(received, outward=received))

    @property
    def seconds(self) -> float:
        """Modelled time of an update: what a device computes, and its exposed communication."""
        return self.product_seconds + self.pass_seconds + self.exposed_seconds

    @property
    def product_seconds(self) -> float:
        """Modelled time of an update's products, at the rate of their form."""
        return self.model.product_seconds(self.cost)

    @property
    def pass_seconds(self) -> float:
        """Modelled time of an update's passes over whole arrays: momentum, packing, casts, sums."""
        return self.model.pass_seconds(self.cost)

    @property
    def message_seconds(self) -> float:
        """Modelled time of an update's communication, overlapped or not."""
        return self.model.message_seconds(self.cost)

    @property
    def exposed_seconds(self) -> float:
        """The part of `message_seconds` in which a device has nothing to compute: it is exposed."""
        resharding = self.model.message_seconds(self._resharding)
        return resharding + exposed_seconds(self.in_order, self.model, self.device)

    @property
    def balanced_flops(self) -> float:
        """Operations per device if the work were spread evenly over all devices."""
        whole = sum(d.bucket.size * d.copies * d.matrix_cost.flops for d in self.buckets)
        return whole / self.devices

    @property
    def load_ratio(self) -> float:
        """Operations of a device over `balanced_flops`; 1 is a perfect balance."""
        return self.cost.flops / self.balanced_flops if self.balanced_flops else 1.0

    @property
    def received_ratio(self) -> float:
        """Bytes that a device receives over the lower bound; 1 is optimal."""
        least = self.cost.min_received_bytes
        return self.cost.received_bytes / least if least else 1.0

    @property
    def comm_vs_adamw(self) -> float:
        """Bytes that a training step communicates, over those of a step of distributed AdamW.

        Per parameter, AdamW scatters 4 bytes of gradient and gathers 4 bytes of parameter; Muon
        adds what the plan moves (arXiv 2502.16982, section 2.3).
        """
        sizes = (d.bucket.size * d.copies * d.bucket.rows * d.bucket.cols for d in self.buckets)
        return 1 + self.cost.collective_bytes / max(8 * sum(sizes), 1)

    @property
    def devices(self) -> int:
        """Devices that share the work: those of the mesh, or of one of its slices."""
        slow = slow_axes(self.mesh)
        return math.prod(n for axis, n in self.mesh_axes.items() if axis not in slow)

    def picture(self, title: str = "") -> Drawing:
        """A drawing of the plan: who owns which matrices, what moves, and who waits.

        Args:
            title: Name of the model that the plan is made for.
        """
        return plan_picture.draw(self, title)

    def _repr_html_(self) -> str:
        """The table and the picture, for notebooks."""
        title, *totals = report.summary(self)
        words = "".join(f"<p>{html.escape(line)}</p>" for line in totals)
        drawn = self.picture().svg() if self.buckets else ""
        return f"{html_table(report.rows(self), title)}{words}{drawn}"

    def __str__(self) -> str:
        return report.table(self)

    def to_dict(self) -> dict[str, Any]:
        """In plain numbers, strings and lists: sizes in bytes, work in operations."""
        return {
            "mesh": self.mesh_axes,
            "devices": self.devices,
            "dtype": str(self.work.dtype),
            "steps": self.work.steps,
            "balanced_flops": self.balanced_flops,
            "comm_vs_adamw": self.comm_vs_adamw,
            "seconds": self.seconds,
            "product_seconds": self.product_seconds,
            "pass_seconds": self.pass_seconds,
            "message_seconds": self.message_seconds,
            "exposed_seconds": self.exposed_seconds,
            **self.cost.to_dict(),
            "buckets": [bucket_plan.to_dict() for bucket_plan in self.buckets],
        }

    def check(self, bounds: Mapping[str, BoundView]) -> None:
        """Check that the plan was made for these matrices.

        Raises:
            ValueError: A parameter has other matrices than planned.
        """
        planned = {leaf.path: leaf.whole for leaf in self.leaves}
        for path in {**planned, **bounds}:
            found, wanted = _in_words(bounds.get(path)), _in_words(planned.get(path))
            if found != wanted:
                raise ValueError(
                    f"{path} has {found}, but the plan was made for {wanted}; plan again for these"
                    " parameters and these views."
                )

    def payload(self, dtype: np.dtype) -> np.dtype:
        """Dtype in which matrices of a dtype travel: the compute dtype if that is narrower."""
        payload = self.work.dtype
        if self.mesh is None or payload is None or dtype.kind == "c":
            return dtype
        if payload.itemsize >= min(dtype.itemsize, 4):  # keep 64-bit storage as is
            return dtype
        # float16 would lose small gradients before they are normalized.
        return np.dtype(np.float32) if payload == np.float16 else payload


def _in_words(bound: BoundView | None) -> str:
    """Matrices as an error message names them."""
    if bound is None:
        return "no matrices"
    blocks = " + ".join(f"{b.batch} x ({b.rows} x {b.cols})" for b in bound.blocks)
    return f"the shape {bound.shape} read as {blocks}"
