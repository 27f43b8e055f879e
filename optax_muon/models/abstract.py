"""Parameter trees as shapes and mesh axes, derived from the models; nothing is allocated.

A model's tree is traced from the function that initializes it, so what `optax-muon plan` plans is
what `optax-muon train` trains. Each parameter's mesh axes come from the model's own table of specs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from optax_muon.models.mesh import Axes, with_auto_axes

Specs = Mapping[str, tuple[Axes, ...]]
"""Mesh axes of a parameter's last axes, by the end of its path; the first entry that fits decides.

Leading axes, those of stacked layers, are not sharded.
"""


@dataclasses.dataclass(frozen=True)
class AbstractParam:
    """A parameter: its shape and its spec."""

    shape: tuple[int, ...]
    """Its shape."""
    spec: P
    """Mesh axes that each of its axes is sharded over."""

    @property
    def mesh_axes(self) -> tuple[tuple[str, ...], ...]:
        """The entries of the spec, each as a tuple of mesh axes.

        >>> AbstractParam((3, 64, 256), P(None, ("fsdp", "expert"), "tensor")).mesh_axes
        ((), ('fsdp', 'expert'), ('tensor',))
        """
        entries = (() if e is None else (e,) if isinstance(e, str) else e for e in self.spec)
        return tuple(tuple(entry) for entry in entries)

    def on_mesh(
        self, mesh: Mesh | AbstractMesh, dtype: DTypeLike = jnp.float32
    ) -> jax.ShapeDtypeStruct:
        """The parameter as an abstract array; axes that the mesh lacks are dropped from the spec.

        >>> mesh = AbstractMesh((8,), ("fsdp",))
        >>> AbstractParam((64, 256), P("fsdp", "tensor")).on_mesh(mesh).sharding.spec
        P...('fsdp', None)
        """
        present = (tuple(a for a in axes if a in mesh.axis_names) for axes in self.mesh_axes)
        spec = P(*(axes or None for axes in present))
        return jax.ShapeDtypeStruct(self.shape, dtype, sharding=NamedSharding(mesh, spec))


Tree = dict[str, Any]
"""Nested dicts of `AbstractParam`."""


def derive(initial: Callable[[jax.Array], optax.Params], specs: Specs) -> Tree:
    """Trace a function that makes parameters from a random key.

    Args:
        initial: Makes parameters from a random key.
        specs: Mesh axes of every parameter.

    Returns:
        Shape and spec of every parameter.
    """
    # A real key would need a device, and the ambient mesh may have none on this computer.
    key = jax.eval_shape(jax.random.key, 0)
    return with_specs(jax.eval_shape(with_auto_axes(initial, P()), key), specs)


def with_specs(shapes: Any, specs: Specs) -> Tree:
    """Add mesh axes to shapes.

    Args:
        shapes: A tree of `ShapeDtypeStruct`s.
        specs: Mesh axes of every parameter.

    >>> shapes = {"layers": {"up": jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)}}
    >>> with_specs(shapes, {"up": ("fsdp", None)})["layers"]["up"].spec
    P...(None, 'fsdp', None)
    """

    def param(path: Any, shape: jax.ShapeDtypeStruct) -> AbstractParam:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own = next(axes for end, axes in specs.items() if name.endswith(end))
        return AbstractParam(shape.shape, P(*[None] * (len(shape.shape) - len(own)), *own))

    tree: Tree = jax.tree.map_with_path(param, shapes)
    return tree


def initialize(
    initial: Callable[[jax.Array], optax.Params], specs: Specs, key: jax.Array
) -> optax.Params:
    """Make parameters; on the ambient mesh, if there is one, they are sharded as `specs` says."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return initial(key)
    layout = jax.tree.map(lambda param: param.on_mesh(mesh).sharding.spec, derive(initial, specs))

    def constrained(key: jax.Array) -> optax.Params:
        return jax.lax.with_sharding_constraint(initial(key), layout)

    return with_auto_axes(constrained, layout)(key)


def on_mesh(tree: Tree, mesh: Mesh | AbstractMesh, dtype: DTypeLike = jnp.float32) -> Any:
    """The tree as abstract arrays on a mesh."""
    return jax.tree.map(lambda param: param.on_mesh(mesh, dtype), tree)


def shardings(tree: Tree, mesh: Mesh) -> optax.Params:
    """A `NamedSharding` for every parameter; axes that the mesh lacks are dropped."""
    return jax.tree.map(lambda param: param.on_mesh(mesh).sharding, tree)


def mesh_axes(tree: Tree) -> tuple[str, ...]:
    """The mesh axes that the specs of a tree name, in alphabetical order.

    >>> mesh_axes({"up": AbstractParam((64, 256), P(("fsdp", "expert"), "tensor"))})
    ('expert', 'fsdp', 'tensor')
    """
    entries = (axes for param in jax.tree.leaves(tree) for axes in param.mesh_axes)
    return tuple(sorted({name for axes in entries for name in axes}))


def unstacked(tree: Tree, stack: str) -> Tree:
    """The tree with a subtree per layer instead of stacked layers, as an unrolled model has it.

    Args:
        tree: A model's parameters.
        stack: Name of the subtree whose parameters have a leading axis of layers.

    >>> tree = {"layers": {"up": AbstractParam((2, 8, 16), P(None, "fsdp", None))}}
    >>> unstacked(tree, "layers")["layers"]["1"]["up"]
    AbstractParam(shape=(8, 16), spec=P...('fsdp', None))
    """
    count = jax.tree.leaves(tree[stack])[0].shape[0]
    layer = jax.tree.map(lambda p: AbstractParam(p.shape[1:], P(*p.spec[1:])), tree[stack])
    return {**tree, stack: {str(i): layer for i in range(count)}}
