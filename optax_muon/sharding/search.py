"""Which matrices are whole on which device: the layouts, and the search for the cheapest.

Every mesh axis that a bucket's matrices are cut over, or lie in copies on, takes a role. Part of
its devices (`home`) own different matrices; the rest (`split`) share each matrix by columns. One
matrix a device and nothing left over is `home`; what remains of a bucket goes to fewer homes of
several devices each. Search is exhaustive: an axis of 16 has five roles, a mesh a few hundred
combinations.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from optax_muon.sharding.cost import Cost, CostModel, WorkModel
from optax_muon.sharding.device_groups import Group, Piece

ROWS, COLS, COPIES = "rows", "cols", "copies"
LOCAL, HOME, SPLIT, GATHER = "local", "home", "split", "gather"


@dataclasses.dataclass(frozen=True)
class Role:
    """What one mesh axis does for a lot of matrices."""

    axis: str
    """Name of the mesh axis."""
    extent: int
    """Devices along it."""
    holds: str
    """What its devices hold of a matrix: different `rows`, different `cols`, or `copies`."""
    home: int
    """How many homes it is divided into; the other factor of the extent shares each home."""

    @property
    def split(self) -> int:
        """Devices along the axis that share a home."""
        return self.extent // self.home

    @property
    def homes(self) -> Piece:
        """The digit that tells the homes apart."""
        return Piece(self.axis, self.extent, self.home, self.split)

    @property
    def sharers(self) -> Piece:
        """The digit that tells the devices of one home apart."""
        return Piece(self.axis, self.extent, self.split, 1)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A run of a bucket's matrices that are treated alike."""

    layout: str
    """`local`, `home`, `split` or `gather`."""
    start: int
    """First matrix of the bucket."""
    count: int
    """How many matrices, as one device counts them."""
    padding: int
    """Zero matrices added so that every home gets as many."""
    roles: tuple[Role, ...]
    """The mesh axes that take part."""
    cost: Cost
    """Per device and update."""
    rounds: int = 1
    """How many turns the lot is done in, so that temporary memory stays bounded."""
    form: str = ""
    """How each matrix is worked on, in the orthogonalizer's words."""

    def to_dict(self) -> dict[str, Any]:
        """In plain numbers, strings and lists."""
        return {
            "layout": self.layout,
            "start": self.start,
            "count": self.count,
            "padding": self.padding,
            "owned": self.owned,
            "rounds": self.rounds,
            "form": self.form,
            "homes": {role.axis: role.home for role in self.roles},
            "shared_by": {role.axis: role.split for role in self.roles},
            **dataclasses.asdict(self.cost),
        }

    @property
    def homes(self) -> int:
        """How many homes there are."""
        return math.prod(role.home for role in self.roles)

    @property
    def sharing(self) -> int:
        """Devices that share the columns of each matrix."""
        return math.prod(role.split for role in self.roles)

    @property
    def owned(self) -> int:
        """Matrices that a device works on."""
        whole = self.layout in (LOCAL, GATHER)
        return self.count if whole else (self.count + self.padding) // self.homes

    @property
    def moved(self) -> tuple[Role, ...]:
        """Roles of the axes that hold pieces of a matrix."""
        return tuple(role for role in self.roles if role.holds != COPIES)

    @property
    def copies(self) -> tuple[Role, ...]:
        """Roles of the axes that hold copies and share the work."""
        return tuple(role for role in self.roles if role.holds == COPIES)

    @property
    def exchange(self) -> Group:
        """Devices that bring each other's tiles together: rows always, columns to reach a home."""
        pieces = []
        for role in self.moved:
            pieces.append(role.homes)
            if role.holds == ROWS or self.layout == GATHER:
                pieces.append(role.sharers)
        return Group(tuple(pieces))

    @property
    def columns(self) -> Group:
        """Devices that share the columns of a matrix while it is worked on."""
        return Group(tuple(role.sharers for role in self.roles))

    @property
    def replicas(self) -> Group:
        """Devices that held copies and hand each other their results."""
        pieces = (piece for role in self.copies for piece in (role.homes, role.sharers))
        return Group(tuple(pieces))


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


