"""What a layout costs: operations, bytes and messages, and the seconds that they are worth.

Only ratios decide: how many operations a chip does in the time that one byte takes to arrive, about
a thousand on a TPU or a GPU, about forty between the devices that share a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from optax_muon.platforms import get_platform


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a lot of matrices costs one device in one update."""

    flops: int = 0
    """Operations, a multiply-add counted as two."""
    bytes: int = 0
    """Result bytes of its collectives, as the compiled program states them."""
    wire: int = 0
    """Bytes that arrive from other devices."""
    least: int = 0
    """Bytes that have to arrive: each trip brings what a device lacks, nothing padded or summed."""
    messages: int = 0
    """Collectives, one after the other."""
    memory: int = 0
    """Bytes of temporary arrays at the peak."""

    def __add__(self, other: Cost) -> Cost:
        """One after the other: sums, and the larger peak."""
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.wire + other.wire,
            self.least + other.least,
            self.messages + other.messages,
            max(self.memory, other.memory),
        )


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
          ValueError: the platform is unknown.
        """
        platform = get_platform(name)
        return cls(platform.flops, platform.bandwidth, platform.latency)

    def seconds(self, cost: Cost) -> float:
        """Time of a cost, nothing overlapped."""
        return cost.flops / self.flops + cost.wire / self.bandwidth + cost.messages * self.latency


class Work(Protocol):
    """Work on one matrix whose columns lie on some number of devices: `polar.work.Work`."""

    @property
    def flops(self) -> int:
        """Operations, a multiply-add counted as two."""

    @property
    def sums(self) -> int:
        """Gram matrices summed over the devices in float32."""

    @property
    def gathers(self) -> int:
        """As many that the devices compute by rows each, gathered in the compute dtype."""

    @property
    def form(self) -> str:
        """The form of the evaluation, for people."""


class Counted(Protocol):
    """An orthogonalizer that counts its work."""

    def count(self, m: int, n: int, devices: int = 1, *, platform: str) -> Work:
        """The work on one matrix `[m, n]` of each of the devices that share its columns."""


@dataclasses.dataclass(frozen=True)
class WorkModel:
    """The orthogonalizer as the planner counts it."""

    orthogonalizer: Counted
    """Counts one matrix; hashable, so that equal plans are searched once."""
    steps: int
    """Steps of the polynomial."""
    dtype: np.dtype | None = None
    """The compute dtype, of the operands and of what is moved; None is the platform's."""
    supports_column_shards: bool = True
    """Whether it takes matrices whose columns lie on several devices."""
    platform: str = "cpu"
    """Where it runs."""

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return 4 if self.dtype is None else self.dtype.itemsize

    def with_platform(self, platform: str) -> WorkModel:
        """On a platform, with its compute dtype if none is set."""
        dtype = self.dtype or get_platform(platform).compute_dtype
        return dataclasses.replace(self, dtype=dtype, platform=platform)

    def work_of(self, rows: int, cols: int, devices: int = 1) -> Work:
        """The work of each of the devices that share the columns of one matrix `[rows, cols]`."""
        return self.orthogonalizer.count(rows, cols, devices, platform=self.platform)

    def cost_of(self, rows: int, cols: int, devices: int = 1) -> Cost:
        """Cost of one matrix `[rows, cols]`, its columns spread over so many devices."""
        return self.cost(self.work_of(rows, cols, devices), rows, cols, devices)

    def cost(self, work: Work, rows: int, cols: int, devices: int = 1) -> Cost:
        """Cost of this work on a matrix `[rows, cols]`, per device that shares it."""
        gram = rows * rows
        memory = rows * cols // devices * (2 * self.itemsize + 4) + gram * (2 * self.itemsize + 8)
        if devices == 1:
            return Cost(work.flops, memory=memory)
        summed, gathered = 4 * gram * work.sums, self.itemsize * gram * work.gathers
        return Cost(
            work.flops,
            bytes=summed + gathered + 8,
            wire=(2 * summed + gathered) * (devices - 1) // devices,
            messages=work.sums + work.gathers + 2,
            memory=memory,
        )
