"""Options of XLA that overlap communication with matmuls, and give large matmuls enough VMEM.

One row per kind of device, because some compilers refuse what others need: libtpu 0.0.52 rejects
continuation fusion on all TPUs but v5e, and asynchronous all-to-alls over the limited interconnect
of v5e and v6e.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax

__all__ = ["COMPILER_OPTIONS", "compiler_options"]

# Without these features the scheduler finishes one bucket before it looks at another.
_SCHEDULER = {"xla_tpu_enable_all_experimental_scheduler_features": "true"}
_ALL_TO_ALL = {**_SCHEDULER, "xla_tpu_enable_async_all_to_all": "true"}
# A fusion may use 16 MiB of VMEM by default, and large products read their operands too often: by
# the compiler's estimate a v5p takes 10 percent more for the products of one 4096 x 4096.
_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
_CONTINUATION_FUSION = {
    name: "true"
    for name in (
        "xla_enable_async_all_gather",
        "xla_enable_async_all_reduce",
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_overlap_compute_collective_tc",
    )
}
_GPU = {"xla_gpu_enable_latency_hiding_scheduler": "true"}

COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "cpu": {},
        "gpu": _GPU,
        "NVIDIA": _GPU,
        "AMD": _GPU,
        # What every TPU accepts; the rows below say more of some.
        "tpu": {},
        "TPU": {},
        "TPU v4": _ALL_TO_ALL,
        "TPU v5": {**_ALL_TO_ALL, **_VMEM},
        "TPU v5p": {**_ALL_TO_ALL, **_VMEM},
        "TPU v5 lite": _CONTINUATION_FUSION,
        "TPU v5e": _CONTINUATION_FUSION,
        "TPU v6 lite": _SCHEDULER,
        "TPU v6e": _SCHEDULER,
    }
)
"""Options by platform, or by the beginning of JAX's `device_kind`."""


def compiler_options(platform: str | jax.Device) -> dict[str, str]:
    """Options that overlap an update's communication with its matmuls, and give these enough VMEM.

    For `jax.jit(step, compiler_options=...)`; `optax-muon train` uses them. On TPUs they can also
    be set for all programs, as `LIBTPU_INIT_ARGS="--name=value ..."` before JAX is imported.

    Args:
        platform: One of the devices, or its `device_kind`. The platforms `tpu`, `gpu` and `cpu`
            give what all devices of a platform accept; on TPUs that is nothing. A device of a kind
            that is not known gets the options of its platform.

    Returns:
        Name to value. They change no result.

    Raises:
        ValueError: The platform is unknown.

    >>> compiler_options("TPU v5")["xla_tpu_enable_async_all_to_all"]  # a v5p
    'true'
    >>> compiler_options("gpu")
    {'xla_gpu_enable_latency_hiding_scheduler': 'true'}
    >>> compiler_options("cpu")
    {}
    """
    if not isinstance(platform, str):
        known = options_row(platform.device_kind) is not None
        platform = platform.device_kind if known else platform.platform
    row = options_row(platform)
    if row is None:
        raise ValueError(
            f"no compiler options are known for {platform!r}; use tpu, gpu, cpu or a device's"
            f" device_kind that begins with one of {', '.join(COMPILER_OPTIONS)}."
        )
    return dict(COMPILER_OPTIONS[row])


def options_row(kind: str) -> str | None:
    """The key of `COMPILER_OPTIONS` for a platform or a `device_kind`, None if there is none.

    >>> options_row("TPU v5 lite"), options_row("TPU v9"), options_row("abacus")
    ('TPU v5 lite', 'TPU', None)
    """
    return max((key for key in COMPILER_OPTIONS if kind.startswith(key)), key=len, default=None)
