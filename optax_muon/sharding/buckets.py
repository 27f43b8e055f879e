"""Buckets: all matrices of one shape, from any parameters, stacked into one batch `[B, m, n]`.

A model has hundreds of matrices but only a handful of shapes. Stacked over parameters, layers,
experts, heads and parts of fused axes, they need a few batched products, and the size of the
program does not grow with depth. Tall matrices are transposed and join the wide ones of the same
size: the polar factor satisfies `f(X^T) = f(X)^T`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

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

    def pack(self, stacks: Stacks) -> jax.Array:
        """Stack the members' matrices into `[size, rows, cols]`."""
        parts = [_transposed(stacks[m.path][m.block], m.tall) for m in self.members]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def unpack(self, stacked: jax.Array) -> dict[tuple[str, int], jax.Array]:
        """Return the matrices as each member stores them: `{(path, block): [b, m, n]}`."""
        parts = cpu.split(stacked, [member.batch for member in self.members])
        return {
            (m.path, m.block): _transposed(part, m.tall)
            for m, part in zip(self.members, parts, strict=True)
        }


def _transposed(matrices: jax.Array, tall: bool) -> jax.Array:
    return matrices.mT if tall else matrices
