"""Groups of devices that a collective runs over: whole mesh axes, or factors of them.

A mesh axis of 16 can be used as 4 x 4: nine matrices on sixteen chips fit best on eight homes of
two chips each. A piece is one digit of a device's index along an axis, written in a mixed radix. A
group is a list of pieces; its members are numbered with the last piece fastest.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Piece:
    """A digit of the index along one mesh axis: index `i` has the digit `i // stride % size`."""

    axis: str
    """Name of the mesh axis."""
    extent: int
    """Devices along the whole axis."""
    size: int
    """Values of the digit."""
    stride: int
    """Distance along the axis between devices whose digits differ by one."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices that differ in these pieces only. Its methods run inside `shard_map`.

    Pieces of size 1 are dropped and adjacent digits of one axis are merged, so that equal groups
    compare equal.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", _fewest(self.pieces))

    @property
    def size(self) -> int:
        """Devices in a group."""
        return math.prod(piece.size for piece in self.pieces)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that the pieces belong to."""
        return tuple(dict.fromkeys(piece.axis for piece in self.pieces))

    def index(self) -> jax.Array:
        """This device's number in its group: int32 `[]`."""
        number = jnp.zeros([], jnp.int32)
        for piece in self.pieces:
            digit = lax.axis_index(piece.axis) // piece.stride % piece.size
            number = number * piece.size + digit
        return number

    def take_part(self, x: jax.Array, axis: int) -> jax.Array:
        """This device's part of an axis that is divided evenly among the members."""
        length = x.shape[axis] // self.size
        return lax.dynamic_slice_in_dim(x, self.index() * length, length, axis)

    def all_to_all(self, x: jax.Array) -> jax.Array:
        """`[size, ...]`, entry `i` for member `i`, to `[size, ...]`, entry `i` from member `i`."""
        if self.size == 1:
            return x
        arrived: jax.Array = lax.all_to_all(x, self.axes, 0, 0, axis_index_groups=self._members)
        return arrived

    def all_gather(self, x: jax.Array) -> jax.Array:
        """`[...]` to `[size, ...]`, entry `i` from member `i`."""
        if self.size == 1:
            return x[None]
        gathered: jax.Array = lax.all_gather(x, self.axes, axis_index_groups=self._members)
        return gathered

    def psum(self, x: jax.Array) -> jax.Array:
        """Sum over the members."""
        if self.size == 1:
            return x
        total: jax.Array = lax.psum(x, self.axes, axis_index_groups=self._members)
        return total

    def pmax(self, x: jax.Array) -> jax.Array:
        """Largest over the members."""
        if self.size == 1:
            return x
        largest: jax.Array = lax.pmax(x, self.axes, axis_index_groups=self._members)
        return largest

    @property
    def _members(self) -> list[list[int]] | None:
        return _members(self.pieces)


