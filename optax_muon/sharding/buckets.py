"""Buckets: all matrices of one shape, from any parameters, stacked into one batch `[B, m, n]`.

A model has hundreds of matrices but only a handful of shapes. Stacked over parameters, layers,
experts, heads and parts of fused axes, they need a few batched products, and the size of the
program does not grow with depth. Tall matrices are transposed and join the wide ones of the same
size: the polar factor satisfies `f(X^T) = f(X)^T`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_muon.sharding import cpu

Stacks = dict[str, tuple[jax.Array, ...]]
"""The matrices of every parameter: path to one `[b, m, n]` for each block of its view."""


@dataclasses.dataclass(frozen=True)
class Member:
    """The matrices that one block of one parameter contributes to a bucket."""

    path: str
    """The parameter."""
    block: int
    """Index of the block in the parameter's view."""
    batch: int
    """Number of matrices."""
    tall: bool
    """Whether they are stored tall; the bucket holds them transposed."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """All matrices of one shape, dtype and sharding: `[size, rows, cols]` with `rows <= cols`."""

    rows: int
    """The short side."""
    cols: int
    """The long side."""
    dtype: np.dtype
    """Dtype of the stored matrices."""
    members: tuple[Member, ...]
    """What each parameter contributes, in order."""
    rows_over: tuple[str, ...] = ()
    """Mesh axes that the rows are cut over, major first."""
    cols_over: tuple[str, ...] = ()
    """Mesh axes that the columns are cut over."""
    batch_over: tuple[str, ...] = ()
    """Mesh axes over which the batch is cut: their devices hold different matrices."""

    @property
    def size(self) -> int:
        """Number of matrices of which a device holds at least a tile."""
        return sum(member.batch for member in self.members)

    def pack(self, stacks: Stacks, start: int, count: int) -> jax.Array:
        """Stack the members' matrices from number `start` on: `[count, rows, cols]`.

        Args:
            stacks: The matrices of every parameter.
            start: Number of the first matrix in the bucket.
            count: How many.
        """
        parts = [
            _transposed(_cut(stacks[m.path][m.block], first, length), m.tall)
            for m, first, length in self._within(start, count)
        ]
        return _joined(parts)

    def unpack(self, parts: Sequence[jax.Array]) -> dict[tuple[str, int], jax.Array]:
        """Return the matrices as each member stores them: `{(path, block): [b, m, n]}`.

        Args:
            parts: All matrices of the bucket in order, in one array or several.
        """
        pieces = collections.defaultdict(list)
        start = 0
        for part in parts:
            within = self._within(start, len(part))
            cut = cpu.split(part, [length for _, _, length in within])
            for (m, _, _), piece in zip(within, cut, strict=True):
                pieces[m.path, m.block].append(_transposed(piece, m.tall))
            start += len(part)
        return {key: _joined(found) for key, found in pieces.items()}

    def _within(self, start: int, count: int) -> list[tuple[Member, int, int]]:
        """The members of matrices `start` to `start + count`: of each its first, and how many."""
        found = []
        for member in self.members:
            first, last = max(start, 0), min(start + count, member.batch)
            if first < last:
                found.append((member, first, last - first))
            start -= member.batch
        return found


def _cut(matrices: jax.Array, start: int, count: int) -> jax.Array:
    if count == len(matrices):
        return matrices
    part: jax.Array = lax.slice_in_dim(matrices, start, start + count)
    return part


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _transposed(matrices: jax.Array, tall: bool) -> jax.Array:
    return matrices.mT if tall else matrices
