"""Planning: from shapes, views and shardings to a plan, in Python, before anything is traced.

shapes + views + shardings -> leaves -> buckets -> lots -> print(plan)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_muon.matrices import paths, rules
from optax_muon.matrices.views import Block, Geometry
from optax_muon.sharding.buckets import Bucket, Member
from optax_muon.sharding.cost import RATES, CostModel, Work
from optax_muon.sharding.layouts import GATHER, HOME, Search, Shape
from optax_muon.sharding.plan import Dealt, Plan
from optax_muon.sharding.shards import Leaf, leaf_on
from optax_muon.sharding.specs import (
    AnyMesh,
    Whereabouts,
    axis_sizes,
    check_names,
    platform,
    read,
    slow_axes,
)


def plan(
    params: Any,
    *,
    views: Any = None,
    shardings: Any = None,
    mesh: AnyMesh | None = None,
    layout: str | None = None,
    work: Work | None = None,
    model: CostModel | None = None,
    memory: int = 2**28,
) -> Plan:
    """Plan the orthogonalization of a tree of parameters; nothing is traced.

    Args:
      params: a tree of arrays or `ShapeDtypeStruct`s.
      views: which leaves are matrices, and how; see `optax_muon.label`.
      shardings: a tree (or prefix, or `{path: ...}` dict) of `NamedSharding` or `PartitionSpec`, or
        a callable that returns one. None reads the arrays' types.
      mesh: the mesh of bare `PartitionSpec`s; None is the ambient mesh.
      layout: `home` or `gather` for all matrices; None takes the cheapest for each.
      work: how the orthogonalizer is counted; None is five steps in the platform's compute dtype.
      model: rates that decide between layouts; None takes those of the mesh's platform.
      memory: bytes of temporary arrays above which matrices are worked on in turns.

    Raises:
      ValueError: shardings that do not fit the parameters or the mesh, an unknown layout.
      TypeError: shardings of another kind.

    >>> import jax, jax.numpy as jnp
    >>> from optax_muon import View
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
    >>> params = {"kernel": jax.ShapeDtypeStruct((9, 512, 2048), jnp.float32)}
    >>> views = {"kernel": View(rows=1, cols=2)}
    >>> [dealt] = plan(params, views=views, shardings=P(None, "fsdp"), mesh=mesh).buckets
    >>> [(lot.layout, lot.count) for lot in dealt.lots]
    [('home', 8), ('split', 1)]
    """
    leaves = paths.named_leaves(params)
    geometries = {
        p: view.on(leaves[p].shape)
        for p, view in rules.assign(params, views).items()
        if view is not None
    }
    check_names(leaves, shardings)
    where = read({p: leaves[p] for p in geometries}, shardings, mesh)
    dtypes = {p: np.dtype(leaves[p].dtype) for p in geometries}
    return make(geometries, dtypes, where, layout=layout, work=work, model=model, memory=memory)


def make(
    geometries: Mapping[str, Geometry],
    dtypes: Mapping[str, np.dtype],
    where: Whereabouts,
    *,
    layout: str | None = None,
    work: Work | None = None,
    model: CostModel | None = None,
    memory: int = 2**28,
) -> Plan:
    """Plan from what `plan` has read: views bound to shapes, dtypes, and where the leaves lie."""
    if layout not in (None, HOME, GATHER):
        raise ValueError(f"layout {layout!r} is unknown; use 'home', 'gather', or None to choose.")
    kind = (where.mesh and platform(where.mesh)) or "cpu"
    work = (work or Work()).at(kind)
    sizes = axis_sizes(where.mesh)
    leaves = tuple(
        leaf_on(path, geometry, where.specs.get(path, ((),) * len(geometry.shape)), sizes)
        for path, geometry in geometries.items()
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
    return Plan(where.mesh, leaves, tuple(deal(bucket) for bucket in pooled), work)


def _deal(
    bucket: Bucket,
    sizes: Mapping[str, int],
    free: Iterable[str],
    work: Work,
    model: CostModel,
    layout: str | None,
    memory: int,
) -> Dealt:
    """Choose the lots of a bucket."""
    cut = (*bucket.rows_over, *bucket.cols_over, *bucket.batch_over)
    copies = [axis for axis in free if axis not in cut and sizes[axis] > 1]
    rows, cols, copies_over = (
        tuple((axis, sizes[axis]) for axis in axes)
        for axes in (bucket.rows_over, bucket.cols_over, copies)
    )
    shape = Shape(bucket.rows, bucket.cols, rows, cols, copies_over)
    ways = {
        name: Search(shape, work, model, way, memory).lots(bucket.size)
        for name, way in (("chosen", layout), (HOME, HOME), (GATHER, GATHER))
    }
    return Dealt(
        bucket,
        lots=ways["chosen"],
        copies=math.prod(sizes[axis] for axis in bucket.batch_over),
        whole=work.on(bucket.rows, bucket.cols),
        seconds={n: sum(model.seconds(lot.cost) for lot in lots) for n, lots in ways.items()},
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
        for index, block in enumerate(leaf.geometry.blocks):
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

    A square matrix is turned so that the mesh axes of its rows come first: `P('fsdp', 'tp')` and
    `P('tp', 'fsdp')` share a bucket.
    """

    def side(length: int, over: tuple[str, ...]) -> _Side:
        return _Side(length * math.prod(sizes[axis] for axis in over), over)

    def order(side: _Side) -> tuple[int, list[int]]:
        return side.length, [list(sizes).index(axis) for axis in side.over]

    rows, cols = side(block.rows, leaf.rows_over), side(block.cols, leaf.cols_over)
    tall = order(rows) > order(cols)
    return tall, (cols, rows) if tall else (rows, cols)
