"""The gathered layout, Algorithm 1 of arXiv 2502.16982: every device works on all matrices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from jax import lax

from optax_muon.sharding import tpu
from optax_muon.sharding.assignment import COLS, ROWS, Assignment, Orthogonalizer, Role, Step
from optax_muon.sharding.cost import Cost, Received, Traffic
from optax_muon.sharding.device_groups import Group, Message, Piece
from optax_muon.sharding.exchange import missing, polar
from optax_muon.sharding.search import BucketGeometry, LayoutSearch


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Every device gathers all matrices, orthogonalizes all of them, and keeps its tiles."""

    roles: tuple[Role, ...]
    """The mesh axes that cut the matrices, those of the rows first."""
    memory_tile: tpu.MemoryTile = None
    """Rows and columns of the tiles of the devices' memory."""

    @classmethod
    def assign(cls, search: LayoutSearch, count: int) -> Iterator[tuple[Assignment, ...]]:
        """The one way in which matrices can be gathered."""
        layout = cls(_roles(search.geometry), search.device.memory_tile)
        yield (layout._assignment(search, count),)

    @property
    def name(self) -> str:
        """`gather`; `local` if nothing moves."""
        return "gather" if self.roles else "local"

    @property
    def homes(self) -> tuple[Piece, ...]:
        """None: no device owns a matrix alone."""
        return ()

    @property
    def sharing(self) -> int:
        """1: devices share no products."""
        return 1

    def describe(self, copies: int) -> str:
        """Which devices work on the matrices."""
        del copies
        return "every device, all" if self.roles else "each device"

    def steps(self, tiles: tuple[int, ...], orthogonalizer: Orthogonalizer) -> Sequence[Step]:
        """Gather tiles `[k, m, n]`, orthogonalize whole matrices, and take this device's tiles.

        The shapes in the comments are those of 16 matrices (256 x 1024) with rows over 4 devices
        and columns over 2.
        """
        k, m, n = tiles
        rows, cols = (
            math.prod(role.extent for role in self.roles if role.holds == holds)
            for holds in (ROWS, COLS)
        )

        def gather(tiles: jax.Array) -> Message:
            return Message(self._group, Group.all_gather, tiles)

        def work(arrived: jax.Array) -> jax.Array:  # [8, 16, 64, 512]
            by_place = arrived.reshape(rows, cols, k, m, n)
            whole = tpu.transpose(by_place, (2, 0, 3, 1, 4), self.memory_tile)
            factor = polar(whole.reshape(k, rows * m, cols * n), orthogonalizer)  # [16, 256, 1024]
            parts = factor.reshape(k, rows, m, cols, n).transpose(1, 3, 0, 2, 4)
            return lax.dynamic_index_in_dim(
                parts.reshape(-1, k, m, n), self._group.index(), keepdims=False
            )

        return gather, work

    @property
    def _group(self) -> Group:
        """The devices that hold tiles of one matrix."""
        return Group(tuple(role.sharers for role in self.roles))

    def _assignment(self, search: LayoutSearch, count: int) -> Assignment:
        rows, cols = search.geometry.rows, search.geometry.cols
        work = search.work.work_of(rows, cols)
        one = search.work.cost(work, rows, cols)
        gathered = count * rows * cols * search.work.itemsize if self.roles else 0
        chunks = search.chunks(count, one.memory)
        received = missing(gathered, self._group)
        cost = one * count + Cost(
            collective_bytes=gathered,
            traffic=Traffic(inward=Received(all_gather=received)),
            min_received_bytes=received,
            collectives=chunks * bool(self.roles),
            passed_bytes=4 * gathered,
        )
        memory = count // chunks * (one.memory + rows * cols * 4)
        cost = dataclasses.replace(cost, memory=memory)
        return Assignment(self, count, cost, chunks=chunks, form=work.form)


def _roles(geometry: BucketGeometry) -> tuple[Role, ...]:
    """One role per axis that cuts the matrices; none divides them among homes."""
    return tuple(
        Role(axis, size, holds, home=1)
        for holds, over in ((ROWS, geometry.rows_over), (COLS, geometry.cols_over))
        for axis, size in over
    )
