"""What the plan decides for one bucket: which device works on which of its matrices. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from optax_muon.sharding.assignment import Assignment
from optax_muon.sharding.buckets import Bucket
from optax_muon.sharding.cost import Cost


@dataclasses.dataclass(frozen=True)
class BucketPlan:
    """A bucket and how its matrices are assigned to devices."""

    bucket: Bucket
    """The matrices, as one device sees them."""
    assignments: tuple[Assignment, ...]
    """Which devices work on them; together, and in order, the assignments cover the bucket."""
    copies: int
    """Number of equal buckets of other matrices on other devices, such as other experts."""
    matrix_cost: Cost
    """Cost of one matrix on one device."""
    around: Cost
    """Cost of what an update does to the stored entries: momentum, casts, packing, the sum."""
    seconds: Mapping[str, float] = dataclasses.field(hash=False)
    """Modelled time of this choice (`chosen`), and of `home` and `gather` for all matrices."""

    @property
    def cost(self) -> Cost:
        """Cost of one update, per device."""
        return sum((assignment.cost for assignment in self.assignments), self.around)

    @property
    def only_transposed(self) -> bool:
        """Whether a transpose is all that happens to the matrices before they are orthogonalized.

        That is so in a bucket of a single parameter that is stored tall, if no matrix moves.
        """
        members = self.bucket.members
        moves = any(assignment.roles for assignment in self.assignments)
        return len(members) == 1 and members[0].tall and not moves

    def to_dict(self) -> dict[str, Any]:
        """In plain numbers, strings and lists."""
        return {
            "rows": self.bucket.rows,
            "cols": self.bucket.cols,
            "matrices": self.bucket.size * self.copies,
            "copies": self.copies,
            "members": [member.path for member in self.bucket.members],
            "rows_over": list(self.bucket.rows_over),
            "cols_over": list(self.bucket.cols_over),
            "batch_over": list(self.bucket.batch_over),
            "seconds": dict(self.seconds),
            "assignments": [assignment.to_dict() for assignment in self.assignments],
        }
