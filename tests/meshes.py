"""Parameters on meshes of eight CPU devices, and what becomes of their updates there."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import View, orthogonalize, plan
from optax_muon.hlo import flops
from optax_muon.sharding.cost import CostModel

AXES = {
    "explicit": (AxisType.Explicit,) * 3,
    "auto": (AxisType.Auto,) * 3,
    "mixed": (AxisType.Auto, AxisType.Explicit, AxisType.Auto),
}
"""Types of the mesh axes, in order."""

FREE_MESSAGES = CostModel(flops=1e9, bandwidth=1e12, latency=0.0)
"""Rates under which every matrix is worth sharing, however small."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Parameters on a mesh."""

    mesh: tuple[tuple[str, int], ...]
    """Names and sizes of the mesh axes."""
    leaves: tuple[tuple[str, tuple[int, ...], P, View], ...]
    """Path, shape, spec and view of every parameter."""
    options: tuple[tuple[str, Any], ...] = ()
    """Options of `plan`; without any, the link plans by itself."""

    @property
    def views(self) -> dict[str, View]:
        return {path: view for path, _, _, view in self.leaves}

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape, _, _ in self.leaves}

    def make_mesh(self, kind: str) -> Mesh:
        """The mesh, its axes of the types `explicit`, `auto` or `mixed`."""
        names, sizes = zip(*self.mesh, strict=True)
        return jax.make_mesh(sizes, names, axis_types=AXES[kind][: len(names)])

    def shardings(self, kind: str) -> dict[str, NamedSharding]:
        mesh = self.make_mesh(kind)
        return {path: NamedSharding(mesh, spec) for path, _, spec, _ in self.leaves}

    def plan(self, kind: str = "explicit"):
        options = dict(self.options)
        return plan(self.shapes, views=self.views, shardings=self.shardings(kind), **options)


def case(mesh: dict[str, int], leaves: dict[str, tuple], **options: Any) -> Case:
    """A case: `{path: (shape, spec, view)}` on `{axis: size}`, with options for `plan`."""
    rows = tuple((path, *leaf) for path, leaf in leaves.items())
    return Case(tuple(mesh.items()), rows, tuple(options.items()))


def layers(count: int, shape: tuple[int, ...], spec: P, view: View | None = None) -> dict:
    """So many parameters alike, whole matrices unless a view says otherwise."""
    return {f"{i}/kernel": (shape, spec, view or View(0, 1)) for i in range(count)}


@dataclasses.dataclass(frozen=True)
class CompiledRun:
    """A compiled update and its results."""

    text: str
    """HLO of the compiled program."""
    flops: float
    """Operations per device, as XLA counts them."""
    temporary: int
    """Bytes of temporary arrays per device."""
    updates: dict[str, jax.Array]

    @property
    def matrices(self) -> dict[str, np.ndarray]:
        return {path: np.asarray(update) for path, update in self.updates.items()}


@functools.cache
def gradients(leaves: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(size=shape, dtype=np.float32) for path, shape in leaves}


def gradients_of(case: Case) -> dict[str, np.ndarray]:
    return gradients(tuple((path, shape) for path, shape, _, _ in case.leaves))


@functools.cache
def alone(leaves: tuple[tuple[str, tuple[int, ...], View], ...]) -> dict[str, np.ndarray]:
    """The updates on one device."""
    link = orthogonalize(views={path: view for path, _, view in leaves})
    update = jax.jit(lambda gradient: link.update(gradient, ())[0])
    given = gradients(tuple((path, shape) for path, shape, _ in leaves))
    return jax.tree.map(np.asarray, update(given))


def alone_of(case: Case) -> dict[str, np.ndarray]:
    return alone(tuple((path, shape, view) for path, shape, _, view in case.leaves))


@functools.cache
def run(case: Case, kind: str) -> CompiledRun:
    """Compile an update on the mesh, once, and run it."""
    shardings = case.shardings(kind)
    link = orthogonalize(
        views=case.views,
        shardings=None if kind == "explicit" else shardings,
        plan=case.plan(kind) if case.options else None,
    )
    gradient = jax.device_put(gradients_of(case), shardings)
    update = jax.jit(lambda gradient: link.update(gradient, ())[0], out_shardings=shardings)
    compiled = update.lower(gradient).compile()
    return CompiledRun(
        text=compiled.as_text(),
        flops=flops(compiled.as_text()),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        updates=jax.block_until_ready(compiled(gradient)),
    )


def error(updates: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    """The largest relative Frobenius error of any parameter's update."""
    return max(
        float(np.linalg.norm(np.asarray(updates[path]) - truth[path]) / np.linalg.norm(truth[path]))
        for path in truth
    )


def entries(case: Case) -> int:
    """Numbers in all parameters."""
    return sum(math.prod(shape) for _, shape, _, _ in case.leaves)


WHOLE = View(0, 1)
STACKED = View(1, 2)

TABLE = {
    "rows": case({"fsdp": 8}, layers(16, (256, 1024), P("fsdp", None))),
    "columns": case({"fsdp": 8}, layers(16, (256, 1024), P(None, "fsdp"))),
    "half of each, half of them tall": case(
        {"fsdp": 8},
        {
            f"{i}/kernel": (
                (256, 1024) if i % 4 < 2 else (1024, 256),
                P("fsdp", None) if i % 2 else P(None, "fsdp"),
                WHOLE,
            )
            for i in range(16)
        },
    ),
    "two axes": case({"data": 4, "model": 2}, layers(16, (256, 512), P("data", "model"))),
    "stack by rows": case({"fsdp": 8}, {"k": ((24, 512, 2048), P(None, "fsdp", None), STACKED)}),
    "stack by both": case(
        {"fsdp": 4, "tensor": 2}, {"k": ((24, 512, 2048), P(None, "fsdp", "tensor"), STACKED)}
    ),
    "stack by layer": case({"fsdp": 8}, {"k": ((8, 512, 512), P("fsdp", None, None), STACKED)}),
    "nine": case({"fsdp": 8}, {"k": ((9, 512, 2048), P(None, "fsdp", None), STACKED)}),
    "twelve copies": case({"data": 8}, layers(12, (512, 2048), P())),
    "replicas": case({"replica": 2, "fsdp": 4}, layers(16, (256, 1024), P("fsdp", None))),
    "experts": case(
        {"expert": 2, "fsdp": 2, "tensor": 2},
        {"k": ((16, 2, 1024, 512), P("expert", None, "fsdp", "tensor"), View(2, 3))},
    ),
    "qkv whole": case(
        {"fsdp": 4, "tensor": 2},
        {"k": ((512, 8, 16, 32), P("fsdp", None, "tensor", None), View(0, (2, 3)))},
    ),
    "qkv per head": case(
        {"fsdp": 4, "tensor": 2},
        {"k": ((512, 8, 16, 32), P("fsdp", None, "tensor", None), View(0, 3))},
    ),
    "three": case({"data": 4, "model": 2}, layers(3, (1024, 4096), P("data", "model"))),
}
"""The parameters and specs whose collectives this package promises."""
