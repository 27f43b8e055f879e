"""A parameter as one device sees it: the shard it works on, and what its view means there.

Whatever axes of a leaf are cut, the shard is read through the same view: merged rows or columns
come out permuted, which the polar factor does not mind. Two things need care. A length that the
mesh does not divide is grown by zeros, which no norm and no factor sees. And a fused axis that is
cut across its parts is first made whole by an exchange that cuts another axis instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

from optax_muon.matrices.views import BoundView, Split
from optax_muon.sharding.mesh import Spec

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class AxisReshard:
    """An exchange that makes a fused axis whole on each device, and cuts another axis instead."""

    axes: tuple[str, ...]
    """Mesh axes that the fused axis is cut over."""
    whole: int
    """The fused axis of the leaf."""
    cut: int
    """The axis of the leaf that is cut in its place."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter as one device sees it."""

    path: str
    """The parameter."""
    spec: Spec
    """Mesh axes that its axes are cut over, those of one device too, which types name."""
    shape: tuple[int, ...]
    """Its shape, grown by zeros to divide evenly among the devices."""
    whole: BoundView
    """Its view, bound to the shape that it has."""
    bound: BoundView
    """Its view, bound to the shape of the shard that one device works on."""
    batch_over: tuple[str, ...]
    """Mesh axes over which its matrices are dealt out."""
    rows_over: tuple[str, ...]
    """Mesh axes that its rows are cut over."""
    cols_over: tuple[str, ...]
    """Mesh axes that its columns are cut over."""
    turn: AxisReshard | None = None
    """What has to happen first where a split does not fit the shards."""

    @property
    def turned(self) -> int:
        """Entries of a device that a turn exchanges, each way."""
        return 0 if self.turn is None else math.prod(self.bound.shape)


def leaf_on(path: str, bound: BoundView, spec: Spec, sizes: Mapping[str, int]) -> Leaf:
    """Bind a parameter to the mesh.

    Raises:
      ValueError: a fused axis is cut across its parts, and no other axis can be cut in its place.
    """
    lies = spec
    spec = tuple(tuple(axis for axis in over if sizes[axis] > 1) for over in spec)
    ways = [math.prod(sizes[axis] for axis in over) for over in spec]
    shape = tuple(-(-n // k) * k for n, k in zip(bound.shape, ways, strict=True))
    shard = tuple(n // k for n, k in zip(shape, ways, strict=True))
    split, turn, here = bound.split, None, spec
    bucket_plan: tuple[str, ...] = ()
    if split is not None and spec[split.axis]:
        if _whole_heads(split, ways[split.axis]):
            bucket_plan, here = spec[split.axis], _replaced(spec, split.axis, ())
            split = _fewer_heads(split, ways[split.axis])
        else:
            turn = _turn(path, split.axis, bound, spec, shard, ways)
            here, shard = _turned(turn, spec, shard, ways[turn.whole])
    batch_over, rows_over, cols_over = (
        tuple(name for axis in axes for name in here[axis])
        for axes in (bound.batch_axes, bound.row_axes, bound.col_axes)
    )
    return Leaf(
        path=path,
        spec=lies,
        shape=shape,
        whole=bound,
        bound=dataclasses.replace(bound, shape=shard, split=split),
        batch_over=tuple(sorted((*batch_over, *bucket_plan), key=list(sizes).index)),
        rows_over=rows_over,
        cols_over=cols_over,
        turn=turn,
    )


def _whole_heads(split: Split, ways: int) -> bool:
    """Whether every device has whole heads of a single part."""
    return len(split.sizes) == 1 and split.groups == 1 and split.heads[0] % ways == 0


def _fewer_heads(split: Split, ways: int) -> Split:
    return Split(split.axis, (split.sizes[0] // ways,), (split.heads[0] // ways,))


def _turn(
    path: str, whole: int, bound: BoundView, spec: Spec, shard: tuple[int, ...], ways: list[int]
) -> AxisReshard:
    """Find the longest other axis that the devices of the fused axis can cut."""
    if bound.shape[whole] % ways[whole]:
        raise ValueError(
            f"{path}: its fused axis of {bound.shape[whole]} does not divide over {spec[whole]};"
            " shard it evenly."
        )
    others = [a for a, length in enumerate(shard) if a != whole and length % ways[whole] == 0]
    if not others:
        raise ValueError(
            f"{path}: its fused axis is cut over {spec[whole]} across its parts, and no other axis"
            f" of the shard {shard} divides by {ways[whole]}; shard another axis instead."
        )
    return AxisReshard(spec[whole], whole, max(others, key=lambda axis: shard[axis]))


def _turned(
    turn: AxisReshard, spec: Spec, shard: tuple[int, ...], ways: int
) -> tuple[Spec, tuple[int, ...]]:
    """Spec and shard after a turn."""
    spec = _replaced(_replaced(spec, turn.whole, ()), turn.cut, (*spec[turn.cut], *turn.axes))
    shard = _replaced(shard, turn.whole, shard[turn.whole] * ways)
    return spec, _replaced(shard, turn.cut, shard[turn.cut] // ways)


def _replaced(entries: tuple[T, ...], index: int, entry: T) -> tuple[T, ...]:
    return (*entries[:index], entry, *entries[index + 1 :])
