"""Planning: from shapes, views and shardings to a plan, in Python, before anything is traced.

shapes + views + shardings -> leaf shards -> buckets -> assignments -> plan
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_muon.matrices.views import Block, BoundView
from optax_muon.platforms import get_device
from optax_muon.sharding.bucket_plan import BucketPlan
from optax_muon.sharding.buckets import Bucket, Member
from optax_muon.sharding.cost import CostModel, WorkModel
from optax_muon.sharding.exchange import Owned
from optax_muon.sharding.gather import Gathered
from optax_muon.sharding.mesh import LeafShardings, mesh_device, slow_axes
from optax_muon.sharding.plan import Plan
from optax_muon.sharding.search import BucketGeometry, LayoutClass, LayoutSearch
from optax_muon.sharding.shards import LeafShard, shard_leaf

LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "home": {"layouts": (Owned,), "may_split": False},
    "gather": {"layouts": (Gathered,)},
}
"""The layouts that `plan(layout=...)` knows by name, each with its options of the search."""


def make_plan(
    bounds: Mapping[str, BoundView],
    dtypes: Mapping[str, np.dtype],
    shardings: LeafShardings,
    work: WorkModel,
    *,
    platform: str | None = None,
    layout: str | LayoutClass | None = None,
    model: CostModel | None = None,
    memory: int = 2**28,
) -> Plan:
    """Plan for some leaves.

    Args:
        bounds: Path to the view of a leaf, bound to the leaf's shape.
        dtypes: Path to the dtype of the leaf.
        shardings: The mesh, and how the leaves are sharded on it.
        work: Counts the orthogonalizer.
        platform: `tpu`, `gpu`, `cpu`, or JAX's `device_kind`; None is the mesh's, and CPU where
            that is unknown.
        layout: `home` or `gather` for all matrices, or a layout class of your own; None takes the
            cheapest for each bucket.
        model: Rates that decide between layouts; None takes those of the platform.
        memory: Bytes of temporary arrays above which an assignment is done in chunks.

    Raises:
        ValueError: An unknown layout or platform, or a fused axis that the mesh cuts across its
            parts and that cannot be made whole.
    """
    options = _search_options(layout)
    kind = platform or (shardings.mesh and mesh_device(shardings.mesh)) or "cpu"
    device = get_device(kind)
    work = work.with_platform(device.name)
    sizes = shardings.axis_sizes
    leaves = tuple(
        shard_leaf(path, bound, shardings.specs.get(path, ((),) * len(bound.shape)), sizes)
        for path, bound in bounds.items()
    )
    model = model or CostModel.for_platform(kind, work.dtype, on_mesh=shardings.mesh is not None)
    search = functools.partial(LayoutSearch, work=work, model=model, memory=memory, device=device)
    # Four copies are held: in, out, and out in float32 where it is transposed back.
    buckets = make_buckets(leaves, dtypes, sizes, memory // (4 * work.itemsize))
    usable = {axis: n for axis, n in sizes.items() if axis not in slow_axes(shardings.mesh)}
    return Plan(
        shardings.mesh,
        leaves,
        tuple(plan_bucket(bucket, sizes, usable, search, options) for bucket in buckets),
        work,
        model,
        kind,
        taken=shardings.taken,
        unknown_shardings=shardings.unknown_shardings,
    )


def _search_options(layout: str | LayoutClass | None) -> Mapping[str, Any]:
    if layout is None:
        return {"layouts": (Owned, Gathered)}
    if not isinstance(layout, str):
        return {"layouts": (layout,)}
    if layout not in LAYOUTS:
        names = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"layout {layout!r} is unknown; use {names}, or None to choose.")
    return LAYOUTS[layout]


def plan_bucket(
    bucket: Bucket,
    sizes: Mapping[str, int],
    usable: Mapping[str, int],
    search: Callable[..., LayoutSearch],
    options: Mapping[str, Any],
) -> BucketPlan:
    """Assign the matrices of a bucket to devices.

    Args:
        bucket: The matrices.
        sizes: Mesh axis to number of devices.
        usable: The same, for the axes whose copies may share the work.
        search: A `LayoutSearch` that lacks a geometry and options.
        options: Those of the layout that was asked for.
    """
    cut = (*bucket.rows_over, *bucket.cols_over, *bucket.batch_over)
    copies = [axis for axis, size in usable.items() if axis not in cut and size > 1]
    rows, cols, copies_over = (
        tuple((axis, sizes[axis]) for axis in axes)
        for axes in (bucket.rows_over, bucket.cols_over, copies)
    )
    geometry = BucketGeometry(bucket.rows, bucket.cols, rows, cols, copies_over)
    ways = {
        name: search(geometry, **chosen) for name, chosen in {"chosen": options, **LAYOUTS}.items()
    }
    found = {name: way.assignments(bucket.size) for name, way in ways.items()}
    chosen = ways["chosen"]
    entries = bucket.size * math.prod(geometry.tile)
    packed = len(bucket.members) > 1 or any(member.tall for member in bucket.members)
    return BucketPlan(
        bucket,
        assignments=found["chosen"],
        copies=math.prod(sizes[axis] for axis in bucket.batch_over),
        matrix_cost=chosen.work.cost_of(bucket.rows, bucket.cols),
        around=chosen.work.cost_around(entries, bucket.dtype.itemsize, packed),
        seconds={name: chosen.seconds(assignments) for name, assignments in found.items()},
    )


def make_buckets(
    leaves: Iterable[LeafShard],
    dtypes: Mapping[str, np.dtype],
    sizes: Mapping[str, int],
    entries: int,
) -> tuple[Bucket, ...]:
    """Group matrices by shape, dtype and sharding, in order of first appearance.

    A block with more than `entries` numbers on a device, whose matrices divide evenly among the
    devices, gets a bucket of its own: stacking it with others would only copy it.
    """
    members: dict[tuple[Any, ...], list[Member]] = {}
    for leaf in leaves:
        for index, block in enumerate(leaf.bound.blocks):
            tall, sides = _sides(leaf, block, sizes)
            sharing = math.prod(n for axis, n in sizes.items() if axis not in leaf.batch_over)
            big = math.prod(block.shape) > entries and block.batch % sharing == 0
            key = (dtypes[leaf.path], *sides, leaf.batch_over, (leaf.path, index) if big else None)
            members.setdefault(key, []).append(Member(leaf.path, index, block.batch, tall))
    return tuple(
        Bucket(short.length, long.length, dtype, tuple(group), short.over, long.over, batch_over)
        for (dtype, short, long, batch_over, _), group in members.items()
    )


class _Side(NamedTuple):
    """One side of the whole matrices of a block."""

    length: int
    over: tuple[str, ...]


def _sides(
    leaf: LeafShard, block: Block, sizes: Mapping[str, int]
) -> tuple[bool, tuple[_Side, _Side]]:
    """Whether to transpose, and the short and the long side after that.

    A square matrix is transposed if that puts the mesh axes of its rows first, so that
    `P('fsdp', 'tensor')` and `P('tensor', 'fsdp')` share a bucket.
    """

    def side(length: int, over: tuple[str, ...]) -> _Side:
        return _Side(length * math.prod(sizes[axis] for axis in over), over)

    def order(side: _Side) -> tuple[int, list[int]]:
        return side.length, [list(sizes).index(axis) for axis in side.over]

    rows, cols = side(block.rows, leaf.rows_over), side(block.cols, leaf.cols_over)
    tall = order(rows) > order(cols)
    return tall, (cols, rows) if tall else (rows, cols)
