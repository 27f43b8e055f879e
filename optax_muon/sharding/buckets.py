"""Matrices of one shape, from whatever parameters, pooled into one batch `[B, m, n]`.

A model has hundreds of matrices and a handful of shapes. Pooled over leaves, layers, experts,
heads and parts of fused axes they become a few batched products, so the program's size does not
grow with depth. Tall matrices join the wide ones of the same size transposed: the polar factor
obeys `f(X^T) = f(X)^T`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_muon.sharding.cpu import opaque_ints

Stacks = dict[str, tuple[jax.Array, ...]]
"""The matrices of every parameter: path to one `[b, m, n]` per block of its view."""


@dataclasses.dataclass(frozen=True)
class Member:
    """The matrices that one block of one parameter brings to a bucket."""

    path: str
    """The parameter."""
    block: int
    """Which block of the parameter's view."""
    batch: int
    """How many matrices."""
    tall: bool
    """Whether they are stored tall, and enter transposed."""


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
    """Who brings how many, in order."""
    rows_over: tuple[str, ...] = ()
    """Mesh axes that the rows are cut over, major first."""
    cols_over: tuple[str, ...] = ()
    """Mesh axes that the columns are cut over."""
    batch_over: tuple[str, ...] = ()
    """Mesh axes over which the matrices themselves are dealt out: each holds others."""

    @property
    def size(self) -> int:
        """How many matrices a device sees, whole or in part."""
        return sum(member.batch for member in self.members)

    @property
    def turned(self) -> bool:
        """Whether it is one parameter's alone, stored tall: transposed, nothing is copied."""
        return len(self.members) == 1 and self.members[0].tall

    def pack(self, stacks: Stacks) -> jax.Array:
        """Pool the members' matrices into `[size, rows, cols]`."""
        parts = [_turned(stacks[m.path][m.block], m.tall) for m in self.members]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def unpack(self, pooled: jax.Array) -> dict[tuple[str, int], jax.Array]:
        """Hand every member its matrices back, as it stores them: `{(path, block): [b, m, n]}`."""
        parts = _cut(pooled, [member.batch for member in self.members])
        return {
            (m.path, m.block): _turned(part, m.tall)
            for m, part in zip(self.members, parts, strict=True)
        }


def _cut(pooled: jax.Array, lengths: Sequence[int]) -> Sequence[jax.Array]:
    """Cut `[sum of lengths, m, n]` into pieces of these lengths."""
    if len(lengths) == 1:
        return [pooled]
    ends = [*itertools.accumulate(lengths[:-1])]
    whole = functools.partial(jnp.split, indices_or_sections=ends)
    alike = functools.partial(_cut_alike, lengths)
    pieces: Sequence[jax.Array] = lax.platform_dependent(pooled, cpu=alike, default=whole)
    return pieces


def _cut_alike(lengths: Sequence[int], pooled: jax.Array) -> list[jax.Array]:
    """Cut with one kernel for all pieces of a length.

    XLA's CPU backend compiles equal kernels once, and a slice at an offset that it knows is unlike
    all others: 12 ms of LLVM for every parameter, of 13 ms in all.
    """
    starts = opaque_ints([*itertools.accumulate(lengths[:-1], initial=0)], pooled)
    pieces = zip(starts, lengths, strict=True)
    return [lax.dynamic_slice_in_dim(pooled, start, length) for start, length in pieces]


def _turned(matrices: jax.Array, tall: bool) -> jax.Array:
    return matrices.mT if tall else matrices
