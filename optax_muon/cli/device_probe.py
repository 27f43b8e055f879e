"""What `optax-muon doctor` learns from the devices: `python -m optax_muon.cli.device_probe`.

It runs in a process of its own, because XLA ends the process at a flag that it does not know, and
waits without end for a TPU that another process holds.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optax_muon


@dataclasses.dataclass(frozen=True)
class DeviceReport:
    """The devices of a process, and how an update went on one of them."""

    platform: str
    """As JAX names it: tpu, gpu or cpu."""
    kinds: dict[str, int]
    """Number of devices by `device_kind`."""
    memory: int | None
    """Bytes that one device has; None where it does not say."""
    options: dict[str, str]
    """Options of the compiler for the first device."""
    singular_values: tuple[float, float]
    """Smallest and largest singular value of an update, compiled with these options."""


def probe() -> DeviceReport:
    """Ask the devices, and orthogonalize a matrix on the first one."""
    devices = jax.local_devices()
    first = devices[0]
    kinds = [device.device_kind for device in devices]
    options = optax_muon.compiler_options(first)
    return DeviceReport(
        platform=first.platform,
        kinds={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        memory=_memory(first),
        options=options,
        singular_values=_update(options),
    )


def _memory(device: jax.Device) -> int | None:
    stats: dict[str, Any] | None = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def _update(options: dict[str, str]) -> tuple[float, float]:
    """The singular values of Muon's update of a 64 x 128 matrix: its smallest and its largest."""
    tx = optax_muon.scale_by_muon()
    gradient = {"kernel": jax.random.normal(jax.random.key(0), (64, 128), jnp.float32)}

    def first_update(gradient: Any) -> Any:
        return tx.update(gradient, tx.init(gradient), gradient)[0]

    update = jax.jit(first_update, compiler_options=options)(gradient)["kernel"]
    scale = optax_muon.match_rms()(64, 128)
    values = np.linalg.svd(np.asarray(update, np.float64), compute_uv=False) / scale
    return float(values[-1]), float(values[0])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(probe())) + "\n")