@dataclasses.dataclass(frozen=True)
class LayoutSearch:
    """Everything that a layout is chosen by."""

    shape: BucketGeometry
    work: WorkModel
    model: CostModel
    layout: str | None = None
    """A layout to insist on for all matrices; None takes the cheapest."""
    memory: int = 2**28
    """Bytes of temporary arrays per lot above which it is done in rounds."""

    def assignments(self, count: int) -> tuple[Assignment, ...]:
        """Deal out `count` matrices at the least cost."""
        assignments = self._best(count)
        if self.layout is None:
            assignments = min(assignments, (self._gather(count),), key=self._seconds)
        starts = itertools.accumulate((assignment.count for assignment in assignments), initial=0)
        return tuple(
            dataclasses.replace(assignment, start=start)
            for assignment, start in zip(assignments, starts, strict=False)
        )

    def _best(self, count: int) -> tuple[Assignment, ...]:
        return min(self._ways(count), key=self._seconds)

    def _seconds(self, assignments: tuple[Assignment, ...]) -> float:
        return sum(self.model.seconds(assignment.cost) for assignment in assignments)

    def _ways(self, count: int) -> list[tuple[Assignment, ...]]:
        """All ways considered: every choice of roles, its remainder padded or dealt out again."""
        if self.layout == GATHER:
            return [(self._gather(count),)]
        ways: list[tuple[Assignment, ...]] = []
        for roles in _choices(self.shape, self.work.supports_column_shards and self.layout != HOME):
            homes = math.prod(role.home for role in roles)
            whole, rest = divmod(count, homes)
            if rest:
                ways.append((self._lot(count, homes - rest, roles),))
            if whole:
                assignment = self._lot(count - rest, 0, roles)
                ways.append((assignment, *_remainder(self, rest)) if rest else (assignment,))
        return ways

    def _lot(self, count: int, padding: int, roles: tuple[Role, ...]) -> Assignment:
        cut = any(role.split > 1 for role in roles)
        name = SPLIT if cut else HOME if roles else LOCAL
        assignment = Assignment(name, 0, count, padding, roles, Cost())
        whole = (self.shape.rows, self.shape.cols)
        share = self.work.work_of(*whole, assignment.sharing)
        one = self.work.cost(share, *whole, assignment.sharing)
        rounds = _rounds(assignment.owned, one.memory, self.memory)
        held = assignment.owned // rounds
        rows, cols = self.shape.tile
        moved, least = (n * rows * cols * self.work.itemsize for n in (count + padding, count))
        trips = 2 * (assignment.exchange.size > 1)
        shared = assignment.replicas.size > 1
        cost = Cost(
            flops=assignment.owned * one.flops,
            bytes=assignment.owned * one.bytes
            + trips * moved // assignment.replicas.size
            + shared * moved,
            wire=assignment.owned * one.wire + _arriving(assignment, trips, moved),
            least=_arriving(assignment, trips, least),
            messages=rounds * (one.messages + trips + shared),
            memory=held * one.memory + 2 * moved // rounds,
        )
        return dataclasses.replace(assignment, cost=cost, rounds=rounds, form=share.form)

    def _gather(self, count: int) -> Assignment:
        """The paper's Algorithm 1: every device gathers whole matrices and works on all of them."""
        roles = tuple(Role(a, size, ROWS, 1) for a, size in self.shape.rows_over)
        roles += tuple(Role(a, size, COLS, 1) for a, size in self.shape.cols_over)
        assignment = Assignment(GATHER if roles else LOCAL, 0, count, 0, roles, Cost())
        rows, cols = self.shape.rows, self.shape.cols
        share = self.work.work_of(rows, cols)
        one = self.work.cost(share, rows, cols)
        bytes_ = count * rows * cols * self.work.itemsize if roles else 0
        rounds = _rounds(count, one.memory, self.memory)
        cost = Cost(
            flops=count * one.flops,
            bytes=bytes_,
            wire=_missing(bytes_, assignment.exchange),
            least=_missing(bytes_, assignment.exchange),
            messages=rounds * bool(roles),
            memory=count // rounds * (one.memory + rows * cols * 4),
        )
        return dataclasses.replace(assignment, cost=cost, rounds=rounds, form=share.form)


@functools.lru_cache(maxsize=4096)
def _remainder(search: LayoutSearch, count: int) -> tuple[Assignment, ...]:
    return search._best(count)


def _over(shape: BucketGeometry) -> Sequence[tuple[tuple[str, int], ...]]:
    return shape.rows_over, shape.cols_over, shape.copies_over


@functools.lru_cache(maxsize=256)
def _choices(shape: BucketGeometry, splits: bool) -> tuple[tuple[Role, ...], ...]:
    """Every combination of roles that the shape allows."""
    options: list[list[tuple[Role, ...]]] = []
    for holds, over in zip((ROWS, COLS, COPIES), _over(shape), strict=True):
        for axis, extent in over:
            roles: list[tuple[Role, ...]] = [
                (Role(axis, extent, holds, home),) for home in _divisors(extent)
            ]
            options.append([*roles, ()] if holds == COPIES else [*roles])
    combined = (tuple(itertools.chain(*choice)) for choice in itertools.product(*options))
    return tuple(roles for roles in combined if _fits(shape, roles, splits))


def _fits(shape: BucketGeometry, roles: tuple[Role, ...], splits: bool) -> bool:
    """Whether the columns of a tile divide among those that share them."""
    shared = math.prod(role.split for role in roles)
    cut = math.prod(role.split for role in roles if role.holds != COLS)
    return shared == 1 or (splits and shape.tile[1] % cut == 0)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _arriving(assignment: Assignment, trips: int, bytes_: int) -> int:
    """What arrives of so many bytes of tiles: shares in and out, and the results of copies."""
    share = trips * bytes_ // assignment.replicas.size
    return _missing(share, assignment.exchange) + _missing(bytes_, assignment.replicas)


def _missing(bytes_: int, group: Group) -> int:
    """What a device lacks of a result that is spread evenly over a group."""
    return bytes_ * (group.size - 1) // group.size


def _rounds(owned: int, one: int, memory: int) -> int:
    """The fewest equal turns that keep the temporary arrays below `memory`."""
    return next(
        n
        for n in range(1, owned + 1)
        if n == owned or (owned % n == 0 and owned // n * one <= memory)
    )
