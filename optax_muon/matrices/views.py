"""How a parameter is read as matrices: its axes of rows, columns and batch, its fused axes.

A leaf of any rank becomes one or more stacks `[b, m, n]` and comes back:

    kernel  [d, f]         View(rows=0, cols=1)            one  d x f
    scanned [L, d, f]      View(rows=1, cols=2)            L of d x f
    conv    [H, W, I, O]   View(rows=(0, 1, 2), cols=3)    one  HWI x O
    qkv     [d, q + k + v] View(0, 1, Split(1, (q, k, v))) three, of their own widths

Rows are the axes that the layer contracts (its fan in), columns those that it produces (its fan
out); whatever is left is batch. Merging axes may permute rows or columns, and that is harmless:
the polar factor obeys `f(PXQ) = P f(X) Q` for every orthogonal, so every permutation, `P` and `Q`.
Views are bound to a shape once, in Python, before anything is traced. `assign.py` decides which
parameter gets which view.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """The parts of a fused axis, each an independent matrix (or several).

    Raises:
        ValueError: a size is not positive, a part is not divisible by its heads, or the lengths of
            `sizes` and `heads` differ.

    >>> Split(1, sizes=(64, 16, 16))                     # GQA: four query heads to a key head
    Split(axis=1, sizes=(64, 16, 16), heads=(1, 1, 1), groups=1)
    >>> Split(1, sizes=(64, 16, 16), heads=(4, 1, 1)).lengths
    (16, 16, 16)
    """

    axis: int
    """The fused axis of the parameter; one of the view's rows or columns."""
    sizes: tuple[int, ...]
    """Length of each part along the axis, in order. They add up to the axis (over `groups`)."""
    heads: tuple[int, ...] = ()
    """How many equal matrices each part holds side by side; empty means one each. Every head of a
    part becomes a batch entry of that part."""
    groups: int = 1
    """How often the whole pattern repeats along the axis: 1 for `q..q k..k v..v`, the number of
    query groups for Megatron's interleaved layout `(q k v)(q k v)...`. All groups of a part make
    one matrix."""

    def __post_init__(self) -> None:
        heads = tuple(self.heads) or (1,) * len(self.sizes)
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "heads", heads)
        if len(heads) != len(self.sizes):
            raise ValueError(
                f"Split has {len(self.sizes)} sizes but {len(heads)} head counts; give one each."
            )
        if not self.sizes or min(self.sizes) < 1 or min(heads) < 1 or self.groups < 1:
            raise ValueError(f"Split sizes, heads and groups must be positive, got {self}.")
        for size, count in zip(self.sizes, heads, strict=True):
            if size * self.groups % count:
                raise ValueError(
                    f"A part of {size * self.groups} entries does not divide into {count} heads."
                )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length along the axis of one matrix of each part."""
        parts = zip(self.sizes, self.heads, strict=True)
        return tuple(size * self.groups // count for size, count in parts)

    @property
    def total(self) -> int:
        """Length of the fused axis."""
        return sum(self.sizes) * self.groups

    @classmethod
    def qkv(
        cls,
        axis: int,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        per_head: bool = False,
    ) -> Split:
        """Split a fused query-key-value axis laid out as all queries, all keys, all values.

        Args:
            axis: The fused axis.
            heads: Number of query heads.
            head_dim: Features of a head.
            kv_heads: Number of key heads and of value heads; None is `heads`.
            per_head: Whether every head is a matrix of its own.

        >>> Split.qkv(1, heads=8, kv_heads=2, head_dim=64).sizes
        (512, 128, 128)
        """
        counts = (heads, kv_heads or heads, kv_heads or heads)
        sizes = tuple(count * head_dim for count in counts)
        return cls(axis, sizes, heads=counts if per_head else ())

    @classmethod
    def equal(cls, axis: int, size: int, *, parts: int) -> Split:
        """Split an axis of `size` entries into equal matrices: gate and up, or one per head.

        Args:
            axis: The fused axis.
            size: Its length.
            parts: Number of matrices; it divides `size`.

        >>> Split.equal(-1, 128, parts=2).lengths
        (64,)
        """
        return cls(axis, (size,), heads=(parts,))


@dataclasses.dataclass(frozen=True)
class View:
    """Which axes of a parameter are the rows and the columns of its matrices; the others are batch.

    One axis may be given as an integer; negative axes count from the end.

    Raises:
        ValueError: rows or columns are empty.

    >>> View(rows=1, cols=2).bind((12, 512, 2048)).blocks        # twelve scanned layers
    (Block(batch=12, rows=512, cols=2048),)
    >>> View((0, 1, 2), 3).bind((3, 3, 64, 128)).blocks          # a convolution, HWIO
    (Block(batch=1, rows=576, cols=128),)
    """

    rows: Axes
    """Axes that the layer contracts, its fan in."""
    cols: Axes
    """Axes that the layer produces, its fan out."""
    split: Split | None = None
    """The parts of a fused axis, if one is fused."""

    def __init__(
        self, rows: int | Sequence[int], cols: int | Sequence[int], split: Split | None = None
    ) -> None:
        object.__setattr__(self, "rows", _axes(rows))
        object.__setattr__(self, "cols", _axes(cols))
        object.__setattr__(self, "split", split)
        if not self.rows or not self.cols:
            raise ValueError(
                f"A view needs at least one axis for rows and one for columns, got {self}."
            )

    def bind(self, shape: Sequence[int]) -> BoundView:
        """Bind the view to a shape.

        Raises:
            ValueError: an axis does not exist or is used twice, or the split does not add up to its
                axis.
        """
        return _bind(self, tuple(shape))


Views: TypeAlias = Any
"""Which parameters are matrices, and how. None decides from the tree. Otherwise a tree of entries
or a prefix of one, a `{path or glob: entry}` dict, a list of `Rule`s, `"matrices"`, or a function
of the parameters that returns any of these. An entry is a `View`, None for the fallback, `Stacked`,
dimension numbers, or logical axis names. Of several that match, the exact path decides, then the
longest."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A stack of matrices of one shape, found in one parameter."""

    batch: int
    """How many matrices."""
    rows: int
    """Rows of each: the fan in of the logical matrix."""
    cols: int
    """Columns of each: the fan out of the logical matrix."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(batch, rows, cols)`."""
        return self.batch, self.rows, self.cols


