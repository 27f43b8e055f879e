"""What is known of each platform: its compute dtype, and the rates that decide between layouts.

One row per kind of device, with what its vendor publishes of it, which no rate exceeds; one of them
stands for its platform. Both the mathematics (`polar`) and the planner (`sharding`) read them, so a
fact about a machine stands once. The rates are rounded and sustained. A form is chosen by those of
the platform, because a program that is traced knows no more of its target; a plan is timed by those
of the kind.
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
    "DataSheet",
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
class DataSheet:
    """What the vendor publishes of one device, as JAX counts devices."""

    flops: Mapping[str, float] = dataclasses.field(hash=False)
    """Operations per second of dense products, by the dtype of the operands."""
    memory: float
    """Bytes per second that its memory reads and writes."""
    links: float
    """Bytes per second that arrive over all links together."""
    source: str
    """Where it is published."""


@dataclasses.dataclass(frozen=True)
class Platform:
    """One kind of device, or the one that stands for its platform."""

    name: str
    """As JAX names the platform: `tpu`, `gpu` or `cpu`."""
    kind: str
    """What people call the device."""
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
    memory_tile: tuple[int, int] | None = None
    """Rows and columns of the tiles in which its memory holds a matrix; None if row by row."""
    hides: frozenset[str] = frozenset()
    """The collectives, as HLO names them, that travel while it computes, given
    `compiler_options`."""
    data_sheet: DataSheet | None = None
    """What is published of it, None of a CPU."""

    @property
    def peak_flops(self) -> float | None:
        """Operations per second of products in bfloat16 by the data sheet, None of a CPU."""
        return None if self.data_sheet is None else self.data_sheet.flops["bfloat16"]

    def rates_for(self, dtype: DTypeLike) -> Rates:
        """Return the rates for operands of `dtype`, or of the nearest dtype that has some."""
        short = jnp.finfo(dtype).bits < 32
        return self.rates["bfloat16" if short and "bfloat16" in self.rates else "float32"]


_BFLOAT16, _FLOAT32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)
# What libtpu 0.0.52 runs beside products, with `compiler_options`; tests/sharding/test_hiding.py
# compiles it.
_NOTHING: frozenset[str] = frozenset()
_PERMUTES = frozenset({"collective-permute"})
_EXCHANGES = _PERMUTES | {"all-to-all"}
_GATHERS = _PERMUTES | {"all-gather", "all-reduce"}
_ALL = _EXCHANGES | _GATHERS
_TPU_PAGES = "cloud.google.com/tpu/docs"
_TPU_PAPER = "Norrie et al., The Design Process for Google's Training Chips: TPUv2 and TPUv3, 2021"
_NVIDIA = "NVIDIA's data sheet, without sparsity"


def _tpu(
    kind: str,
    rates: Rates | None = None,
    *,
    peak: float,
    memory: float,
    links: float,
    hides: frozenset[str],
    source: str = _TPU_PAGES,
) -> Platform:
    """A kind of TPU.

    Args:
        kind: What it is called.
        rates: Those in bfloat16, fitted to the compiler's cycles by benchmarks/form_rates.py; None
            takes those of a v5p in proportion to the peaks.
        peak: Operations per second in bfloat16; float32 takes six products of pieces.
        memory: Bytes per second of its memory.
        links: The same of all links.
        hides: The collectives that its compiler runs beside products.
        source: Where the last three are published.
    """
    if rates is None:
        operands = _V5P_RATES.operands * memory / _V5P_MEMORY
        rates = Rates(_V5P_RATES.flops * peak / _V5P_PEAK, operands, operands)
    pieces = Rates(rates.flops / 6, rates.operands / 2, rates.passes / 2)
    return Platform(
        "tpu",
        kind,
        _BFLOAT16,
        rates={"bfloat16": rates, "float32": pieces},
        # Half of its memory's, as in the updates that are compiled for a v5p.
        memory=memory / 2,
        # A third of all links.
        bandwidth=links / 3,
        latency=2e-6,
        operand_barrier=True,
        memory_tile=(8, 128),
        hides=hides,
        data_sheet=DataSheet({"bfloat16": peak, "float32": peak / 6}, memory, links, source),
    )


def _gpu(kind: str, *, peak: float, float32: float, memory: float, links: float) -> Platform:
    """A kind of GPU, by its data sheet alone: nothing is measured yet.

    Args:
        kind: What it is called.
        peak: Operations per second in bfloat16.
        float32: The same in float32, outside the tensor cores.
        memory: Bytes per second of its memory.
        links: The same of NVLink, or of PCI Express where NVLink joins no more than two, one way.
    """
    return Platform(
        "gpu",
        kind,
        _BFLOAT16,
        # An update reaches 0.4 of the peak on H100s, by what others have published.
        rates={
            "bfloat16": Rates(0.4 * peak, memory / 2, memory / 4),
            "float32": Rates(0.75 * float32, memory / 4, memory / 4),
        },
        memory=memory,
        bandwidth=links * 2 / 3,
        latency=1e-5,
        hides=_ALL,
        data_sheet=DataSheet({"bfloat16": peak, "float32": float32}, memory, links, _NVIDIA),
    )


_V5P_PEAK, _V5P_MEMORY, _V5P_RATES = 459e12, 2.765e12, Rates(4.45e14, 9.1e11, 6.3e12)

_V5P = _tpu("TPU v5p", _V5P_RATES, peak=_V5P_PEAK, memory=_V5P_MEMORY, links=6e11, hides=_EXCHANGES)
_V5E = _tpu(
    "TPU v5e",
    Rates(1.9e14, 4.4e12, 7.1e11),
    peak=197e12,
    memory=8.2e11,
    links=2e11,
    hides=_GATHERS,
)
_V6E = _tpu(
    "TPU v6e",
    Rates(6.9e14),
    peak=918e12,
    memory=1.6e12,
    links=4e11,
    hides=_PERMUTES,
)
_H100 = _gpu("NVIDIA H100", peak=989e12, float32=67e12, memory=3.35e12, links=4.5e11)
_CPU = Platform(
    "cpu",
    "two cores of a Xeon with AMX",
    _FLOAT32,
    # Fitted to times by benchmarks/form_rates.py.
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


# PCI Express, generations 4 and 5, sixteen lanes in one direction.
_PCIE4, _PCIE5 = 3.2e10, 6.4e10

KINDS: Mapping[str, Platform] = MappingProxyType(
    {
        # A device of v2, v3 and 7x is one of the chip's two cores, with half of what the chip has.
        "TPU v2": _tpu(
            "TPU v2", peak=22.5e12, memory=3.5e11, links=1.24e11, hides=_NOTHING, source=_TPU_PAPER
        ),
        "TPU v3": _tpu(
            "TPU v3", peak=61.5e12, memory=4.5e11, links=1.64e11, hides=_NOTHING, source=_TPU_PAPER
        ),
        "TPU v4": _tpu(
            "TPU v4",
            Rates(2.5e14, 1.9e12, 1.4e12),
            peak=275e12,
            memory=1.2e12,
            links=3e11,
            hides=_EXCHANGES,
        ),
        "TPU v5 lite": _V5E,
        "TPU v5e": _V5E,
        "TPU v5": _V5P,
        "TPU v5p": _V5P,
        "TPU v6 lite": _V6E,
        "TPU v6e": _V6E,
        "TPU7x": _tpu("TPU7x", peak=1153.5e12, memory=3.69e12, links=3e11, hides=_GATHERS),
        "NVIDIA A100": _gpu(
            "NVIDIA A100 PCIe", peak=312e12, float32=19.5e12, memory=1.555e12, links=_PCIE4
        ),
        "NVIDIA A100 80GB PCIe": _gpu(
            "NVIDIA A100 80GB PCIe", peak=312e12, float32=19.5e12, memory=1.935e12, links=_PCIE4
        ),
        "NVIDIA A100-SXM4-40GB": _gpu(
            "NVIDIA A100 40GB", peak=312e12, float32=19.5e12, memory=1.555e12, links=3e11
        ),
        "NVIDIA A100-SXM4-80GB": _gpu(
            "NVIDIA A100 80GB", peak=312e12, float32=19.5e12, memory=2.039e12, links=3e11
        ),
        "NVIDIA H100 PCIe": _gpu(
            "NVIDIA H100 PCIe", peak=756e12, float32=51e12, memory=2e12, links=_PCIE5
        ),
        "NVIDIA H100 NVL": _gpu(
            "NVIDIA H100 NVL", peak=835e12, float32=60e12, memory=3.9e12, links=_PCIE5
        ),
        "NVIDIA H100": _H100,
        "NVIDIA H200": _gpu("NVIDIA H200", peak=989e12, float32=67e12, memory=4.8e12, links=4.5e11),
        "NVIDIA H200 NVL": _gpu(
            "NVIDIA H200 NVL", peak=835e12, float32=60e12, memory=4.8e12, links=4.5e11
        ),
        "NVIDIA B200": _gpu("NVIDIA B200", peak=2250e12, float32=75e12, memory=7.7e12, links=9e11),
    }
)
"""Kinds of devices, by JAX's `device_kind`; that of a GPU may say more, such as its memory."""


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
    known = [kind for kind in KINDS if _is_of_kind(device_kind, kind)]
    return KINDS[max(known, key=len)] if known else None


def _is_of_kind(device_kind: str, kind: str) -> bool:
    """Whether a device has the rates of a kind; a slice of a GPU (MIG) has not."""
    if device_kind == kind:
        return True
    is_gpu = kind.startswith("NVIDIA") and device_kind.startswith((f"{kind} ", f"{kind}-"))
    return is_gpu and " MIG " not in device_kind


CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
"""What Linux calls the instructions that multiply bfloat16: two of x86, two of ARM."""


@functools.cache
def bfloat16_instructions(info: Path = CPU_INFO) -> bool | None:
    """Return whether this machine's CPU multiplies bfloat16; None where that cannot be read.

    Linux lists the instructions in `/proc/cpuinfo`, as does `lscpu`.
    """
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
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
