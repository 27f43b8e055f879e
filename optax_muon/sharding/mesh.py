"""Where parameters lie: a mesh, and for every axis of every leaf the mesh axes that it is cut over.

Explicit mesh axes say so in the type of an array, also of a traced one. Auto axes keep it to the
compiler: there the shardings come from the user, or from concrete arrays.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from optax_muon.matrices import paths

AnyMesh = Mesh | AbstractMesh
Spec = tuple[tuple[str, ...], ...]
"""For every axis of a leaf the mesh axes that it is cut over, major first."""


@dataclasses.dataclass(frozen=True)
class LeafShardings:
    """A mesh and the specs of all leaves on it."""

    mesh: AnyMesh | None
    """None: one device, or nothing known."""
    specs: Mapping[str, Spec]
    """Path to spec; empty without a mesh."""
    unknown_shardings: bool = False
    """Whether the mesh has Auto axes on which nothing is known of these leaves."""


def read(
    leaves: Mapping[str, Any], shardings: Any = None, mesh: AnyMesh | None = None
) -> LeafShardings:
    """Find the mesh and the spec of every leaf.

    Args:
      leaves: path to array, tracer or `ShapeDtypeStruct`.
      shardings: a tree (or prefix, or `{path: ...}` dict) of `NamedSharding` or `PartitionSpec`, or
        a callable of `{path: leaf}` that returns one. None reads the types.
      mesh: the mesh of bare `PartitionSpec`s; None is the ambient mesh of `jax.set_mesh`.

    Raises:
      ValueError: a spec names an axis that the mesh lacks or uses one twice, is longer than the
        leaf's rank or is missing for a leaf, or leaves lie on different meshes.
    """
    found = {path: _typed(leaf) for path, leaf in leaves.items()}
    given = _given(leaves, shardings)
    named = {**_of_type(found, NamedSharding), **_of_type(given, NamedSharding)}
    mesh = _one_mesh(named, mesh)
    if mesh is None:
        return _off_mesh(given)
    specs = {
        path: _spec(path, leaf, given.get(path, found[path]), mesh) for path, leaf in leaves.items()
    }
    return LeafShardings(
        mesh, specs, unknown_shardings=shardings is None and _is_blind(leaves, mesh)
    )


def check_names(leaves: Mapping[str, Any], shardings: Any) -> None:
    """See that `shardings`, unless it is a callable, has entries for these leaves only.

    Raises:
      ValueError: an entry is for no leaf.
    """
    if callable(shardings):
        return
    above = (itertools.accumulate(path.split("/"), "{}/{}".format) for path in leaves)
    known = {"", *itertools.chain(*above)}
    for entry in paths.named_leaves(shardings, is_leaf=_is_sharding):
        if entry not in known:
            close = difflib.get_close_matches(entry, leaves, n=3, cutoff=0) or ["no leaves"]
            raise ValueError(
                f"shardings has an entry {entry!r} that is no parameter; there are"
                f" {', '.join(map(repr, close))}."
            )


def explicit(leaf: Any, mesh: AnyMesh) -> Spec:
    """The spec that an array's type has on the Explicit axes of a mesh; nothing of Auto axes."""
    sharding = _typed(leaf)
    spec = _spec("", leaf, sharding, sharding.mesh) if sharding else ((),) * len(leaf.shape)
    return on_explicit(spec, mesh)


def on_explicit(spec: Spec, mesh: AnyMesh) -> Spec:
    """What a spec says of the Explicit axes of a mesh."""
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    kept = {axis for axis, kind in axes if kind == AxisType.Explicit}
    return tuple(tuple(axis for axis in over if axis in kept) for over in spec)


def axis_sizes(mesh: AnyMesh | None) -> dict[str, int]:
    """Axis names and sizes of a mesh, in its order."""
    return {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))


def slow_axes(mesh: AnyMesh | None) -> frozenset[str]:
    """Mesh axes that cross slices (DCN), as far as the devices tell."""
    if not isinstance(mesh, Mesh):
        return frozenset()
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0) or 0)(mesh.devices)
    return frozenset(
        name
        for axis, name in enumerate(mesh.axis_names)
        if (slices.min(axis) != slices.max(axis)).any()
    )