@dataclasses.dataclass(frozen=True)
class BoundView:
    """A view with its axes checked against a shape. Made by `View.bind`."""

    shape: tuple[int, ...]
    """Shape of the parameter."""
    batch_axes: Axes
    """Axes (not negative) that count matrices."""
    row_axes: Axes
    """Axes merged into rows, in the view's order."""
    col_axes: Axes
    """Axes merged into columns, in the view's order."""
    split: Split | None
    """The fused axis, its number not negative."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One block per part of the split; one if nothing is split."""
        return tuple(self._block(shape) for shape in self._part_shapes)

    @property
    def part_rows(self) -> Axes:
        """The row axes as `parts` has them."""
        return tuple(axis + 1 for axis in self.row_axes)

    @property
    def part_cols(self) -> Axes:
        """The column axes as `parts` has them."""
        return tuple(axis + 1 for axis in self.col_axes)

    def parts(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Cut a parameter into its parts, each `[heads, *shape of one head]`; no axis moves."""
        if self.split is None:
            return (x[None],)
        split, axis = self.split, self.split.axis
        cuts = np.cumsum(split.sizes)[:-1].tolist()
        grouped = jnp.split(_cut(x, axis, split.groups), cuts, axis + 1)
        merged = [part.reshape(self._with_length(-1)) for part in grouped]
        return tuple(
            jnp.moveaxis(_cut(part, axis, heads), axis, 0)
            for part, heads in zip(merged, split.heads, strict=True)
        )

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Put the parts back: the exact inverse of `parts`."""
        if self.split is None:
            return parts[0][0]
        axis = self.split.axis
        merged = [jnp.moveaxis(part, 0, axis).reshape(self._with_length(-1)) for part in parts]
        grouped = [_cut(part, axis, self.split.groups) for part in merged]
        return jnp.concatenate(grouped, axis + 1).reshape(self.shape)

    def to_matrices(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Read a parameter `[*shape]` as its stacks of matrices, one `[b, m, n]` per block."""
        return tuple(
            part.transpose(self._order).reshape(block.shape)
            for part, block in zip(self.parts(x), self.blocks, strict=True)
        )

    def from_matrices(self, matrices: Sequence[jax.Array]) -> jax.Array:
        """Put the stacks back: the exact inverse of `to_matrices`."""
        return self.join(
            [
                stack.reshape([shape[axis] for axis in self._order]).transpose(
                    np.argsort(self._order)
                )
                for stack, shape in zip(matrices, self._part_shapes, strict=True)
            ]
        )

    def spread(self, values: Sequence[float]) -> float | np.ndarray:
        """Lay out one value per block so that it broadcasts against the parameter."""
        if self.split is None or len(set(values)) == 1:
            return values[0]
        pattern = np.repeat(np.asarray(values, np.float32), self.split.sizes)
        along = [1] * len(self.shape)
        along[self.split.axis] = self.split.total
        return np.tile(pattern, self.split.groups).reshape(along)

    @property
    def _order(self) -> Axes:
        """Axes of a part in the order (heads, batch, rows, columns)."""
        return (0, *(axis + 1 for axis in (*self.batch_axes, *self.row_axes, *self.col_axes)))

    @property
    def _part_shapes(self) -> list[tuple[int, ...]]:
        """Shape `[heads, ...]` of every part."""
        if self.split is None:
            return [(1, *self.shape)]
        parts = zip(self.split.heads, self.split.lengths, strict=True)
        return [(heads, *self._with_length(length)) for heads, length in parts]

    def _block(self, shape: tuple[int, ...]) -> Block:
        def size(axes: Axes) -> int:
            return math.prod(shape[1:][axis] for axis in axes)

        return Block(shape[0] * size(self.batch_axes), size(self.row_axes), size(self.col_axes))

    def _with_length(self, length: int) -> tuple[int, ...]:
        """The parameter's shape with another length of the fused axis."""
        assert self.split is not None
        return (*self.shape[: self.split.axis], length, *self.shape[self.split.axis + 1 :])


@functools.lru_cache(maxsize=4096)
def _bind(view: View, shape: tuple[int, ...]) -> BoundView:
    """Resolve negative axes and check every axis of a view against a shape."""
    rows, cols = (
        tuple(_axis(axis, view, shape) for axis in axes) for axes in (view.rows, view.cols)
    )
    if len({*rows, *cols}) < len(rows) + len(cols):
        raise ValueError(f"{view} uses an axis of the shape {shape} twice.")
    split = view.split
    if split is not None:
        split = dataclasses.replace(split, axis=_axis(split.axis, view, shape))
        if split.axis not in (*rows, *cols):
            raise ValueError(
                f"{view} splits axis {split.axis}, which is none of its rows or columns."
            )
        if split.total != shape[split.axis]:
            raise ValueError(
                f"{view} splits an axis of {split.total} entries;"
                f" axis {split.axis} of the shape {shape} has {shape[split.axis]}."
            )
    batch = tuple(axis for axis in range(len(shape)) if axis not in (*rows, *cols))
    return BoundView(shape, batch, rows, cols, split)


def _axes(axes: int | Sequence[int]) -> Axes:
    return (int(axes),) if isinstance(axes, int | np.integer) else tuple(int(axis) for axis in axes)


def _axis(axis: int, view: View, shape: tuple[int, ...]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{view} names axis {axis}, which the shape {shape} does not have.")
    return axis % len(shape)


def _cut(x: jax.Array, axis: int, pieces: int) -> jax.Array:
    """`[.., pieces * k, ..]` to `[.., pieces, k, ..]`."""
    return x.reshape((*x.shape[:axis], pieces, -1, *x.shape[axis + 1 :]))
