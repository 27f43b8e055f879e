"""The mesh axes of the models, and how arrays are laid out over them.

A model names the mesh axes of its arrays, `constrain(x, BATCH, None, "tensor")`, and runs on any
mesh: axes that the ambient mesh of `jax.set_mesh` lacks are dropped, and without a mesh nothing
happens. The axes are

    data     data parallelism: sequences are sharded over it, parameters replicated
    fsdp     sequences and parameters are sharded over it; parameters are gathered where used
    expert   like `fsdp`, but experts are sharded over it and their tokens are sent to them
    tensor   tensor parallelism: attention heads and hidden features
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

Axes = str | tuple[str, ...] | None
"""Mesh axes that one axis of an array is sharded over, major first."""

BATCH = ("data", "fsdp", "expert")
"""The mesh axes that sequences are sharded over."""

FSDP_AXES = ("fsdp", "expert")
"""The mesh axes that stored parameters are sharded over, experts excepted."""


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
    """Constrain the layout of `x` on the ambient mesh.

    Args:
        x: An array of any shape.
        axes: Mesh axes of each axis of `x`; those that the mesh lacks are dropped.

    Returns:
        `x` with the sharding constraint; `x` itself without an ambient mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(present_axes(entry) for entry in axes)))


def present_axes(axes: Axes) -> tuple[str, ...] | None:
    """The axes among these that the ambient mesh has; None if it has none of them."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in names if name in mesh.axis_names) or None


def batch_shards() -> int:
    """Devices of the ambient mesh that each hold different sequences of a batch; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in present_axes(BATCH) or ())


def mark_varying(x: jax.Array, axes: Axes) -> jax.Array:
    """Inside `shard_map`: mark an `x` that is replicated over these mesh axes as varying over them.

    Its gradient is then summed over the axes once, here, and not at every use of `x`, such as in
    each iteration of a loop.
    """
    names = present_axes(axes)
    return jax.lax.pcast(x, names, to="varying") if names else x


def with_auto_axes(function: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """Run a function with the mesh's Explicit axes as Auto.

    Args:
        function: Any function of arrays.
        out: `PartitionSpec`s of its results.

    Returns:
        The wrapped function; the function itself without an ambient mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.sharding.auto_axes(function, out_sharding=out)
