"""The numbers of the plan's picture, device by device: who owns what, and who waits.

An assignment divides its matrices among homes. The home of a device follows from its place on the
mesh, and home `h` owns the matrices `[h q, (h + 1) q)` of the assignment; those past its count are
padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from optax_muon.sharding.assignment import Assignment
from optax_muon.sharding.bucket_plan import BucketPlan

Digit = tuple[str, int, int]
"""A digit of a device's index along a mesh axis: (axis, stride, size)."""


@dataclasses.dataclass(frozen=True)
class Band:
    """One assignment of a plan; arrays are `[devices]`, in the order of the mesh."""

    bucket_plan: BucketPlan
    """The bucket of which it is a part."""
    assignment: Assignment
    """The assignment itself."""
    owner: np.ndarray
    """Number of the home that a device belongs to."""
    first: np.ndarray
    """Index in the bucket of the first matrix of the device's home."""
    owned: np.ndarray
    """Matrices that the home owns, without padding."""

    @property
    def busy(self) -> np.ndarray:
        """Operations of a device on real matrices."""
        return self.assignment.cost.flops / self.assignment.owned * self.owned

    @property
    def members(self) -> str:
        """The parameters in short: the modules that they are in, and their names."""
        words = [_words(member.path) for member in self.bucket_plan.bucket.members]
        above, names = (dict.fromkeys(w[i] for w in words if len(w) >= -i) for i in (-2, -1))
        return ": ".join(", ".join(some) for some in (above, names) if some)


def bands(mesh_axes: Mapping[str, int], buckets: Iterable[BucketPlan]) -> list[Band]:
    """One band per assignment of these buckets, in their order."""
    return [
        _band(mesh_axes, bucket_plan, assignment)
        for bucket_plan in buckets
        for assignment in bucket_plan.assignments
    ]


def _band(sizes: Mapping[str, int], bucket_plan: BucketPlan, assignment: Assignment) -> Band:
    places, bucket = _places(sizes), bucket_plan.bucket
    digits = [(piece.axis, piece.stride, piece.size) for piece in assignment.mechanism.homes]
    home = _number(places, digits)
    others = _number(places, [(axis, 1, sizes[axis]) for axis in bucket.batch_over])
    return Band(
        bucket_plan=bucket_plan,
        assignment=assignment,
        owner=others * math.prod(size for _, _, size in digits) + home,
        first=others * bucket.size + assignment.start + home * assignment.owned,
        owned=np.clip(assignment.count - home * assignment.owned, 0, assignment.owned),
    )


def _places(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Index of every device along every axis of the mesh."""
    sizes = sizes or {"": 1}
    indices = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    return dict(zip(sizes, indices, strict=True))


def _number(places: Mapping[str, np.ndarray], digits: Iterable[Digit]) -> np.ndarray:
    """The number that the digits of a device's place spell, major first."""
    number = np.zeros_like(next(iter(places.values())))
    for axis, stride, size in digits:
        number = number * size + places[axis] // stride % size
    return number


def _words(path: str) -> list[str]:
    """A path without layer numbers and the words that all kernels share."""
    skipped = ("kernel", "weight", "w")
    words = [w for w in path.split("/") if w not in skipped and not w.isdigit()]
    return words or [path]
