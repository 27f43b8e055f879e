"""Where a step is computed: the mesh of devices, and the number of micro-batches.

Neither changes the result, except for rounding: a run may be resumed on other devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import named_leaves
from optax_muon.errors import UsageError
from optax_muon.models.abstract import AbstractParam
from optax_muon.models.mesh import BATCH
from optax_muon.models.spec import Model
from optax_muon.training.data.corpus import windows

AXES = (*BATCH, "tensor")
"""The names that the axes of a mesh may have (`models/mesh.py`)."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices and micro-batches."""

    mesh: Mesh | None = None
    """Mesh of all devices, with Explicit axes; None uses the first device only."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, before it doubles."""

    def __str__(self) -> str:
        """The devices, as reports print them."""
        devices = jax.device_count()
        if self.mesh is not None:
            return ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return f"1 of {devices} devices; --mesh uses all of them" if devices > 1 else "1 device"

    def mesh_context(self) -> contextlib.AbstractContextManager[object]:
        """A context in which the mesh is the ambient one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def batch_shards(self) -> int:
        """Number of parts that the sequences of a batch are divided into over the devices."""
        sizes = {} if self.mesh is None else self.mesh.shape
        return math.prod(sizes.get(axis, 1) for axis in BATCH)

    @property
    def count(self) -> int:
        """How many devices share the work."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def steps_ahead(self) -> int:
        """Steps that are started before the numbers of a step are read.

        On accelerators one, so that they never wait for the host. On CPUs none: the host is the
        device, and its collectives may dead-lock when two programs run at once.
        """
        return 0 if jax.default_backend() == "cpu" else 1

    def sequences(self, tokens: np.ndarray, starts: np.ndarray, context: int) -> jax.Array:
        """Windows of tokens on the devices; a process reads only those of its own devices.

        Args:
            tokens: The text.
            starts: Indices of the windows' first tokens, `[k, b]`.
            context: Tokens of a window, minus one.

        Returns:
            int32 `[k, b, context + 1]`, `b` over the batch axes.
        """
        shape = (*starts.shape, context + 1)
        if self.mesh is None:
            return jax.numpy.asarray(windows(tokens, starts, context))

        def read(at: tuple[slice, ...] | None) -> np.ndarray:
            assert at is not None
            return windows(tokens, starts[at[:2]], context)

        return jax.make_array_from_callback(shape, self._sharding(self.mesh), read)

    def put(self, array: np.ndarray) -> jax.Array:
        """An array `[k, b, ..]` that every process holds, laid out as `sequences` returns them."""
        if self.mesh is None:
            return jax.numpy.asarray(array)
        return jax.make_array_from_callback(
            array.shape, self._sharding(self.mesh), lambda at: array[at]
        )

    def check(self, model: Model, batch: int) -> None:
        """Check that the batch and the parameters divide evenly.

        Raises:
            UsageError: When the batch does not divide into micro-batches and over the devices, or a
                parameter does not divide over the mesh.
        """
        parts = self.accumulate * self.batch_shards
        if batch % parts:
            over = (
                f" over the {self.batch_shards} devices of {', '.join(BATCH)}"
                if self.batch_shards > 1
                else ""
            )
            raise UsageError(
                f"--batch {batch} does not divide into {self.accumulate} micro-batches{over}; "
                f"it must be a multiple of {parts}"
            )
        if self.mesh is not None:
            _check_parameters(model, self.mesh)

    @staticmethod
    def _sharding(mesh: Mesh) -> NamedSharding:
        axes = tuple(axis for axis in BATCH if axis in mesh.axis_names)
        return NamedSharding(mesh, P(None, axes or None))


SINGLE_DEVICE = Devices()
"""The first device, the whole batch at once."""


def parse_mesh(text: str) -> Mesh:
    """The mesh of `data=2,fsdp=2,expert=2`, over all devices, in this order.

    Raises:
        UsageError: When an axis is unknown or given twice, or the sizes do not multiply to the
            number of devices.
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, _, size = entry.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise UsageError(
                f"--mesh {text} has {entry.strip()!r}; it takes axes and sizes such as "
                f"data=2,fsdp=4, each of {', '.join(AXES)} at most once"
            )
        sizes[name] = int(size)
    devices = jax.device_count()
    if math.prod(sizes.values()) != devices:
        raise UsageError(
            f"--mesh {text} needs {math.prod(sizes.values())} devices, there are {devices}"
        )
    kinds = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def _check_parameters(model: Model, mesh: Mesh) -> None:
    """Check that the mesh cuts every parameter into equal parts."""
    params = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
    for path, sharding in named_leaves(model.shardings(mesh)).items():
        shape, over = params[path].shape, AbstractParam(params[path].shape, sharding.spec).mesh_axes
        ways = [math.prod(mesh.shape[axis] for axis in axes) for axes in over]
        if any(size % n for size, n in zip(shape, ways, strict=False)):
            raise UsageError(
                f"--mesh cuts {path}, {list(shape)}, into {ways} parts, which do not divide it; "
                "give smaller axes"
            )
