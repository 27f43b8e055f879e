"""The search for the cheapest layout of a bucket.

It is exhaustive: an axis of 16 devices has five roles, a mesh a few hundred combinations of roles.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from optax_muon.platforms import Platform
from optax_muon.sharding.assignment import COLS, COPIES, ROWS, Assignment, Role
from optax_muon.sharding.cost import CostModel, WorkModel

TIES = 0.01
"""Weight of hidden messages: of two layouts with equal work, the one that moves less is taken."""


@dataclasses.dataclass(frozen=True)
class BucketGeometry:
    """The matrices of a bucket, as the search sees them."""

    rows: int
    """The short side of the whole matrix."""
    cols: int
    """The long side of the whole matrix."""
    rows_over: tuple[tuple[str, int], ...]
    """Mesh axes and sizes that the rows are cut over."""
    cols_over: tuple[tuple[str, int], ...]
    """Mesh axes and sizes that the columns are cut over."""
    copies_over: tuple[tuple[str, int], ...]
    """Mesh axes and sizes that hold copies and may share the work."""

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the tile on one device."""
        rows, cols = (
            math.prod(size for _, size in over) for over in (self.rows_over, self.cols_over)
        )
        return self.rows // rows, self.cols // cols


class LayoutClass(Protocol):
    """The class of a layout, as the search uses it."""

    def assign(self, search: LayoutSearch, count: int, /) -> Iterable[tuple[Assignment, ...]]:
        """Every way in which this layout can treat `count` matrices."""


@dataclasses.dataclass(frozen=True)
class LayoutSearch:
    """Everything that decides between layouts."""

    geometry: BucketGeometry
    """The matrices."""
    work: WorkModel
    """Counts the orthogonalizer."""
    model: CostModel
    """Turns costs into seconds."""
    device: Platform
    """Says which messages can be hidden."""
    layouts: tuple[LayoutClass, ...]
    """The layouts to choose from; the first wins a tie."""
    may_split: bool = True
    """Whether devices may share a matrix by columns, if the orthogonalizer supports it."""
    memory: int = 2**28
    """Bytes of temporary arrays above which an assignment is done in chunks."""

    def assignments(self, count: int) -> tuple[Assignment, ...]:
        """The cheapest assignments of `count` matrices, in order."""
        found = self._cheapest(count)
        starts = itertools.accumulate((assignment.count for assignment in found), initial=0)
        return tuple(
            dataclasses.replace(assignment, start=start)
            for assignment, start in zip(found, starts, strict=False)
        )

    def cheapest(self, count: int) -> tuple[Assignment, ...]:
        """The same, cached: the searches of a bucket ask for the same remainders many times."""
        return _remembered(self, count)

    def _cheapest(self, count: int) -> tuple[Assignment, ...]:
        ways = (way for layout in self.layouts for way in layout.assign(self, count))
        return min(ways, key=self.seconds)

    def seconds(self, assignments: Sequence[Assignment]) -> float:
        """Modelled time of some assignments of a bucket.

        Messages that the device can hide count as far as they take longer than the work.
        """
        model = self.model
        work = sum(model.work_seconds(each.cost) for each in assignments)
        messages = sum(model.message_seconds(each.cost) for each in assignments)
        hidden = sum(each.can_hide(self.device).total / model.bandwidth for each in assignments)
        return max(work, hidden) + messages - hidden + TIES * hidden

    def role_choices(self) -> tuple[tuple[Role, ...], ...]:
        """Every combination of roles that the mesh axes of the bucket can take."""
        return _choices(self.geometry, self.work.supports_column_shards and self.may_split)

    def chunks(self, owned: int, memory: int) -> int:
        """The fewest equal parts of `owned` matrices, each with `memory` bytes, that fit."""
        fits = (n for n in range(1, owned) if not owned % n and owned // n * memory <= self.memory)
        return next(fits, owned)


@functools.lru_cache(maxsize=4096)
def _remembered(search: LayoutSearch, count: int) -> tuple[Assignment, ...]:
    return search._cheapest(count)


@functools.lru_cache(maxsize=256)
def _choices(geometry: BucketGeometry, splits: bool) -> tuple[tuple[Role, ...], ...]:
    """Every combination of roles that the geometry allows."""
    over = (geometry.rows_over, geometry.cols_over, geometry.copies_over)
    options = [
        _axis_choices(axis, extent, holds)
        for holds, axes in zip((ROWS, COLS, COPIES), over, strict=True)
        for axis, extent in axes
    ]
    combined = (tuple(itertools.chain(*choice)) for choice in itertools.product(*options))
    return tuple(roles for roles in combined if _fits(geometry, roles, splits))


def _axis_choices(axis: str, extent: int, holds: str) -> list[tuple[Role, ...]]:
    """The roles of one axis; the devices of an axis of copies may also all repeat the work."""
    roles: list[tuple[Role, ...]] = [
        (Role(axis, extent, holds, home),) for home in _divisors(extent)
    ]
    return [*roles, ()] if holds == COPIES else roles


def _fits(geometry: BucketGeometry, roles: tuple[Role, ...], splits: bool) -> bool:
    """Whether the columns of a tile divide among the devices that share them."""
    shared = math.prod(role.split for role in roles)
    cut = math.prod(role.split for role in roles if role.holds != COLS)
    return shared == 1 or (splits and geometry.tile[1] % cut == 0)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
