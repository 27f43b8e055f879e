"""The plan: which device works on which matrices, what moves, and what it costs. Pure data.

    shapes + views + shardings -> leaves -> buckets -> lots -> print(plan)

Everything is decided in Python, once per set of shapes, before anything is traced; `execute.py`
does the work, and the compiled program is held to the bytes and operations that stand here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_muon.matrices import paths, rules
from optax_muon.matrices.views import Block, Geometry
from optax_muon.sharding import report
from optax_muon.sharding.buckets import Bucket, Member
from optax_muon.sharding.cost import RATES, Cost, CostModel, Work
from optax_muon.sharding.layouts import GATHER, HOME, Lot, Search, Shape
from optax_muon.sharding.shards import Leaf, leaf_on
from optax_muon.sharding.specs import AnyMesh, Whereabouts, axis_sizes, platform, read, slow_axes


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
        return report.table(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, strings and lists."""
        return report.as_dict(self)

    def payload(self, dtype: np.dtype) -> np.dtype:
        """Dtype that matrices travel in: the compute dtype, if it is narrower than their own."""
        payload = self.work.dtype
        if self.mesh is None or payload is None or payload.itemsize >= dtype.itemsize:
            return dtype
        # float16 would lose small gradients before they are normalised.
        return np.dtype(np.float32) if payload == np.float16 else payload


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

    >>> import jax, jax.numpy as jnp
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
    pooled = pool(leaves, dtypes, sizes, memory // work.itemsize)
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

    A block that alone has more than `entries` numbers on a device, and matrices for every device,
    is a bucket of its own: pooling would only copy it.
    """
    members: dict[tuple[Any, ...], list[Member]] = {}
    devices = math.prod(sizes.values())
    for leaf in leaves:
        for index, block in enumerate(leaf.geometry.blocks):
            tall, sides = _sides(leaf, block, sizes)
            big = math.prod(block.shape) > entries and block.batch >= devices
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
