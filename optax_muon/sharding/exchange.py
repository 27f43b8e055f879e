"""The owned layouts: matrices move to the devices that own them, and the results move back.

`local`, `home` and `split` are one mechanism with different numbers. Tiles travel in one all-to-all
over the tuple of their mesh axes, which moves exactly what each device lacks; everything else is
reshapes and transposes. Replicas need nothing at the start: each takes its share of the tiles that
it already holds, and at the end all of them gather the results.

The shapes in the comments are those of 16 matrices (256 x 1024) with rows over `fsdp=4` and columns
over `tensor=2`: eight homes, each of which owns two whole matrices.

The number of a device in an exchange has one or two digits per mesh axis: its home, and its place
among the sharers of the home. For the sender, a digit tells which matrices or columns to send
there. For the receiver, it tells which rows or columns came from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from jax import lax

from optax_muon.sharding import tpu
from optax_muon.sharding.assignment import (
    COLS,
    COPIES,
    ROWS,
    Assignment,
    Orthogonalizer,
    Role,
    Step,
)
from optax_muon.sharding.cost import Cost, Received, Traffic
from optax_muon.sharding.device_groups import Group, Message, Piece, Sharers
from optax_muon.sharding.search import LayoutSearch

Digits = dict[str, int]
"""Label to length of an axis: `home0rows`, `sharer0rows`, ..., `q`, `m`, `n`."""


@dataclasses.dataclass(frozen=True)
class Owned:
    """Every matrix has one home: a device, or several that share its columns."""

    roles: tuple[Role, ...]
    """The mesh axes that take part: those that cut the matrices, then those that hold copies."""
    swaps: bool = False
    """Whether the devices of a home swap Gram matrices, instead of summing and gathering them."""
    memory_tile: tpu.MemoryTile = None
    """Rows and columns of the tiles of the devices' memory."""

    @classmethod
    def assign(cls, search: LayoutSearch, count: int) -> Iterator[tuple[Assignment, ...]]:
        """Every choice of roles; the remainder is either padded or assigned by another search."""
        owned_only = dataclasses.replace(search, layouts=(cls,))
        for roles in search.role_choices():
            swaps = _can_swap(search, math.prod(role.split for role in roles))
            layout = cls(roles, swaps, search.device.memory_tile)
            filled, rest = divmod(count, math.prod(role.home for role in roles))
            if rest:
                yield (layout._assignment(search, count, layout._home_count - rest),)
            if filled:
                first = layout._assignment(search, count - rest, 0)
                yield (first, *owned_only.cheapest(rest)) if rest else (first,)

    @property
    def name(self) -> str:
        """`split` if devices share matrices, else `home`; `local` if nothing moves."""
        return "split" if self.sharing > 1 else "home" if self.roles else "local"

    @property
    def homes(self) -> tuple[Piece, ...]:
        """The digits that number the homes, copies first: they divide the matrices first."""
        return tuple(role.homes for role in (*self.copies, *self.cut))

    @property
    def sharing(self) -> int:
        """Devices that share the columns of each matrix."""
        return math.prod(role.split for role in self.roles)

    def describe(self, copies: int) -> str:
        """Which devices work on the matrices."""
        if not self.roles:
            return "each device"
        homes = self._home_count * copies
        return f"{homes} x {self.sharing} devices" if self.sharing > 1 else f"{homes} devices"

    def steps(self, tiles: tuple[int, ...], orthogonalizer: Orthogonalizer) -> Sequence[Step]:
        """Bring tiles `[k, m, n]` home, orthogonalize whole matrices, and bring the tiles back."""
        route = _Route(self, tiles)

        def depart(tiles: jax.Array) -> Message:
            share = self.take_replica_share(tiles)
            packed = route.pack(share)  # [16, 64, 512] -> [8, 2, 64, 512], sorted by receiver
            return Message(self.exchange, Group.all_to_all, packed, lead=1)

        def work(arrived: jax.Array) -> Message:
            whole = route.assemble(arrived)  # [8, 2, 64, 512], by sender -> [2, 256, 1024]
            finished = route.disassemble(polar(whole, orthogonalizer, self._shards))
            return Message(self.exchange, Group.all_to_all, finished, lead=1)

        def publish(returned: jax.Array) -> Message:
            unpacked = route.unpack(returned)  # [8, 2, 64, 512] -> [16, 64, 512]
            lying = tpu.row_major(unpacked, self.memory_tile)
            return Message(self.replicas, Group.all_gather, lying)

        return depart, work, publish, route.merge_replica_shares

    def take_replica_share(self, x: jax.Array) -> jax.Array:
        """Take the share of this replica: `[k, m, n]` to `[k / homes, m, n / sharers]`."""
        if not self.copies:
            return x
        homes = Group(tuple(role.homes for role in self.copies))
        sharers = Group(tuple(role.sharers for role in self.copies))
        return sharers.take_part(homes.take_part(x, axis=0), axis=2)

    @property
    def exchange(self) -> Group:
        """Devices that exchange tiles: all along row axes, one per home along column axes."""
        pieces = []
        for role in self.cut:
            pieces.append(role.homes)
            if role.holds == ROWS:
                pieces.append(role.sharers)
        return Group(tuple(pieces))

    @property
    def replicas(self) -> Group:
        """Devices that hold copies and exchange their results."""
        return Group(tuple(piece for r in self.copies for piece in (r.homes, r.sharers)))

    @property
    def _shards(self) -> Sharers | None:
        """Devices that share the columns of a matrix while it is worked on; None if one does."""
        pieces = tuple(role.sharers for role in self.roles)
        return Sharers(pieces, self.swaps) if self.sharing > 1 else None

    @property
    def cut(self) -> tuple[Role, ...]:
        """Roles of the axes whose devices hold different tiles of a matrix."""
        return tuple(role for role in self.roles if role.holds != COPIES)

    @property
    def copies(self) -> tuple[Role, ...]:
        """Roles of the axes whose devices hold copies and share the work."""
        return tuple(role for role in self.roles if role.holds == COPIES)

    @property
    def _home_count(self) -> int:
        return math.prod(role.home for role in self.roles)

    def _assignment(self, search: LayoutSearch, count: int, padding: int) -> Assignment:
        geometry, itemsize = search.geometry, search.work.itemsize
        work = search.work.work_of(geometry.rows, geometry.cols, self.sharing)
        one = search.work.cost(work, geometry.rows, geometry.cols, self.sharing, swaps=self.swaps)
        owned = (count + padding) // self._home_count
        chunks = search.chunks(owned, one.memory)
        moved, needed = (n * math.prod(geometry.tile) * itemsize for n in (count + padding, count))
        trips, shared = 2 * (self.exchange.size > 1), self.replicas.size > 1
        sent = trips * moved // self.replicas.size
        cost = one * owned + Cost(
            collective_bytes=sent + shared * moved,
            traffic=self._traffic(moved),
            min_received_bytes=self._traffic(needed).total,
            # Tiles are joined where they are worked on and cut again, chunks cut and written back.
            passed_bytes=2 * sent + 2 * shared * moved + 4 * moved * (chunks > 1),
        )
        # The matrices of a chunk share their messages.
        pipelined = chunks > 1 and trips > 0 and "all-to-all" in search.device.hides
        cost = dataclasses.replace(
            cost,
            collectives=chunks * (one.collectives + trips + shared),
            memory=owned // chunks * one.memory + (4 if pipelined else 2) * moved // chunks,
        )
        return Assignment(
            self,
            count,
            cost,
            padding=padding,
            chunks=chunks,
            pipelined=pipelined,
            form=work.form,
        )

    def _traffic(self, tiles: int) -> Traffic:
        """What a device receives if it has this many bytes of tiles."""
        both_ways = missing(2 * tiles // self.replicas.size, self.exchange)
        inward = both_ways // 2
        published = missing(tiles, self.replicas)
        return Traffic(
            Received(all_to_all=inward),
            outward=Received(all_to_all=both_ways - inward, all_gather=published),
        )


@dataclasses.dataclass(frozen=True)
class _Route:
    """Reshapes and transposes around the collectives of tiles `[k, m, n]`, and their inverses.

    `q` is the number of matrices at each home.
    """

    layout: Owned
    tiles: tuple[int, ...]

    def pack(self, x: jax.Array) -> jax.Array:
        """Sort by receiver: `[homes * q, m, sharers * n]` to `[devices, q, m, n]`."""
        sizes = self._sizes
        return self._rearrange(x, sizes, self._sender, [*sizes], len(self._digits))

    def unpack(self, x: jax.Array) -> jax.Array:
        """The inverse of `pack`."""
        sizes = self._sizes
        return self._rearrange(x, sizes, [*sizes], self._sender, 0).reshape(self._share)

    def assemble(self, x: jax.Array) -> jax.Array:
        """Join tiles by sender: `[devices, q, m, n]` to `[q, rows, cols]`."""
        sizes = self._sizes
        return self._rearrange(x, sizes, [*sizes], self._receiver, 0).reshape(
            sizes["q"], self._senders(ROWS) * sizes["m"], self._senders(COLS) * sizes["n"]
        )

    def disassemble(self, x: jax.Array) -> jax.Array:
        """The inverse of `assemble`."""
        sizes = self._sizes
        return self._rearrange(x, sizes, self._receiver, [*sizes], len(self._digits))

    def merge_replica_shares(self, x: jax.Array) -> jax.Array:
        """Join the shares of all copies: the inverse of `take_replica_share`."""
        if not self.layout.copies:
            return x[0]
        k, m, n = self._share
        sizes: Digits = {}
        for i, role in enumerate(self.layout.copies):
            sizes |= {f"home{i}": role.home, f"sharer{i}": role.split}
        homes, sharers = _labels(sizes, "home"), _labels(sizes, "sharer")
        sizes |= {"k": k, "m": m, "n": n}
        target = [*homes, "k", "m", *sharers, "n"]
        return self._rearrange(x, sizes, [*sizes], target, 0).reshape(self.tiles)

    @property
    def _digits(self) -> Digits:
        """Digits of a device's number in the exchange, major first."""
        digits: Digits = {}
        for i, role in enumerate(self.layout.cut):
            digits[f"home{i}{role.holds}"] = role.home
            if role.holds == ROWS:
                digits[f"sharer{i}{role.holds}"] = role.split
        return digits

    @property
    def _share(self) -> tuple[int, int, int]:
        """Shape of this device's share of the tiles."""
        k, m, n = self.tiles
        homes = math.prod(role.home for role in self.layout.copies)
        sharers = math.prod(role.split for role in self.layout.copies)
        return k // homes, m, n // sharers

    @property
    def _sizes(self) -> Digits:
        """Lengths of the axes while tiles are on their way: digits, `q`, `m`, `n`."""
        (k, m, n), digits = self._share, self._digits
        homes, sharers = (
            math.prod(digits[label] for label in _labels(digits, kind))
            for kind in ("home", "sharer")
        )
        return {**digits, "q": k // homes, "m": m, "n": n // sharers}

    @property
    def _sender(self) -> list[str]:
        """Order of the axes at the sender: homes divide the matrices, sharers the columns."""
        digits = self._digits
        return [*_labels(digits, "home"), "q", "m", *_labels(digits, "sharer"), "n"]

    @property
    def _receiver(self) -> list[str]:
        """Order of the axes at the receiver: senders divide the rows or the columns."""
        rows = [label for label in self._digits if label.endswith(ROWS)]
        cols = [label for label in self._digits if label.endswith(COLS)]
        return ["q", *rows, "m", *cols, "n"]

    def _rearrange(
        self,
        x: jax.Array,
        sizes: Digits,
        source: Sequence[str],
        target: Sequence[str],
        merged: int,
    ) -> jax.Array:
        """Put the axes `source` of `x` in the order `target`, and merge the first `merged`."""
        x = x.reshape([sizes[label] for label in source])
        order = [list(source).index(label) for label in target]
        x = tpu.transpose(x, order, self.layout.memory_tile)
        return x.reshape(-1, *x.shape[merged:]) if merged else x

    def _senders(self, holds: str) -> int:
        """Number of tiles side by side in an assembled matrix."""
        return math.prod(size for label, size in self._digits.items() if label.endswith(holds))


def _can_swap(search: LayoutSearch, sharing: int) -> bool:
    """Whether devices that share a matrix swap: two do, and more where that alone is hidden."""
    if sharing == 2:
        return True
    hides = search.device.hides
    fits = sharing & (sharing - 1) == 0 and search.geometry.rows % sharing == 0
    return fits and "collective-permute" in hides and "all-reduce" not in hides


def missing(received: int, group: Group) -> int:
    """Bytes that a device lacks of a result that is spread evenly over a group."""
    return received * (group.size - 1) // group.size


def polar(
    x: jax.Array, orthogonalizer: Orthogonalizer, column_shards: Sharers | None = None
) -> jax.Array:
    """Orthogonalize matrices `[q, m, n]`, with the columns on several devices if a group is given.

    Without the barriers XLA moves the orthogonalizer's casts across the transposes of the trips,
    which then transpose float32.
    """
    x = lax.optimization_barrier(x)
    options = {} if column_shards is None else {"column_shards": column_shards}
    factor: jax.Array = lax.optimization_barrier(orthogonalizer(x, **options))
    return factor


def _labels(sizes: Digits, kind: str) -> list[str]:
    return [label for label in sizes if label.startswith(kind)]
