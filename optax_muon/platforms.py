"""What is known of each platform: its compute dtype, and the rates that decide between layouts.

One row per platform. Both the mathematics (`polar`) and the planner (`sharding`) read it, so a fact
about a machine stands once. The rates are rounded, sustained values: only their ratios decide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

__all__ = [
    "PEAK_FLOPS",
    "PLATFORMS",
    "Platform",
    "Rates",
    "bfloat16_instructions",
    "get_platform",
    "peak_flops",
    "slow_bfloat16",
]


class Countable(Protocol):
    """Work whose time is modelled: `optax_muon.polar.work.Work`."""

    @property
    def flops(self) -> int:
        """Operations of products."""

    @property
    def operands(self) -> int:
        """Numbers that products read and write."""

    @property
    def passes(self) -> int:
        """Numbers that everything else writes."""

    @property
    def transposed(self) -> int:
        """Numbers of operands that are transposed first."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device does per second on operands of one dtype.

    `benchmarks/form_rates.py` fits the rates to the tables of measured times and of estimated
    cycles, so that the sum of four times is nearest to the time of every form.
    """

    flops: float
    """Operations of products."""
    operands: float
    """Numbers that products read and write."""
    passes: float
    """Numbers that everything else writes."""
    transposed: float = float("inf")
    """Numbers of operands that are transposed before a product."""

    def seconds(self, work: Countable) -> float:
        """Modelled time of some work, messages excluded."""
        return (
            work.flops / self.flops
            + work.operands / self.operands
            + work.passes / self.passes
            + work.transposed / self.transposed
        )


@dataclasses.dataclass(frozen=True)
class Platform:
    """One kind of device."""

    name: str
    """As JAX names it: `tpu`, `gpu` or `cpu`."""
    compute_dtype: np.dtype
    """What the operands of matrix products are rounded to unless the caller says otherwise."""
    flops: float
    """Operations per second of one device on large products in that dtype."""
    bandwidth: float
    """Bytes per second that one device receives from others."""
    latency: float
    """Seconds per collective, whatever its size."""
    rates: Mapping[str, Rates]
    """What decides between forms, by the dtype of the operands; see `rates_for`."""
    operand_barrier: bool = False
    """Whether operands are rounded behind an optimization barrier, not as products read them."""

    hides_messages: bool = False
    """Whether it computes while messages are under way, given `compiler_options`."""

    @property
    def flops_per_byte(self) -> float:
        """Operations that a device performs while one byte arrives."""
        return self.flops / self.bandwidth

    def rates_for(self, dtype: DTypeLike) -> Rates:
        """Return the rates for operands of `dtype`, or of the nearest dtype that has some."""
        short = jnp.finfo(dtype).bits < 32
        return self.rates["bfloat16" if short and "bfloat16" in self.rates else "float32"]


_BFLOAT16, _FLOAT32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)

PLATFORMS: Mapping[str, Platform] = MappingProxyType(
    {
        platform.name: platform
        for platform in (
            # A v5p peaks at 459 TFLOP/s and receives 600 GB/s; about 45 % and 33 % are sustained.
            Platform(
                "tpu",
                _BFLOAT16,
                flops=2e14,
                bandwidth=2e11,
                latency=2e-6,
                operand_barrier=True,
                hides_messages=True,
                # Fitted to the compiler's cycles for a v5p; float32 takes six products of pieces.
                rates={
                    "bfloat16": Rates(4.6e14, 1.1e12, 1.1e12),
                    "float32": Rates(7.7e13, 5.5e11, 5.5e11),
                },
            ),
            # An H100 peaks at 990 TFLOP/s and receives 450 GB/s over NVLink.
            Platform(
                "gpu",
                _BFLOAT16,
                flops=4e14,
                bandwidth=3e11,
                latency=1e-5,
                hides_messages=True,
                # Not measured: an H100's published 3.35 TB/s, and 67 TFLOP/s in float32.
                rates={
                    "bfloat16": Rates(4e14, 1.7e12, 8e11),
                    "float32": Rates(5e13, 8e11, 8e11),
                },
            ),
            # Measured between the fake devices of one CPU: about 100 GFLOP/s and 2.5 GB/s.
            Platform(
                "cpu",
                _FLOAT32,
                flops=1e11,
                bandwidth=2.5e9,
                latency=5e-5,
                # Fitted to times on two cores of a Xeon with AMX.
                rates={
                    "bfloat16": Rates(1.65e12, 9.1e9, 4.2e9, 6.2e8),
                    "float32": Rates(3.8e11, 3.4e9, 3.9e9, 3.2e9),
                },
            ),
        )
    }
)
"""All platforms by name. TPU and GPU compute in bfloat16, as in arXiv 2502.16982, section 2.3."""


def get_platform(name: str) -> Platform:
    """Return the row called `name`.

    Raises:
        ValueError: There is none.

    >>> get_platform("tpu").compute_dtype.name, get_platform("cpu").flops_per_byte
    ('bfloat16', 40.0)
    """
    if name not in PLATFORMS:
        raise ValueError(f"platform {name!r} is unknown; use one of {', '.join(PLATFORMS)}.")
    return PLATFORMS[name]


PEAK_FLOPS: Mapping[str, float] = MappingProxyType(
    {
        # Google Cloud's pages of each TPU; a device of v2 and v3 is one of the chip's two cores.
        "TPU v2": 22.5e12,
        "TPU v3": 61.5e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "TPU v6e": 918e12,
        # NVIDIA's data sheets, without sparsity.
        "NVIDIA A100": 312e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H100": 989e12,
        "NVIDIA H200": 989e12,
        "NVIDIA B200": 2250e12,
    }
)
"""Peak operations per second of products in bfloat16, by the beginning of JAX's `device_kind`."""


def peak_flops(device_kind: str) -> float | None:
    """Return the peak of one device in bfloat16; None of a kind that is not in `PEAK_FLOPS`.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("TPU v5 lite"), peak_flops("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    kinds = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
"""What Linux calls the instructions that multiply bfloat16: two of x86, two of ARM."""


@functools.cache
def bfloat16_instructions(info: Path = CPU_INFO) -> bool | None:
    """Return whether this machine's CPU multiplies bfloat16; None where that cannot be read.

    Linux lists the instructions in `/proc/cpuinfo`, as does `lscpu`.
    """
    lines = info.read_text().splitlines() if info.exists() else []
    split = (line.partition(":") for line in lines)
    flags = [value.split() for key, _, value in split if key.strip() in ("flags", "Features")]
    return any(not BFLOAT16_FLAGS.isdisjoint(each) for each in flags) if flags else None


def slow_bfloat16(platform: str, dtype: np.dtype | str | None) -> str:
    """Return a remark on products in this dtype on this machine, empty if there is none.

    There is one where the CPU is known to have no instructions for bfloat16: each operand is
    widened first, and a product takes about twice as long as in float32.
    """
    slow = platform == "cpu" and dtype == "bfloat16" and bfloat16_instructions() is False
    return SLOW_BFLOAT16 if slow else ""


SLOW_BFLOAT16 = (
    "this CPU has no bfloat16 instructions (avx512_bf16, amx_bf16 or bf16):"
    " products in float32 take about half the time"
)
