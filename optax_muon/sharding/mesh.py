"""How parameters are sharded: a mesh, and for every axis of every leaf the mesh axes that cut it.

On Explicit mesh axes this is part of an array's type, also under a trace. On Auto axes only the
compiler knows it, so the shardings come from the user or from concrete arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

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

from optax_muon.matrices import entries, paths
from optax_muon.platforms import is_known

AnyMesh = Mesh | AbstractMesh
Spec = tuple[tuple[str, ...], ...]
"""For every axis of a leaf, the mesh axes that it is cut over, major first."""


Shardings: TypeAlias = Any
"""How a tree is sharded: a tree (or a prefix of one, or a `{path: ...}` dict) of `NamedSharding` or
`PartitionSpec`, or a function of the leaves that returns one; None reads the arrays' types."""


@dataclasses.dataclass(frozen=True)
class LeafShardings:
    """A mesh and the specs of all leaves on it."""

    mesh: AnyMesh | None
    """None on one device, or if nothing is known."""
    specs: Mapping[str, Spec]
    """Path to spec; empty without a mesh."""
    unknown_shardings: bool = False
    """True if the leaves are traced, the mesh has Auto axes, and no shardings were given."""


def resolve_shardings(
    leaves: Mapping[str, Any], shardings: Shardings = None, mesh: AnyMesh | None = None
) -> LeafShardings:
    """Find the mesh and the spec of every leaf.

    Args:
        leaves: Path to array, tracer or `ShapeDtypeStruct`.
        shardings: A tree (or prefix, or `{path: ...}` dict) of `NamedSharding` or `PartitionSpec`,
            or a callable of `{path: leaf}` that returns one. None reads the types.
        mesh: The mesh of bare `PartitionSpec`s; None is the ambient mesh of `jax.set_mesh`.

    Raises:
        ValueError: A spec names an axis that the mesh lacks or uses an axis twice, is longer than
            the leaf's rank, or is missing for a leaf; or leaves lie on different meshes.
        TypeError: An entry of `shardings` is not a sharding.
    """
    own = {path: _own_sharding(leaf) for path, leaf in leaves.items()}
    given = _given(leaves, shardings)
    named = {**_of_type(own, NamedSharding), **_of_type(given, NamedSharding)}
    mesh = _one_mesh(named, mesh)
    if mesh is None:
        return _off_mesh(given)
    specs = {
        path: _spec(path, leaf, given.get(path, own[path]), mesh) for path, leaf in leaves.items()
    }
    return LeafShardings(
        mesh, specs, unknown_shardings=shardings is None and _are_unknown(leaves, mesh)
    )


def check_names(tree: Any, shardings: Shardings) -> None:
    """Check that every entry of `shardings` belongs to a leaf; a function is not checked.

    Raises:
        ValueError: An entry belongs to no leaf.
    """
    if shardings is not None and not entries.is_function(shardings):
        given = paths.named_leaves(shardings, is_leaf=_is_sharding)
        entries.keys_of("shardings", given, paths.named_leaves(tree, is_leaf=entries.is_position))


def explicit_spec(leaf: Any, mesh: AnyMesh) -> Spec:
    """The part of an array's own spec that names Explicit axes of a mesh."""
    sharding = _own_sharding(leaf)
    spec = _spec("", leaf, sharding, sharding.mesh) if sharding else ((),) * len(leaf.shape)
    return keep_explicit(spec, mesh)


def keep_explicit(spec: Spec, mesh: AnyMesh) -> Spec:
    """Drop all axes but the Explicit ones from a spec."""
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    kept = {axis for axis, kind in axes if kind == AxisType.Explicit}
    return tuple(tuple(axis for axis in over if axis in kept) for over in spec)


def axis_sizes(mesh: AnyMesh | None) -> dict[str, int]:
    """Axis names and sizes of a mesh, in its order."""
    return {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))


def slow_axes(mesh: AnyMesh | None) -> frozenset[str]:
    """Mesh axes that cross slices (DCN), if the devices know their slice."""
    if not isinstance(mesh, Mesh):
        return frozenset()
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0) or 0)(mesh.devices)
    return frozenset(
        name
        for axis, name in enumerate(mesh.axis_names)
        if (slices.min(axis) != slices.max(axis)).any()
    )


def mesh_device(mesh: AnyMesh) -> str | None:
    """The `device_kind` of the mesh's devices if its rates are known, or else their platform.

    None of an abstract mesh without an `abstract_device`.
    """
    kind, platform = mesh_kind(mesh), getattr(_first_device(mesh), "platform", None)
    name = kind if kind is not None and is_known(kind) else platform
    return None if name is None else str(name)


def mesh_kind(mesh: AnyMesh) -> str | None:
    """The `device_kind` of the mesh's devices, None of an abstract mesh without a device."""
    return getattr(_first_device(mesh), "device_kind", None)


def _first_device(mesh: AnyMesh) -> Any:
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device


def _own_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of a traced array's type, or of a concrete array; None if it is trivial."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
    else:
        sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and _matters(sharding) else None


def _matters(sharding: NamedSharding) -> bool:
    """Whether a sharding is not trivial: it has several devices, or its spec names axes."""
    return math.prod(sharding.mesh.axis_sizes) > 1 or any(sharding.spec)


def _given(leaves: Mapping[str, Any], shardings: Shardings) -> dict[str, Any]:
    """The shardings that the user gave, by path."""
    if shardings is None:
        return {}
    tree = shardings(dict(leaves)) if entries.is_function(shardings) else shardings
    given = paths.named_leaves(tree, is_leaf=_is_sharding)
    covers = {path: paths.longest_prefix(given, path) for path in leaves}
    for path, key in covers.items():
        if key is None:
            raise ValueError(
                f"shardings has no entry for {path!r}; give it a NamedSharding or PartitionSpec."
            )
        if not _is_sharding(given[key]):
            raise TypeError(
                f"the entry of shardings for {path!r} is a {type(given[key]).__name__}; it must"
                " be a NamedSharding or PartitionSpec."
            )
    return {path: given[key] for path, key in covers.items() if key is not None}


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
                f"{path} lies on the mesh {axis_sizes(other)}, but {first} on"
                f" {axis_sizes(reference)}; put all parameters on one mesh."
            )
    found = next(iter(meshes.values()), None) or jax.sharding.get_abstract_mesh()
    several = math.prod(found.axis_sizes) > 1
    return found if several or any(map(_matters, named.values())) else None


def _off_mesh(given: Mapping[str, Any]) -> LeafShardings:
    for path, spec in _of_type(given, PartitionSpec).items():
        if any(spec):
            raise ValueError(
                f"the entry of shardings for {path!r} is the bare {spec}, and there is no mesh; use"
                " NamedSharding, pass mesh=, or call under jax.set_mesh(mesh)."
            )
    return LeafShardings(None, {})


def _spec(path: str, leaf: Any, sharding: Any, mesh: AnyMesh) -> Spec:
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    spec = spec if isinstance(spec, PartitionSpec) else PartitionSpec()
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"{path} of shape {tuple(leaf.shape)} has {len(leaf.shape)} axes, but its spec {spec}"
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


def _are_unknown(leaves: Mapping[str, Any], mesh: AnyMesh) -> bool:
    """Whether leaves are traced and the mesh has Auto axes, on which only the compiler knows."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values())
    auto = any(
        kind == AxisType.Auto and size > 1
        for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    )
    return traced and auto
