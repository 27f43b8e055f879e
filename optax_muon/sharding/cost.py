"""What a layout costs: operations, bytes and collectives, and the time that they take.

Only ratios decide between layouts: in the time that it takes to receive one byte, a TPU or a GPU
performs about a thousand operations, a simulated device of a CPU about forty (`platforms.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from optax_muon.platforms import get_platform


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device receives from others in one update, by purpose."""

    inward: int = 0
    """Tiles of matrices on their way to the devices that work on them."""
    working: int = 0
    """Gram matrices that devices sum or gather while they share a matrix."""
    outward: int = 0
    """Finished tiles on their way back, and results that replicas exchange."""

    @property
    def total(self) -> int:
        """All bytes received."""
        return self.inward + self.working + self.outward

    def __add__(self, other: Traffic) -> Traffic:
        """Add part by part."""
        return Traffic(
            self.inward + other.inward,
            self.working + other.working,
            self.outward + other.outward,
        )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What some matrices cost one device in one update."""

    flops: int = 0
    """Operations, a multiply-add counted as two."""
    collective_bytes: int = 0
    """Result bytes of the collectives, as `optax_muon.hlo` reads them from the compiled program."""
    traffic: Traffic = Traffic()
    """Bytes received from other devices."""
    min_received_bytes: int = 0
    """Lower bound of the bytes received: only what a device lacks, without padding or sums."""
    collectives: int = 0
    """Number of collectives."""
    memory: int = 0
    """Bytes of temporary arrays at the peak."""

    @property
    def received_bytes(self) -> int:
        """Bytes received from other devices."""
        return self.traffic.total

    def __add__(self, other: Cost) -> Cost:
        """The cost of both, one after the other: sums, and the larger of the two peaks."""
        return Cost(
            self.flops + other.flops,
            self.collective_bytes + other.collective_bytes,
            self.traffic + other.traffic,
            self.min_received_bytes + other.min_received_bytes,
            self.collectives + other.collectives,
            max(self.memory, other.memory),
        )

    def to_dict(self) -> dict[str, int]:
        """All numbers by name."""
        return {
            "flops": self.flops,
            "collective_bytes": self.collective_bytes,
            "received_bytes": self.received_bytes,
            "received_inward_bytes": self.traffic.inward,
            "received_working_bytes": self.traffic.working,
            "received_outward_bytes": self.traffic.outward,
            "min_received_bytes": self.min_received_bytes,
            "collectives": self.collectives,
            "memory": self.memory,
        }


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Rates that turn a `Cost` into seconds.

    >>> CostModel.for_platform("tpu").seconds(Cost(flops=2 * 10**14))
    1.0
    """

    flops: float
    """Operations per second of a device on large products."""
    bandwidth: float
    """Bytes per second that arrive at a device."""
    latency: float
    """Seconds per collective, whatever its size."""

    @classmethod
    def for_platform(cls, name: str) -> CostModel:
        """The rates of a platform.

        Raises:
            ValueError: The platform is unknown.
        """
        platform = get_platform(name)
        return cls(platform.flops, platform.bandwidth, platform.latency)

    def seconds(self, cost: Cost) -> float:
        """Modelled time of a cost, with no communication hidden behind products."""
        return cost.flops / self.flops + self.message_seconds(cost)

    def message_seconds(self, cost: Cost) -> float:
        """Modelled time of its messages."""
        return cost.received_bytes / self.bandwidth + cost.collectives * self.latency


class MatrixWork(Protocol):
    """Work on one matrix whose columns lie on some number of devices: `polar.work.Work`."""

    @property
    def flops(self) -> int:
        """Operations, a multiply-add counted as two."""

    @property
    def sums(self) -> int:
        """Gram matrices summed over the devices in float32."""

    @property
    def gathers(self) -> int:
        """Gram matrices of which each device computes some rows, gathered in the compute dtype."""

    @property
    def form(self) -> str:
        """The form of the evaluation, as reports print it."""


class Counted(Protocol):
    """An orthogonalizer that counts its work."""

    def count(self, m: int, n: int, devices: int = 1, *, platform: str) -> MatrixWork:
        """The work of each of the devices that share the columns of one matrix `[m, n]`."""


@dataclasses.dataclass(frozen=True)
class WorkModel:
    """The orthogonalizer as the planner counts it."""

    orthogonalizer: Counted
    """Counts one matrix; hashable, so that equal plans are searched once."""
    steps: int
    """Steps of the polynomial."""
    dtype: np.dtype | None = None
    """Dtype of the operands and of the tiles that travel; None is the platform's."""
    supports_column_shards: bool = True
    """Whether it takes matrices whose columns lie on several devices."""
    platform: str = "cpu"
    """The platform that it runs on."""

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return 4 if self.dtype is None else self.dtype.itemsize

    def with_platform(self, platform: str) -> WorkModel:
        """The same on a platform, in the platform's compute dtype if none is set."""
        dtype = self.dtype or get_platform(platform).compute_dtype
        return dataclasses.replace(self, dtype=dtype, platform=platform)

    def work_of(self, rows: int, cols: int, devices: int = 1) -> MatrixWork:
        """The work of each of the devices that share the columns of one matrix `[rows, cols]`."""
        return self.orthogonalizer.count(rows, cols, devices, platform=self.platform)

    def cost_of(self, rows: int, cols: int, devices: int = 1) -> Cost:
        """Cost per device of one matrix `[rows, cols]` whose columns are split over `devices`."""
        return self.cost(self.work_of(rows, cols, devices), rows, cols, devices)

    def cost(self, work: MatrixWork, rows: int, cols: int, devices: int = 1) -> Cost:
        """Cost of this work on a matrix `[rows, cols]`, per device that shares it."""
        gram = rows * rows
        memory = rows * cols // devices * (2 * self.itemsize + 4) + gram * (2 * self.itemsize + 8)
        if devices == 1:
            return Cost(work.flops, memory=memory)
        summed, gathered = 4 * gram * work.sums, self.itemsize * gram * work.gathers
        # Two devices swap halves, and join them without a collective.
        gather_results = gathered // 2 if devices == 2 else gathered
        return Cost(
            work.flops,
            # 8 bytes: two scalars, the largest entry and the norm, are reduced in float32.
            collective_bytes=summed + gather_results + 8,
            traffic=Traffic(working=(2 * summed + gathered) * (devices - 1) // devices),
            collectives=work.sums + work.gathers + 2,
            memory=memory,
        )
