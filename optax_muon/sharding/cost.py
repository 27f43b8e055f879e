"""What a layout costs: operations, bytes and collectives, and the time that they take.

The time of products is that of the form: operations, and numbers that are read and written, at the
rates of the kind of device (`platforms.py`). In the time that it takes to receive one byte, a TPU
or a GPU performs one to five thousand operations, a simulated device of a CPU about forty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Protocol

import numpy as np
from jax.typing import DTypeLike

from optax_muon.platforms import Rates, get_device, get_platform


@dataclasses.dataclass(frozen=True)
class Received:
    """Bytes that one device receives from others, by the collective that brings them."""

    all_to_all: int = 0
    all_gather: int = 0
    all_reduce: int = 0
    collective_permute: int = 0

    @property
    def total(self) -> int:
        """All bytes received."""
        return sum(self.by_collective.values())

    @property
    def by_collective(self) -> dict[str, int]:
        """From the name of a collective in HLO to its bytes."""
        return {name.replace("_", "-"): n for name, n in dataclasses.asdict(self).items()}

    def only(self, collectives: Collection[str]) -> Received:
        """What these collectives bring, as HLO names them."""
        found = self.by_collective
        return Received(*(n if name in collectives else 0 for name, n in found.items()))

    def __add__(self, other: Received) -> Received:
        """Add collective by collective."""
        pairs = zip(self.by_collective.values(), other.by_collective.values(), strict=True)
        return Received(*map(sum, pairs))

    def __mul__(self, times: int) -> Received:
        """Multiply collective by collective."""
        return Received(*(n * times for n in self.by_collective.values()))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device receives from others in one update, by purpose."""

    inward: Received = Received()
    """Tiles of matrices on their way to the devices that work on them."""
    working: Received = Received()
    """Gram matrices that devices sum or gather while they share a matrix."""
    outward: Received = Received()
    """Finished tiles on their way back, and results that replicas exchange."""

    @property
    def total(self) -> int:
        """All bytes received."""
        return self.inward.total + self.working.total + self.outward.total

    def only(self, collectives: Collection[str]) -> Traffic:
        """What these collectives bring, as HLO names them."""
        parts = (self.inward, self.working, self.outward)
        return Traffic(*(part.only(collectives) for part in parts))

    def __add__(self, other: Traffic) -> Traffic:
        """Add part by part."""
        return Traffic(
            self.inward + other.inward,
            self.working + other.working,
            self.outward + other.outward,
        )

    def __mul__(self, times: int) -> Traffic:
        """Multiply part by part."""
        return Traffic(self.inward * times, self.working * times, self.outward * times)


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
    operands: int = 0
    """Numbers that products read and write."""
    passes: int = 0
    """Numbers that everything between products writes."""
    transposed: int = 0
    """Numbers of operands that are transposed before a product."""
    passed_bytes: int = 0
    """Bytes that everything outside the orthogonalizer reads and writes: casts, packing, sums."""

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
            self.operands + other.operands,
            self.passes + other.passes,
            self.transposed + other.transposed,
            self.passed_bytes + other.passed_bytes,
        )

    def __mul__(self, times: int) -> Cost:
        """The cost of as many, one after the other."""
        return Cost(
            self.flops * times,
            self.collective_bytes * times,
            self.traffic * times,
            self.min_received_bytes * times,
            self.collectives * times,
            self.memory,
            self.operands * times,
            self.passes * times,
            self.transposed * times,
            self.passed_bytes * times,
        )

    def to_dict(self) -> dict[str, int]:
        """All numbers by name."""
        return {
            "flops": self.flops,
            "collective_bytes": self.collective_bytes,
            "received_bytes": self.received_bytes,
            "received_inward_bytes": self.traffic.inward.total,
            "received_working_bytes": self.traffic.working.total,
            "received_outward_bytes": self.traffic.outward.total,
            "min_received_bytes": self.min_received_bytes,
            "collectives": self.collectives,
            "memory": self.memory,
            "passed_bytes": self.passed_bytes,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel(Rates):
    """Rates that turn a `Cost` into seconds.

    >>> model = CostModel(flops=2e14, bandwidth=2e11, latency=2e-6)
    >>> model.seconds(Cost(flops=2 * 10**14))
    1.0
    >>> CostModel.for_platform("TPU v5 lite").bandwidth < CostModel.for_platform("TPU v5").bandwidth
    True
    """

    bandwidth: float
    """Bytes per second that arrive at a device."""
    latency: float
    """Seconds per collective, whatever its size."""
    memory: float = math.inf
    """Bytes per second that passes over whole arrays read and write."""

    @classmethod
    def for_platform(
        cls, name: str, dtype: DTypeLike | None = None, *, on_mesh: bool = True
    ) -> CostModel:
        """The rates of a platform, or of a kind of its devices.

        Args:
            name: `tpu`, `gpu`, `cpu`, or JAX's `device_kind`.
            dtype: What the operands of products are rounded to; None is the platform's.
            on_mesh: Whether the device is one of several, as the simulated devices of a CPU are.

        Raises:
            ValueError: The platform is unknown.
        """
        device = get_device(name)
        rates = device.rates_for(dtype or device.compute_dtype)
        share = device.mesh_share if on_mesh else 1.0
        return cls(
            flops=rates.flops * share,
            operands=rates.operands * share,
            passes=rates.passes * share,
            transposed=rates.transposed * share,
            bandwidth=device.bandwidth,
            latency=device.latency,
            memory=device.memory * share,
        )

    def seconds(self, cost: Cost) -> float:
        """Modelled time of a cost, with no communication hidden behind products."""
        return self.work_seconds(cost) + self.message_seconds(cost)

    def work_seconds(self, cost: Cost) -> float:
        """Modelled time of what a device computes."""
        return self.product_seconds(cost) + self.pass_seconds(cost)

    def pass_seconds(self, cost: Cost) -> float:
        """Modelled time of what it does outside the orthogonalizer."""
        return cost.passed_bytes / self.memory

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

    def cost_around(self, entries: int, stored: int, packed: bool) -> Cost:
        """Cost of what an update does to stored entries, apart from moves and products.

        The momentum reads gradient and momentum and writes the momentum; both are read again and
        cast. The result is cast back and read, with the parameter, which is written.

        Args:
            entries: Entries on a device.
            stored: Bytes of a stored entry.
            packed: Whether they are joined with others, or transposed, and taken apart afterwards.
        """
        return Cost(passed_bytes=entries * (9 * stored + (2 + 4 * packed) * self.itemsize))

    def cost(
        self, work: MatrixWork, rows: int, cols: int, devices: int = 1, *, swaps: bool = False
    ) -> Cost:
        """Cost of this work on a matrix `[rows, cols]`, per device that shares it.

        Args:
            work: As counted by `work_of`.
            rows: The short side.
            cols: The long side.
            devices: How many share the columns.
            swaps: Whether they swap parts, two at a time, instead of summing and gathering.
        """
        gram = rows * rows
        memory = rows * cols // devices * (2 * self.itemsize + 4) + gram * (2 * self.itemsize + 8)
        # Orthogonalizers of users may count operations only.
        products = Cost(
            work.flops,
            operands=getattr(work, "operands", 0),
            passes=getattr(work, "passes", 0),
            transposed=getattr(work, "transposed", 0),
            memory=memory,
        )
        if devices == 1:
            return products
        summed, gathered = 4 * gram * work.sums, self.itemsize * gram * work.gathers
        sums, gathers = 2 * summed * (devices - 1) // devices, gathered * (devices - 1) // devices
        if swaps:
            # Two devices swap all that they sum; more of them halves, and halves of these.
            rounds = devices.bit_length() - 1
            times = work.sums * (1 if devices == 2 else 2) + work.gathers + 2
            return products + Cost(
                collective_bytes=sums + gathers + 8 * rounds,
                traffic=Traffic(working=Received(collective_permute=sums + gathers)),
                collectives=rounds * times,
                # Sums and joins as below. More than two also cut off what they send and what they
                # keep, and join the halves again: 5.5 bytes for each that arrives, instead of 2.
                passed_bytes=(4 if devices == 2 else 11) * sums // 2 + 3 * gathered,
            )
        return products + Cost(
            # 8 bytes: two scalars, the largest entry and the norm, are reduced in float32.
            collective_bytes=summed + gathered + 8,
            traffic=Traffic(working=Received(all_reduce=sums, all_gather=gathers)),
            collectives=work.sums + work.gathers + 2,
            # A sum adds what arrives and rounds it, a gather puts what arrives in its place.
            passed_bytes=2 * summed + 3 * gathered,
        )