@dataclasses.dataclass(frozen=True)
class Sharers(Group):
    """Devices that share the columns of matrices, as the orthogonalizer gets them.

    They may swap what they have, by permutations between two at a time, instead of summing or
    gathering it: they receive as many bytes, and compilers for TPUs compute while a permutation is
    under way. Then their number is a power of two that divides the rows, or it is 2.
    """

    swaps: bool = False
    """Whether they swap."""

    def psum(self, x: jax.Array) -> jax.Array:
        """Sum over the members `[..., m, m]`, or `[..., 1, 1]`."""
        if not self.swaps:
            return super().psum(x)
        return self._fold(jnp.add, x) if self.size == 2 or x.shape[-2] == 1 else self._sum_parts(x)

    def pmax(self, x: jax.Array) -> jax.Array:
        """Largest over the members."""
        return self._fold(jnp.maximum, x) if self.swaps else super().pmax(x)

    def all_gather(self, x: jax.Array) -> jax.Array:
        """`[...]` to `[size, ...]`, entry `i` from member `i`."""
        if not self.swaps:
            return super().all_gather(x)
        x = x[None]
        for bit in reversed(self._bits):
            x = self._join(x[:, None], bit, axis=1).reshape(-1, *x.shape[1:])
        return x

    def _fold(self, combine: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """Combine all that the members have, as long as it is."""
        for bit in self._bits:
            x = combine(x, self._partners(x, bit))
        return x

    def _sum_parts(self, x: jax.Array) -> jax.Array:
        """Sum `[..., m, n]`: every member some of the rows, and then all give all theirs.

        The longest messages go to the nearest members.
        """
        for bit in self._bits:
            first, second = jnp.split(x, 2, axis=-2)
            is_second = self._is_second(bit)
            kept = jnp.where(is_second, second, first)
            x = kept + self._partners(jnp.where(is_second, first, second), bit)
        for bit in reversed(self._bits):
            x = self._join(x, bit, axis=-2)
        return x

    def _join(self, x: jax.Array, bit: int, axis: int) -> jax.Array:
        """What two partners have, joined in the order of their numbers."""
        other, length = self._partners(x, bit), x.shape[axis]
        # One pass: 145 thousand cycles of a v5p, by its compiler's estimate, at 4096 x 4096 in
        # bfloat16. Chosen between before they are concatenated they take 205 thousand.
        start = jnp.where(self._is_second(bit), length, 0)
        around = jnp.concatenate([x, other, x], axis)
        joined: jax.Array = lax.dynamic_slice_in_dim(around, start, 2 * length, axis)
        return joined

    def _is_second(self, bit: int) -> jax.Array:
        return self.index() & bit != 0

    @property
    def _bits(self) -> list[int]:
        """Differences between the numbers of partners, one for each round."""
        return [2**i for i in range(self.size.bit_length() - 1)]

    def _partners(self, x: jax.Array, bit: int) -> jax.Array:
        """What the member has whose number differs in this bit."""
        groups = np.array(self._members or [[*range(self.size)]])
        # Permutations number devices by the axes in the order of the mesh.
        order = jax.sharding.get_abstract_mesh().axis_names.index
        axes = sorted(self.axes, key=order)
        extents = {piece.axis: piece.extent for piece in self.pieces}
        numbers = np.arange(math.prod(extents.values())).reshape([extents[axis] for axis in axes])
        groups = numbers.transpose([axes.index(axis) for axis in self.axes]).ravel()[groups]
        swaps = [(int(g[i]), int(g[i ^ bit])) for g in groups for i in range(self.size)]
        swapped: jax.Array = lax.ppermute(x, tuple(axes), swaps)
        return swapped


@dataclasses.dataclass(frozen=True)
class Message:
    """An array to send through a collective."""

    group: Group
    """The devices that take part."""
    collective: Callable[[Group, jax.Array], jax.Array]
    """`Group.all_to_all` or `Group.all_gather`."""
    payload: jax.Array
    """What this device sends."""
    lead: int = 0
    """Leading axes of the payload that belong to the collective."""


def exchange(messages: Sequence[Message]) -> list[jax.Array]:
    """Send all messages; those with the same group and collective share one call."""
    routes = [(message.group, message.collective, message.lead) for message in messages]
    arrived: dict[int, jax.Array] = {}
    for group, collective, lead in dict.fromkeys(routes):
        ids = [i for i, route in enumerate(routes) if route == (group, collective, lead)]
        payloads = [messages[i].payload for i in ids]
        if len(ids) == 1 or group.size == 1:
            parts = [collective(group, payload) for payload in payloads]
        else:
            parts = _fused(functools.partial(collective, group), payloads, lead)
        arrived |= dict(zip(ids, parts, strict=True))
    return [arrived[i] for i in range(len(messages))]


def _fused(
    collective: Callable[[jax.Array], jax.Array], payloads: Sequence[jax.Array], lead: int
) -> list[jax.Array]:
    """Send several arrays as one, flattened behind their leading axes.

    In rows of 128 numbers, as the memory of a TPU holds them: without, its compiler copies what two
    stacks of Moonlight's experts send as a sum, by its estimate in 546 thousand cycles.
    """
    width = math.gcd(128, *(math.prod(payload.shape[lead:]) for payload in payloads))
    flat = [payload.reshape(*payload.shape[:lead], -1, width) for payload in payloads]
    cuts = np.cumsum([x.shape[-2] for x in flat])[:-1].tolist()
    parts = jnp.split(collective(jnp.concatenate(flat, -2)), cuts, -2)
    return [
        part.reshape(*part.shape[:-2], *payload.shape[lead:])
        for part, payload in zip(parts, payloads, strict=True)
    ]


def _fewest(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    kept: list[Piece] = []
    for piece in pieces:
        if piece.size == 1:
            continue
        last = kept[-1] if kept else None
        if last and last.axis == piece.axis and last.stride == piece.size * piece.stride:
            kept[-1] = dataclasses.replace(piece, size=last.size * piece.size)
        else:
            kept.append(piece)
    return tuple(kept)


@functools.lru_cache(maxsize=1024)
def _members(pieces: tuple[Piece, ...]) -> list[list[int]] | None:
    """Linear indices over the pieces' axes, one list per group; None if one group has them all."""
    extents = {piece.axis: piece.extent for piece in pieces}
    axes = list(extents)
    steps = {a: math.prod(extents[b] for b in axes[i + 1 :]) for i, a in enumerate(axes)}
    inner = [np.arange(p.size) * p.stride * steps[p.axis] for p in pieces]
    offsets = [sum(map(int, digits)) for digits in itertools.product(*inner)]
    total = math.prod(extents.values())
    if offsets == list(range(total)):
        return None
    taken: set[int] = set()
    groups = []
    for base in range(total):
        if base not in taken:
            groups.append([base + offset for offset in offsets])
            taken.update(groups[-1])
    return groups
