"""What is known of each platform: its compute dtype, and the rates that decide between layouts.

One row per platform, and one per kind of device where kinds differ. Both the mathematics (`polar`)
and the planner (`sharding`) read them, so a fact about a machine stands once. The rates are rounded
and sustained. A form is chosen by those of the platform, because a program that is traced knows no
more of its target; a plan is timed by those of the kind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

__all__ = [
    "KINDS",
    "PLATFORMS",
    "Platform",
    "Rates",
    "bfloat16_instructions",
    "get_device",
    "get_platform",
    "is_known",
    "peak_flops",
    "slow_bfloat16",
]


class Countable(Protocol):
    """What has a modelled time: `polar.work.Work` and `sharding.cost.Cost`."""

    @property
    def flops(self) -> int:
        """Operations of products."""

    @property
    def operands(self) -> int:
        """Numbers that products read and write."""

    @property
    def passes(self) -> int:
        """Numbers that everything between products writes."""

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
    operands: float = math.inf
    """Numbers that products read and write."""
    passes: float = math.inf
    """Numbers that everything between products writes."""
    transposed: float = math.inf
    """Numbers of operands that are transposed before a product."""

    def product_seconds(self, work: Countable) -> float:
        """Modelled time of products and of what is between them, messages excluded."""
        return (
            work.flops / self.flops
            + work.operands / self.operands
            + work.passes / self.passes
            + work.transposed / self.transposed
        )


@dataclasses.dataclass(frozen=True)
class Platform:
    """A platform, or one kind of its devices."""

    name: str
    """As JAX names the platform: `tpu`, `gpu` or `cpu`."""
    compute_dtype: np.dtype
    """What the operands of matrix products are rounded to unless the caller says otherwise."""
    rates: Mapping[str, Rates] = dataclasses.field(hash=False)
    """What one device computes, by the dtype of the operands; see `rates_for`."""
    memory: float
    """Bytes per second that passes over whole arrays read and write: casts, transposes, sums."""
    bandwidth: float
    """Bytes per second that one device receives from others."""
    latency: float
    """Seconds per collective, whatever its size."""
    mesh_share: float = 1.0
    """Fraction of the rates that a device of a mesh has: the devices of a CPU share its cores."""
    operand_barrier: bool = False
    """Whether operands are rounded behind an optimization barrier, not as products read them."""
    hides: frozenset[str] = frozenset()
    """The collectives that travel while it computes, given `compiler_options`.

    `all-to-all` stands for what brings tiles home and back, `all-reduce` for the sums and gathers
    of more than two devices that share a matrix, `collective-permute` for those of two.
    """
    peak_flops: float | None = None
    """Operations per second of products in bfloat16 by the data sheet, None of a CPU."""

    def rates_for(self, dtype: DTypeLike) -> Rates:
        """Return the rates for operands of `dtype`, or of the nearest dtype that has some."""
        short = jnp.finfo(dtype).bits < 32
        return self.rates["bfloat16" if short and "bfloat16" in self.rates else "float32"]


_BFLOAT16, _FLOAT32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)
_COLLECTIVES = frozenset({"all-to-all", "all-reduce", "collective-permute"})

_V5P = Platform(
    "tpu",
    _BFLOAT16,
    # Fitted to the compiler's cycles for a v5p; float32 takes six products of pieces.
    rates={
        "bfloat16": Rates(4.6e14, 1.1e12, 1.1e12),
        "float32": Rates(7.7e13, 5.5e11, 5.5e11),
    },
    # Half of the 2.8 TB/s of its memory, as in the updates that are compiled.
    memory=1.4e12,
    # A third of the 600 GB/s of all links.
    bandwidth=2e11,
    latency=2e-6,
    operand_barrier=True,
    hides=_COLLECTIVES,
    peak_flops=459e12,
)
_H100 = Platform(
    "gpu",
    _BFLOAT16,
    # Not measured: an H100's published 3.35 TB/s, and 67 TFLOP/s in float32.
    rates={
        "bfloat16": Rates(4e14, 1.7e12, 8e11),
        "float32": Rates(5e13, 8e11, 8e11),
    },
    memory=3.35e12,
    # Two thirds of the 450 GB/s of NVLink.
    bandwidth=3e11,
    latency=1e-5,
    hides=_COLLECTIVES,
    peak_flops=989e12,
)
_CPU = Platform(
    "cpu",
    _FLOAT32,
    # Fitted to times on two cores of a Xeon with AMX.
    rates={
        "bfloat16": Rates(1.65e12, 9.1e9, 4.2e9, 6.2e8),
        "float32": Rates(3.8e11, 3.4e9, 3.9e9, 3.2e9),
    },
    memory=2e10,
    # Measured between the fake devices of one CPU, as their share: about 100 GFLOP/s each.
    bandwidth=2.5e9,
    latency=5e-5,
    mesh_share=0.26,
)

PLATFORMS: Mapping[str, Platform] = MappingProxyType(
    {platform.name: platform for platform in (_V5P, _H100, _CPU)}
)
"""All platforms by name: `tpu` has the rates of a v5p, `gpu` those of an H100.

