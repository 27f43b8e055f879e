"""What a layout costs: operations, bytes and messages, and the seconds that they are worth.

Only ratios decide: how many operations a chip does in the time that one byte takes to arrive, about
a thousand on a TPU or a GPU, about forty between the devices that share a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np


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

    >>> RATES["tpu"].seconds(Cost(flops=2 * 10**14))
    1.0
    """

    flops: float
    """Operations per second of a device on large products."""
    bandwidth: float
    """Bytes per second that arrive at a device."""
    latency: float
    """Seconds per collective, whatever its size."""

    def seconds(self, cost: Cost) -> float:
        """Time of a cost, nothing overlapped."""
        return cost.flops / self.flops + cost.wire / self.bandwidth + cost.messages * self.latency


RATES = {
    "tpu": CostModel(flops=2e14, bandwidth=2e11, latency=2e-6),
    "gpu": CostModel(flops=4e14, bandwidth=3e11, latency=1e-5),
    "cpu": CostModel(flops=1e11, bandwidth=2.5e9, latency=5e-5),
}
"""Rates by platform; a v5p does 459 TFLOP/s and receives 600 GB/s at best, an H100 990 and 450."""

DTYPES = {"tpu": jnp.bfloat16, "gpu": jnp.bfloat16, "cpu": jnp.float32}
"""Compute dtype by platform (arXiv 2502.16982, section 2.3, computes and sends bfloat16)."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of the devices that share a matrix has to do."""

    flops: int
    """Operations, a multiply-add counted as two."""
    sums: int = 0
    """Gram matrices summed over the devices in float32."""
    gathers: int = 0
    """As many that the devices make by rows each, gathered in the compute dtype."""
    form: str = ""
    """How the orthogonalizer does it, in words."""


def plain_share(rows: int, cols: int, devices: int, steps: int) -> Share:
    """Count the plain polynomial of odd degree 5.

    Each step is `A = X X^T`, `B = b A + c A^2`, `X = a X + B X`. Spread out, `A` is summed over the
    devices and each makes its rows of `A^2`, if they divide evenly.
    """
    shared = devices > 1 and rows % devices == 0
    square = 2 * rows**3 // (devices if shared else 1)
    flops = steps * (4 * rows * rows * cols // devices + square)
    return Share(flops, sums=steps * (devices > 1), gathers=steps * shared)


@dataclasses.dataclass(frozen=True)
class Work:
    """The orthogonalizer as the planner counts it."""

    steps: int = 5
    """Steps of the polynomial."""
    dtype: np.dtype | None = None
    """The compute dtype, of the operands and of what is moved; None is the platform's."""
    splits: bool = True
    """Whether it can work on columns that lie on several devices."""
    platform: str = "cpu"
    """Where it runs."""
    share: Callable[[int, int, int, np.dtype, str], Share] | None = None
    """Counts one matrix: (rows, cols, devices, compute dtype, platform); None counts the plain
    polynomial."""

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return 4 if self.dtype is None else self.dtype.itemsize

    def at(self, platform: str) -> Work:
        """On a platform, with its compute dtype if none is set."""
        dtype = np.dtype(DTYPES.get(platform, jnp.float32)) if self.dtype is None else self.dtype
        return dataclasses.replace(self, dtype=dtype, platform=platform)

    def of(self, rows: int, cols: int, devices: int = 1) -> Share:
        """What one matrix `[rows, cols]` asks of each of the devices that share its columns."""
        if self.share is None:
            return plain_share(rows, cols, devices, self.steps)
        dtype = np.dtype(jnp.float32) if self.dtype is None else self.dtype
        return self.share(rows, cols, devices, dtype, self.platform)

    def on(self, rows: int, cols: int, devices: int = 1) -> Cost:
        """Cost of one matrix `[rows, cols]`, its columns spread over so many devices."""
        return self.cost(self.of(rows, cols, devices), rows, cols, devices)

    def cost(self, share: Share, rows: int, cols: int, devices: int = 1) -> Cost:
        """Cost of what a matrix `[rows, cols]` asks of each of the devices that share it."""
        gram = rows * rows
        memory = rows * cols // devices * (2 * self.itemsize + 4) + gram * (2 * self.itemsize + 8)
        if devices == 1:
            return Cost(share.flops, memory=memory)
        summed, gathered = 4 * gram * share.sums, self.itemsize * gram * share.gathers
        return Cost(
            share.flops,
            bytes=summed + gathered + 8,
            wire=(2 * summed + gathered) * (devices - 1) // devices,
            messages=share.sums + share.gathers + 2,
            memory=memory,
        )
