"""An assignment: which devices work on a range of a bucket's matrices, and how tiles reach them.

Every mesh axis that a bucket's matrices are cut over, or replicated over, has a role. Its devices
are divided into homes, which own different matrices; the devices of one home share the columns of
each matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from optax_muon.platforms import Platform
from optax_muon.sharding.cost import Cost, Received, Traffic
from optax_muon.sharding.device_groups import Piece

ROWS, COLS, COPIES = "rows", "cols", "copies"

Orthogonalizer = Callable[..., jax.Array]
"""`[..., m, n] -> [..., m, n]`; takes `column_shards=Group` where the plan splits matrices."""

Step = Callable[[jax.Array], Any]
"""What a device does between two messages: it takes what has arrived, and gives the next `Message`,
or in the end the orthogonalized tiles."""


@dataclasses.dataclass(frozen=True)
class Role:
    """How an assignment uses one mesh axis."""

    axis: str
    """Name of the mesh axis."""
    extent: int
    """Devices along it."""
    holds: str
    """What its devices hold of a matrix: different `rows`, different `cols`, or `copies`."""
    home: int
    """Number of homes along the axis; `extent / home` devices share each of them."""

    @property
    def split(self) -> int:
        """Devices along the axis that share a home."""
        return self.extent // self.home

    @property
    def homes(self) -> Piece:
        """The digit of a device's index that tells the homes apart."""
        return Piece(self.axis, self.extent, self.home, self.split)

    @property
    def sharers(self) -> Piece:
        """The digit of a device's index that tells the devices of one home apart."""
        return Piece(self.axis, self.extent, self.split, 1)


class Layout(Protocol):
    """Where matrices are worked on, and how their tiles get there and back.

    `exchange.Owned` and `gather.Gathered` are the two layouts of this package. A layout class also
    has `assign`, by which the search asks for assignments (`search.LayoutClass`).
    """

    @property
    def name(self) -> str:
        """The name that reports print."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The mesh axes that take part."""

    @property
    def homes(self) -> tuple[Piece, ...]:
        """The digits that number the homes, major first; empty if all devices do the same work."""

    @property
    def sharing(self) -> int:
        """Devices that share the columns of each matrix."""

    def describe(self, copies: int) -> str:
        """Which devices work on the matrices, for a table; `copies` is `BucketPlan.copies`."""

    def steps(self, tiles: tuple[int, ...], orthogonalizer: Orthogonalizer) -> Sequence[Step]:
        """The steps that orthogonalize tiles of the shape `[k, m, n]`, inside `shard_map`.

        The first takes the tiles; it and all others but the last give a `Message`. The products are
        those of the second, and no step keeps an array for another.
        """


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Consecutive matrices of a bucket that are processed in the same way."""

    mechanism: Layout
    """The layout: which devices work on the matrices, and how the tiles travel."""
    count: int
    """Number of matrices of which one device holds a tile."""
    cost: Cost
    """Cost per device and update."""
    start: int = 0
    """Index of the first matrix in the bucket."""
    padding: int = 0
    """Zero matrices added so that every home gets the same number."""
    chunks: int = 1
    """Number of equal parts, processed one after the other to bound temporary memory."""
    pipelined: bool = False
    """Whether the tiles of a chunk travel under the work on others; if not, they are waited for."""
    form: str = ""
    """How each matrix is computed, as the orthogonalizer names it."""

    @property
    def layout(self) -> str:
        """Name of the layout: `local`, `home`, `split` or `gather`."""
        return self.mechanism.name

    @property
    def roles(self) -> tuple[Role, ...]:
        """The mesh axes that take part."""
        return self.mechanism.roles

    @property
    def homes(self) -> int:
        """Number of homes."""
        return math.prod(piece.size for piece in self.mechanism.homes)

    @property
    def sharing(self) -> int:
        """Devices that share the columns of each matrix."""
        return self.mechanism.sharing

    @property
    def owned(self) -> int:
        """Matrices that a device works on, padding included."""
        return (self.count + self.padding) // self.homes

    def can_hide(self, device: Platform) -> Traffic:
        """The part of its traffic that this device can hide behind the work on other matrices.

        Devices that share a matrix wait for the sums of a chunk.
        """
        hidden = self.cost.traffic.only(device.hides)
        if self.chunks == 1:
            return hidden
        return dataclasses.replace(hidden, working=Received()) if self.pipelined else Traffic()

    def describe(self, copies: int = 1) -> str:
        """Which devices work on the matrices, for a table; `copies` is `BucketPlan.copies`."""
        return self.mechanism.describe(copies)

    def to_dict(self) -> dict[str, Any]:
        """In plain numbers, strings and lists."""
        return {
            "layout": self.layout,
            "start": self.start,
            "count": self.count,
            "padding": self.padding,
            "owned": self.owned,
            "chunks": self.chunks,
            "pipelined": self.pipelined,
            "form": self.form,
            "homes": {role.axis: role.home for role in self.roles},
            "shared_by": {role.axis: role.split for role in self.roles},
            **self.cost.to_dict(),
        }
