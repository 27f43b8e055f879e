"""Planning: from shapes, views and shardings to a plan, in Python, before anything is traced.

shapes + views + shardings -> leaves -> buckets -> lots -> print(plan)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_muon.matrices.views import Block, BoundView
from optax_muon.sharding.buckets import Bucket, Member
from optax_muon.sharding.cost import RATES, CostModel, Work
from optax_muon.sharding.mesh import LeafShardings, axis_sizes, platform, slow_axes
from optax_muon.sharding.plan import BucketPlan, Plan
from optax_muon.sharding.search import GATHER, HOME, BucketGeometry, LayoutSearch
from optax_muon.sharding.shards import Leaf, leaf_on


def make(
    bounds: Mapping[str, BoundView],
    dtypes: Mapping[str, np.dtype],
    where: LeafShardings,
    work: Work,
    *,
    on: str | None = None,
    layout: str | None = None,
    model: CostModel | None = None,
    memory: int = 2**28,
) -> Plan:
    """Plan from views bound to shapes, dtypes, and where the leaves lie.

    `on` is the platform; None is the mesh's. What else may be chosen, `optax_muon.plan` says.
    """
    if layout not in (None, HOME, GATHER):
        raise ValueError(f"layout {layout!r} is unknown; use 'home', 'gather', or None to choose.")
    kind = on or (where.mesh and platform(where.mesh)) or "cpu"
    work = work.at(kind)
    sizes = axis_sizes(where.mesh)
    leaves = tuple(
        leaf_on(path, bound, where.specs.get(path, ((),) * len(bound.shape)), sizes)
        for path, bound in bounds.items()
    )
    free = [axis for axis in sizes if axis not in slow_axes(where.mesh)]
    deal = functools.partial(
        _deal,
        sizes=sizes,
        free=free,
        work=work,
        model=model or RATES.get(kind, RATES["gpu"]),
        layout=layout,
        memory=memory,
    )
    # In, out, and out in float32 where it is turned back: four times what is pooled is held.
    pooled = pool(leaves, dtypes, sizes, memory // (4 * work.itemsize))
    bucket_plan = tuple(deal(bucket) for bucket in pooled)
    return Plan(
        where.mesh,
        leaves,
        bucket_plan,
        work,
        unknown_shardings=where.mesh is None and where.unknown_shardings,
    )


def _deal(
    bucket: Bucket,
    sizes: Mapping[str, int],
    free: Iterable[str],
    work: Work,
    model: CostModel,
    layout: str | None,
    memory: int,
) -> BucketPlan:
    """Choose the lots of a bucket."""
    cut = (*bucket.rows_over, *bucket.cols_over, *bucket.batch_over)
    copies = [axis for axis in free if axis not in cut and sizes[axis] > 1]
    rows, cols, copies_over = (
        tuple((axis, sizes[axis]) for axis in axes)
        for axes in (bucket.rows_over, bucket.cols_over, copies)
    )
    shape = BucketGeometry(bucket.rows, bucket.cols, rows, cols, copies_over)
    ways = {
        name: LayoutSearch(shape, work, model, way, memory).assignments(bucket.size)
        for name, way in (("chosen", layout), (HOME, HOME), (GATHER, GATHER))
    }
    return BucketPlan(
        bucket,
        assignments=ways["chosen"],
        copies=math.prod(sizes[axis] for axis in bucket.batch_over),
        whole=work.on(bucket.rows, bucket.cols),
        seconds={
            n: sum(model.seconds(assignment.cost) for assignment in assignments)
            for n, assignments in ways.items()
        },
    )


def pool(
    leaves: Iterable[Leaf], dtypes: Mapping[str, np.dtype], sizes: Mapping[str, int], entries: int
) -> tuple[Bucket, ...]:
    """Pool matrices by shape, dtype and sharding, in order of first appearance.

    A block that alone has more than `entries` numbers on a device, and as many matrices for every
    device, is a bucket of its own: pooling would only copy it.
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


def _sides(leaf: Leaf, block: Block, sizes: Mapping[str, int]) -> tuple[bool, tuple[_Side, _Side]]:
    """Whether to transpose, and the short and the long side then.

    A square matrix is turned so that the mesh axes of its rows come first: `P('fsdp', 'tensor')`
    and `P('tensor', 'fsdp')` share a bucket.
    """

    def side(length: int, over: tuple[str, ...]) -> _Side:
        return _Side(length * math.prod(sizes[axis] for axis in over), over)

    def order(side: _Side) -> tuple[int, list[int]]:
        return side.length, [list(sizes).index(axis) for axis in side.over]

    rows, cols = side(block.rows, leaf.rows_over), side(block.cols, leaf.cols_over)
    tall = order(rows) > order(cols)
    return tall, (cols, rows) if tall else (rows, cols)
