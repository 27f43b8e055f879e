"""The numbers of the plan's picture, device by device: who owns what, what arrives, who waits.

Made from `Plan.to_dict()` alone and drawn by `plan_picture.py`. A plan deals a lot of matrices to
homes; the home of a device follows from its place on the mesh, and home `h` owns the matrices
`[h q, (h + 1) q)` of the lot, of which those past its count are padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Entry = Mapping[str, Any]
"""A plan, a bucket or a lot, as `Plan.to_dict()` has it."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that arrive at a device in one update, by the errand that they are on."""

    inward: int
    """Tiles of matrices on their way home."""
    working: int
    """Sums and parts of products, where several devices share a matrix."""
    outward: int
    """Finished tiles on their way back, and results that holders of copies hand each other."""


@dataclasses.dataclass(frozen=True)
class Band:
    """One lot of a plan; arrays are `[devices]`, in the order of the mesh."""

    bucket: Entry
    """The bucket that it is a part of."""
    assignment: Entry
    """The lot itself."""
    owner: np.ndarray
    """Number of the home that a device belongs to."""
    first: np.ndarray
    """Number of the first matrix of the device's home, in the bucket."""
    owned: np.ndarray
    """Matrices that the home owns, padding not counted."""
    traffic: Traffic
    """What arrives at each device."""

    @property
    def sharing(self) -> int:
        """Devices that share each matrix."""
        whole = self.assignment["layout"] in ("local", "gather")
        return 1 if whole else math.prod(self.assignment["shared_by"].values())

    @property
    def busy(self) -> np.ndarray:
        """Operations of a device on real matrices."""
        return self.assignment["flops"] / self.assignment["owned"] * self.owned

    @property
    def members(self) -> str:
        """The parameters in short: where they are, and what they are called."""
        words = [_words(path) for path in self.bucket["members"]]
        above, names = (dict.fromkeys(w[i] for w in words if len(w) >= -i) for i in (-2, -1))
        return ": ".join(", ".join(some) for some in (above, names) if some)


def bands(plan: Entry) -> list[Band]:
    """A band for every lot, in the order of the plan."""
    return [
        _band(plan, bucket, assignment)
        for bucket in plan["buckets"]
        for assignment in bucket["assignments"]
    ]


def _band(plan: Entry, bucket: Entry, assignment: Entry) -> Band:
    places = _places(plan["mesh"])
    home = _number(places, _homes(bucket, assignment))
    others = _number(places, [(axis, 1, plan["mesh"][axis]) for axis in bucket["batch_over"]])
    held = bucket["matrices"] // bucket["copies"]
    return Band(
        bucket=bucket,
        assignment=assignment,
        owner=others * (home.max() + 1) + home,
        first=others * held + assignment["start"] + home * assignment["owned"],
        owned=np.clip(assignment["count"] - home * assignment["owned"], 0, assignment["owned"]),
        traffic=_traffic(plan, bucket, assignment),
    )


def _places(mesh: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Index of every device along every axis of the mesh."""
    sizes = mesh or {"": 1}
    indices = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    return dict(zip(sizes, indices, strict=True))


def _number(places: Mapping[str, np.ndarray], digits: Iterable[tuple[str, int, int]]) -> np.ndarray:
    """The number that the digits (axis, stride, size) of a device's place spell, major first."""
    number = np.zeros_like(next(iter(places.values())))
    for axis, stride, size in digits:
        number = number * size + places[axis] // stride % size
    return number


def _homes(bucket: Entry, assignment: Entry) -> list[tuple[str, int, int]]:
    """The digits that tell homes apart: holders of copies first, as they part the lot first."""
    if assignment["layout"] in ("local", "gather"):
        return []
    cut = {*bucket["rows_over"], *bucket["cols_over"]}
    ordered = sorted(assignment["homes"], key=lambda axis: axis in cut)
    return [(axis, assignment["shared_by"][axis], assignment["homes"][axis]) for axis in ordered]


def _traffic(plan: Entry, bucket: Entry, assignment: Entry) -> Traffic:
    if assignment["layout"] == "gather":
        return Traffic(assignment["wire"], 0, 0)
    homes, sharers = assignment["homes"], assignment["shared_by"]
    rows = math.prod(homes[axis] * sharers[axis] for axis in bucket["rows_over"] if axis in homes)
    cols = math.prod(homes[axis] for axis in bucket["cols_over"] if axis in homes)
    copies = math.prod(
        homes[axis] * sharers[axis]
        for axis in homes
        if axis not in (*bucket["rows_over"], *bucket["cols_over"])
    )
    tiles = _tiles(plan, bucket, assignment)
    trip = _missing(tiles // copies, rows * cols)
    results = _missing(tiles, copies)
    return Traffic(trip, max(assignment["wire"] - 2 * trip - results, 0), trip + results)


def _tiles(plan: Entry, bucket: Entry, assignment: Entry) -> int:
    """Bytes of a lot on one device before anything moves, padding included."""
    cut = math.prod(plan["mesh"][a] for a in (*bucket["rows_over"], *bucket["cols_over"]))
    entries = bucket["rows"] * bucket["cols"] // cut * (assignment["count"] + assignment["padding"])
    return entries * int(jnp.dtype(plan["dtype"]).itemsize)


def _missing(bytes_: int, devices: int) -> int:
    """What a device lacks of a result that is spread evenly over so many."""
    return bytes_ * (devices - 1) // devices


def _words(path: str) -> list[str]:
    """A path without layer numbers and the words that all kernels share."""
    skipped = ("kernel", "weight", "w")
    words = [w for w in path.split("/") if w not in skipped and not w.isdigit()]
    return words or [path]
