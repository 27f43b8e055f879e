"""How the tiles of a lot travel: reshapes and transposes around one collective, and their inverses.

Letters: `k` matrices of the lot, `q` of them at each home, `m` and `n` rows and columns of a tile.
  The
devices of an exchange are numbered by digits, one or two per mesh axis: which home, and which
sharer of the home. Seen by the sender a digit says where to, a run of matrices or of columns; seen
by the receiver it says where from, a run of rows or of columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax import lax

from optax_muon.sharding.device_groups import Group
from optax_muon.sharding.search import COLS, GATHER, ROWS, Assignment

Label = str


@dataclasses.dataclass(frozen=True)
class Route:
    """The way of one lot of tiles `[k, m, n]`."""

    assignment: Assignment
    tiles: tuple[int, ...]

    def my_share(self, x: jax.Array) -> jax.Array:
        """Of copies, this device's part: `[k, m, n]` to `[k / homes, m, n / sharers]`."""
        if not self.assignment.copies:
            return x
        homes = Group(tuple(role.homes for role in self.assignment.copies))
        sharers = Group(tuple(role.sharers for role in self.assignment.copies))
        x = _mine(x, homes, axis=0)
        return _mine(x, sharers, axis=2)

    def address(self, x: jax.Array) -> jax.Array:
        """Sort by receiver: `[homes * q, m, sharers * n]` to `[devices, q, m, n]`."""
        if self.assignment.layout == GATHER:
            return x
        sizes = self._sizes
        return _rearrange(x, sizes, self._sender, [*sizes], len(self._digits))

    def assemble(self, x: jax.Array) -> jax.Array:
        """Put tiles together by sender: `[devices, q, m, n]` to `[q, rows, cols]`."""
        sizes = self._sizes
        return _rearrange(x, sizes, [*sizes], self._receiver, 0).reshape(
            sizes["q"], self._whole(ROWS) * sizes["m"], self._whole(COLS) * sizes["n"]
        )

    def take_apart(self, x: jax.Array) -> jax.Array:
        """The inverse of `assemble`."""
        sizes = self._sizes
        return _rearrange(x, sizes, self._receiver, [*sizes], len(self._digits))

    def deliver(self, x: jax.Array) -> jax.Array:
        """The inverse of `address`."""
        if self.assignment.layout == GATHER:
            return x
        sizes = self._sizes
        k, m, n = self._share
        return _rearrange(x, sizes, [*sizes], self._sender, 0).reshape(k, m, n)

    def join(self, x: jax.Array) -> jax.Array:
        """Put the shares of all copies together: the inverse of `my_share`."""
        if not self.assignment.copies:
            return x[0]
        k, m, n = self._share
        sizes: dict[Label, int] = {}
        for i, role in enumerate(self.assignment.copies):
            sizes |= {f"home{i}": role.home, f"sharer{i}": role.split}
        homes = [label for label in sizes if label.startswith("home")]
        sharers = [label for label in sizes if label.startswith("sharer")]
        sizes |= {"k": k, "m": m, "n": n}
        target = [*homes, "k", "m", *sharers, "n"]
        return _rearrange(x, sizes, [*sizes], target, 0).reshape(self.tiles)

    @property
    def _digits(self) -> dict[Label, int]:
        """Digits of a device's number in the exchange, major first."""
        digits: dict[Label, int] = {}
        for i, role in enumerate(self.assignment.moved):
            digits[f"home{i}{role.holds}"] = role.home
            if role.holds == ROWS or self.assignment.layout == GATHER:
                digits[f"sharer{i}{role.holds}"] = role.split
        return digits

    @property
    def _share(self) -> tuple[int, int, int]:
        """Shape of this device's share of the tiles."""
        k, m, n = self.tiles
        homes = math.prod(role.home for role in self.assignment.copies)
        sharers = math.prod(role.split for role in self.assignment.copies)
        return (k // homes, m, n // sharers) if self.assignment.layout != GATHER else (k, m, n)

    @property
    def _sizes(self) -> dict[Label, int]:
        """Lengths of the axes while tiles are on their way: digits, `q`, `m`, `n`."""
        (k, m, n), digits = self._share, self._digits
        if self.assignment.layout == GATHER:
            return {**digits, "q": k, "m": m, "n": n}
        homes, sharers = (
            math.prod(size for label, size in digits.items() if label.startswith(kind))
            for kind in ("home", "sharer")
        )
        return {**digits, "q": k // homes, "m": m, "n": n // sharers}

    @property
    def _sender(self) -> list[Label]:
        """Axes as the sender has them: homes are runs of matrices, sharers runs of columns."""
        homes = [label for label in self._digits if label.startswith("home")]
        sharers = [label for label in self._digits if label.startswith("sharer")]
        return [*homes, "q", "m", *sharers, "n"]

    @property
    def _receiver(self) -> list[Label]:
        """Axes as the receiver has them: senders are runs of rows or of columns."""
        rows = [label for label in self._digits if label.endswith(ROWS)]
        cols = [label for label in self._digits if label.endswith(COLS)]
        return ["q", *rows, "m", *cols, "n"]

    def _whole(self, holds: str) -> int:
        """Tiles that lie side by side in an assembled matrix."""
        return math.prod(size for label, size in self._digits.items() if label.endswith(holds))


def _mine(x: jax.Array, group: Group, axis: int) -> jax.Array:
    """This device's run of an axis."""
    length = x.shape[axis] // group.size
    return lax.dynamic_slice_in_dim(x, group.index() * length, length, axis)


def _rearrange(
    x: jax.Array,
    sizes: dict[Label, int],
    source: Sequence[Label],
    target: Sequence[Label],
    merged: int,
) -> jax.Array:
    """Read `x` with the axes `source`, put them in the order `target`, merge the first `merged`."""
    x = x.reshape([sizes[label] for label in source])
    x = x.transpose([list(source).index(label) for label in target])
    return x.reshape(-1, *x.shape[merged:]) if merged else x
