"""A parameter as one device sees it: its shard, and the view bound to that shard.

Whichever axes of a leaf are cut, the shard is read through the same view: merged rows or columns
come out permuted, and the polar factor of a permuted matrix is the permuted factor. Two cases need
care. A length that does not divide over the mesh is padded with zeros, which change no norm and no
factor. A fused axis that is cut across its parts is made whole by an all-to-all that cuts another
axis instead.
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
    """An all-to-all that makes a fused axis whole on each device and cuts another axis instead."""

    axes: tuple[str, ...]
    """Mesh axes that the fused axis is cut over."""
    whole: int
    """Index of the fused axis of the leaf."""
    cut: int
    """Index of the axis that is cut in its place."""


@dataclasses.dataclass(frozen=True)
class LeafShard:
    """A parameter as one device sees it."""

    path: str
    """The parameter."""
    spec: Spec
    """Mesh axes that its axes are cut over, as its type names them: axes of size 1 included."""
    shape: tuple[int, ...]
    """Its shape, padded to divide evenly among the devices."""
    whole: BoundView
    """Its view, bound to its whole, unpadded shape."""
    bound: BoundView
    """Its view, bound to the shape of the shard that one device works on."""
    batch_over: tuple[str, ...]
    """Mesh axes that its batch of matrices is cut over."""
    rows_over: tuple[str, ...]
    """Mesh axes that its rows are cut over."""
    cols_over: tuple[str, ...]
    """Mesh axes that its columns are cut over."""
    reshard: AxisReshard | None = None
    """The all-to-all that comes first if a split does not fit the shards; else None."""

    @property
    def resharded_entries(self) -> int:
        """Entries that a device exchanges to make a fused axis whole, each way."""
        return 0 if self.reshard is None else math.prod(self.bound.shape)


def shard_leaf(path: str, bound: BoundView, spec: Spec, sizes: Mapping[str, int]) -> LeafShard:
    """Bind a parameter to the mesh.

    Args:
        path: The parameter.
        bound: Its view, bound to its shape.
        spec: For every axis of the parameter the mesh axes that it is cut over.
        sizes: Mesh axis to number of devices.

    Raises:
        ValueError: A fused axis is cut across its parts, and no other axis can be cut in its place.
    """
    named = spec
    spec = tuple(tuple(axis for axis in over if sizes[axis] > 1) for over in spec)
    ways = [math.prod(sizes[axis] for axis in over) for over in spec]
    shape = tuple(-(-n // k) * k for n, k in zip(bound.shape, ways, strict=True))
    shard = tuple(n // k for n, k in zip(shape, ways, strict=True))
    split, reshard, cut = bound.split, None, spec
    head_axes: tuple[str, ...] = ()
    if split is not None and spec[split.axis]:
        if _holds_whole_heads(split, ways[split.axis]):
            head_axes, cut = spec[split.axis], _replaced(spec, split.axis, ())
            split = _local_heads(split, ways[split.axis])
        else:
            reshard = _choose_reshard(path, split.axis, bound, spec, shard, ways)
            cut, shard = _resharded(reshard, spec, shard, ways[reshard.whole])
    batch_over, rows_over, cols_over = (
        tuple(name for axis in axes for name in cut[axis])
        for axes in (bound.batch_axes, bound.row_axes, bound.col_axes)
    )
    return LeafShard(
        path=path,
        spec=named,
        shape=shape,
        whole=bound,
        bound=dataclasses.replace(bound, shape=shard, split=split),
        batch_over=tuple(sorted((*batch_over, *head_axes), key=list(sizes).index)),
        rows_over=rows_over,
        cols_over=cols_over,
        reshard=reshard,
    )


def _holds_whole_heads(split: Split, ways: int) -> bool:
    """Whether every device holds whole heads of a single part."""
    return len(split.sizes) == 1 and split.groups == 1 and split.heads[0] % ways == 0


def _local_heads(split: Split, ways: int) -> Split:
    return Split(split.axis, (split.sizes[0] // ways,), (split.heads[0] // ways,))


def _choose_reshard(
    path: str, whole: int, bound: BoundView, spec: Spec, shard: tuple[int, ...], ways: list[int]
) -> AxisReshard:
    """Choose the longest other axis that divides among the devices of the fused axis."""
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


def _resharded(
    reshard: AxisReshard, spec: Spec, shard: tuple[int, ...], ways: int
) -> tuple[Spec, tuple[int, ...]]:
    """Spec and shard shape after the all-to-all."""
    spec = _replaced(
        _replaced(spec, reshard.whole, ()), reshard.cut, (*spec[reshard.cut], *reshard.axes)
    )
    shard = _replaced(shard, reshard.whole, shard[reshard.whole] * ways)
    return spec, _replaced(shard, reshard.cut, shard[reshard.cut] // ways)


def _replaced(entries: tuple[T, ...], index: int, entry: T) -> tuple[T, ...]:
    return (*entries[:index], entry, *entries[index + 1 :])
