r"""Matrices whose columns lie on several devices.

With $X = [X_1 \dots X_d]$, one $X_i$ per device, the Gram matrix is a sum over the devices,
$X X^T = \sum_i X_i X_i^T$, and so is the squared norm. Everything after that is m x m, and the last
product is local again. `ColumnShards` holds all the communication, and nothing else in this room
knows of other devices. The caller provides it: inside `shard_map` it is a mesh axis or a part of
one.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax


class ColumnShards(Protocol):
    """The devices that hold the columns of the same matrices."""

    @property
    def size(self) -> int:
        """Number of devices."""

    def index(self) -> jax.Array:
        """Index of this device among them: int32 []."""

    def psum(self, x: jax.Array) -> jax.Array:
        """Sum over the devices."""

    def pmax(self, x: jax.Array) -> jax.Array:
        """Maximum over the devices."""

    def all_gather(self, x: jax.Array) -> jax.Array:
        """Gather [...] of all devices, in the order of their indices: [size, ...]."""


class _AllColumns:
    """All columns are on this device."""

    size = 1

    def index(self) -> jax.Array:
        return jnp.zeros([], jnp.int32)

    def psum(self, x: jax.Array) -> jax.Array:
        return x

    def pmax(self, x: jax.Array) -> jax.Array:
        return x

    def all_gather(self, x: jax.Array) -> jax.Array:
        return x[None]


ALL_COLUMNS: ColumnShards = _AllColumns()
"""All columns are on this device, so nothing is communicated."""


def local_rows(gram: jax.Array, column_shards: ColumnShards) -> jax.Array:
    """Return this device's share of the rows of [..., m, m]; all of them if they do not divide."""
    m = gram.shape[-2]
    if column_shards.size == 1 or m % column_shards.size:
        return gram
    share = m // column_shards.size
    return lax.dynamic_slice_in_dim(gram, column_shards.index() * share, share, axis=-2)


def gather_rows(share: jax.Array, column_shards: ColumnShards) -> jax.Array:
    """Gather [..., m, m], of which every device has computed its `local_rows`."""
    if share.shape[-2] == share.shape[-1]:
        return share
    shares = jnp.moveaxis(column_shards.all_gather(share), 0, -3)
    return shares.reshape(*share.shape[:-2], -1, share.shape[-1])