def platform(mesh: AnyMesh) -> str | None:
    """Platform of the mesh's devices: `cpu`, `tpu`, `gpu`; None if an abstract mesh hides it."""
    if isinstance(mesh, Mesh):
        return str(mesh.devices.flat[0].platform)
    name = getattr(getattr(mesh, "abstract_device", None), "platform", None)
    return None if name is None else str(name)


def _typed(leaf: Any) -> NamedSharding | None:
    """What the array itself knows: the type's sharding, or that of concrete data."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
    else:
        sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and _matters(sharding) else None


def _matters(sharding: NamedSharding) -> bool:
    """Whether it says anything: a mesh of one device does in types that name its axes."""
    return math.prod(sharding.mesh.axis_sizes) > 1 or any(sharding.spec)


def _given(leaves: Mapping[str, Any], shardings: Any) -> dict[str, Any]:
    """What the user says, by path."""
    if shardings is None:
        return {}
    tree = shardings(dict(leaves)) if callable(shardings) else shardings
    entries = paths.named_leaves(tree, is_leaf=_is_sharding)
    covers = {path: paths.longest_prefix(entries, path) for path in leaves}
    for path, entry in covers.items():
        if entry is None:
            raise ValueError(
                f"shardings says nothing of {path!r}; give it a NamedSharding or PartitionSpec."
            )
        if not _is_sharding(entries[entry]):
            raise TypeError(
                f"shardings gives {path!r} a {type(entries[entry]).__name__}; give it a"
                " NamedSharding or PartitionSpec."
            )
    return {path: entries[entry] for path, entry in covers.items() if entry is not None}


def _is_sharding(x: Any) -> bool:
    return x is None or isinstance(x, NamedSharding | PartitionSpec | SingleDeviceSharding)


def _of_type(entries: Mapping[str, Any], kind: type) -> dict[str, Any]:
    return {path: entry for path, entry in entries.items() if isinstance(entry, kind)}


def _one_mesh(named: Mapping[str, NamedSharding], mesh: AnyMesh | None) -> AnyMesh | None:
    """The one mesh that all leaves share."""
    meshes = {path: sharding.mesh for path, sharding in named.items()}
    if mesh is not None:
        meshes = {"the argument mesh": mesh, **meshes}
    for path, other in meshes.items():
        first, reference = next(iter(meshes.items()))
        if axis_sizes(other) != axis_sizes(reference):
            raise ValueError(
                f"{path} lies on the mesh {axis_sizes(other)}, and {first} is on"
                f" {axis_sizes(reference)}; put all parameters on one mesh."
            )
    found = next(iter(meshes.values()), None) or jax.sharding.get_abstract_mesh()
    several = math.prod(found.axis_sizes) > 1
    return found if several or any(map(_matters, named.values())) else None


def _off_mesh(given: Mapping[str, Any]) -> LeafShardings:
    for path, spec in _of_type(given, PartitionSpec).items():
        if any(spec):
            raise ValueError(
                f"shardings gives {path!r} the bare {spec} and there is no mesh; use NamedSharding,"
                " pass mesh=, or call under jax.set_mesh(mesh)."
            )
    return LeafShardings(None, {})


def _spec(path: str, leaf: Any, sharding: Any, mesh: AnyMesh) -> Spec:
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    spec = spec if isinstance(spec, PartitionSpec) else PartitionSpec()
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"{path} of shape {tuple(leaf.shape)} has {len(leaf.shape)} axes and its spec {spec}"
            f" has {len(spec)} entries; give at most one entry per axis."
        )
    axes = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    flat = [name for entry in axes for name in entry]
    sizes = axis_sizes(mesh)
    for name in flat:
        if name not in sizes:
            raise ValueError(
                f"{path}: its spec {spec} names the axis {name!r}; the mesh has {', '.join(sizes)}."
            )
    if len(set(flat)) < len(flat):
        raise ValueError(f"{path}: its spec {spec} uses a mesh axis twice.")
    return (*axes, *((),) * (len(leaf.shape) - len(axes)))


def _is_blind(leaves: Mapping[str, Any], mesh: AnyMesh) -> bool:
    """Whether leaves are traced and an axis of the mesh keeps its shardings to the compiler."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values())
    auto = any(
        kind == AxisType.Auto and size > 1
        for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    )
    return traced and auto
