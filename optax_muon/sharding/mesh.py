"""How parameters are sharded: a mesh, and for every axis of every leaf the mesh axes that cut it.

On Explicit mesh axes this is part of an array's type, also under a trace. On Auto axes only the
compiler knows it, so the shardings come from the user or from concrete arrays. Along the axes of a
`shard_map`, `pmap` or `vmap` around, devices have values of their own, and must not share work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
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
    taken: frozenset[str] = frozenset()
    """Mesh axes that a plan leaves alone: those of `taken_axes`, and Auto ones if unknown."""
    unknown_shardings: bool = False
    """True if the leaves are traced, the mesh has Auto axes, and no shardings were given."""

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Names and sizes of the mesh axes that are not taken; empty without a mesh."""
        return axis_sizes(self.mesh, self.taken)


def resolve_shardings(
    leaves: Mapping[str, Any], shardings: Shardings = None, mesh: AnyMesh | None = None
) -> LeafShardings:
    """Find the mesh and the spec of every leaf.

    Args:
        leaves: Path to array, tracer or `ShapeDtypeStruct`.
        shardings: A tree (or prefix, or `{path: ...}` dict) of `NamedSharding` or `PartitionSpec`,
            or a callable of `{path: leaf}` that returns one. None reads the types.
        mesh: The mesh of bare `PartitionSpec`s; None is the ambient mesh of `jax.set_mesh`.

    Returns:
        The mesh is None where all of its axes are taken, as on one device.

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
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values())
    taken = taken_axes(mesh) if traced else manual_axes(mesh)
    auto = _auto_axes(mesh) if shardings is None and traced else frozenset()
    unknown = math.prod(size for axis, size in axis_sizes(mesh).items() if axis in auto) > 1
    taken |= auto
    if not axis_sizes(mesh, taken):
        return LeafShardings(None, {}, unknown_shardings=unknown)
    specs = {
        path: _spec(path, leaf, given.get(path, own[path]), mesh) for path, leaf in leaves.items()
    }
    return LeafShardings(mesh, specs, taken, unknown_shardings=unknown)


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


def axis_sizes(mesh: AnyMesh | None, taken: Collection[str] = ()) -> dict[str, int]:
    """Axis names and sizes of a mesh, in its order, without those that are taken."""
    sizes = () if mesh is None else zip(mesh.axis_names, mesh.axis_sizes, strict=True)
    return {axis: size for axis, size in sizes if axis not in taken}


def taken_axes(mesh: AnyMesh) -> frozenset[str]:
    """Mesh axes along which devices have values of their own, where this is traced.

    They are those that a `shard_map` or `pmap` around has made Manual, and the Explicit ones over
    which a `vmap` around maps. The types of arrays do not name the latter; but a `shard_map` over
    the whole mesh leaves them out, and its body sees which axes it got.
    """
    here = jax.sharding.get_abstract_mesh()
    mesh = mesh if here.empty else here
    got: set[str] = set()
    look = jax.shard_map(
        lambda: got.update(manual_axes(jax.sharding.get_abstract_mesh())),
        mesh=mesh,
        in_specs=(),
        out_specs=PartitionSpec(),
    )
    jax.eval_shape(look)
    return manual_axes(mesh) | (frozenset(mesh.axis_names) - got)


def manual_axes(mesh: AnyMesh) -> frozenset[str]:
    """Mesh axes of type Manual: those of a `shard_map` or `pmap` around."""
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(axis for axis, kind in axes if kind == AxisType.Manual)


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
    here = jax.sharding.get_abstract_mesh()
    if manual_axes(here):
        # Inside a `shard_map` or `pmap` there is no other, though a user may give an outer one.
        return here
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
    found = next(iter(meshes.values()), here)
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
    # A leaf is already the part of its device along Manual axes.
    manual = manual_axes(mesh)
    axes = [tuple(name for name in entry if name not in manual) for entry in axes]
    return (*axes, *((),) * (len(leaf.shape) - len(axes)))


def _auto_axes(mesh: AnyMesh) -> frozenset[str]:
    """Mesh axes of type Auto, on which only the compiler knows the shardings of tracers."""
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(axis for axis, kind in axes if kind == AxisType.Auto)