TPU and GPU compute in bfloat16, as in arXiv 2502.16982, section 2.3.
"""


def get_platform(name: str) -> Platform:
    """Return the row called `name`.

    Raises:
        ValueError: There is none.

    >>> get_platform("tpu").compute_dtype.name, get_platform("cpu").compute_dtype.name
    ('bfloat16', 'float32')
    """
    if name not in PLATFORMS:
        raise ValueError(f"platform {name!r} is unknown; use one of {', '.join(PLATFORMS)}.")
    return PLATFORMS[name]


def _tpu(
    flops: float, operands: float, passes: float, *, memory: float, links: float, peak: float
) -> Platform:
    """A kind of TPU: its rates in bfloat16, and bytes per second of memory and of all links."""
    return dataclasses.replace(
        _V5P,
        rates={
            "bfloat16": Rates(flops, operands, passes),
            "float32": Rates(flops / 6, operands / 2, passes / 2),
        },
        memory=memory / 2,
        bandwidth=links / 3,
        peak_flops=peak,
    )


def _gpu(peak: float) -> Platform:
    """A kind of GPU with an H100's rates: of its own only the peak is known."""
    return dataclasses.replace(_H100, peak_flops=peak)


# Google Cloud's pages of each TPU have the peaks, and the rates of memory and links. The other
# rates are fitted to the compiler's cycles by benchmarks/form_rates.py, but those of a v4, which
# are those of a v5p in proportion to the peaks, and which a v2 and a v3 have as well.
_V4 = _tpu(2.8e14, 6e11, 6e11, memory=1.2e12, links=3e11, peak=275e12)
# The compiler has no asynchronous all-to-all over the links of these two.
_V5E = dataclasses.replace(
    _tpu(1.9e14, math.inf, 3.9e11, memory=8.2e11, links=2e11, peak=197e12),
    hides=_COLLECTIVES - {"all-to-all"},
)
_V6E = dataclasses.replace(
    _tpu(6.8e14, math.inf, 2.9e13, memory=1.6e12, links=4e11, peak=918e12),
    hides=frozenset({"collective-permute"}),
)

KINDS: Mapping[str, Platform] = MappingProxyType(
    {
        # A device of v2 and v3 is one of the chip's two cores.
        "TPU v2": dataclasses.replace(_V4, peak_flops=22.5e12),
        "TPU v3": dataclasses.replace(_V4, peak_flops=61.5e12),
        "TPU v4": _V4,
        "TPU v5 lite": _V5E,
        "TPU v5e": _V5E,
        "TPU v5": _V5P,
        "TPU v6 lite": _V6E,
        "TPU v6e": _V6E,
        # NVIDIA's data sheets, without sparsity.
        "NVIDIA A100": _gpu(312e12),
        "NVIDIA H100 PCIe": _gpu(756e12),
        "NVIDIA H100 NVL": _gpu(835e12),
        "NVIDIA H100": _H100,
        "NVIDIA H200": _gpu(989e12),
        "NVIDIA B200": _gpu(2250e12),
    }
)
"""Kinds of devices, by the beginning of JAX's `device_kind`."""


def is_known(kind: str) -> bool:
    """Whether `get_device` has a row of this platform or kind of device."""
    return kind in PLATFORMS or _of_kind(kind) is not None


def get_device(kind: str) -> Platform:
    """Return the row of a platform, or of a kind of device.

    Args:
        kind: A platform, or JAX's `device_kind`.

    Raises:
        ValueError: Neither is known.

    >>> get_device("TPU v5 lite").name, get_device("TPU v5 lite").peak_flops
    ('tpu', 197000000000000.0)
    """
    row = _of_kind(kind) or PLATFORMS.get(kind)
    if row is None:
        raise ValueError(
            f"platform {kind!r} is unknown; use one of {', '.join(PLATFORMS)}, or a kind of "
            f"device: {', '.join(KINDS)}."
        )
    return row


def peak_flops(device_kind: str) -> float | None:
    """Return the peak of one device in bfloat16; None of a kind that is not in `KINDS`.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("TPU v5 lite"), peak_flops("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    kind = _of_kind(device_kind)
    return None if kind is None else kind.peak_flops


def _of_kind(device_kind: str) -> Platform | None:
    known = [kind for kind in KINDS if device_kind.startswith(kind)]
    return KINDS[max(known, key=len)] if known else None


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
