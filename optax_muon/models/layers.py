"""Layers that the models share: matrices, norms, SwiGLU, rotary positions; and a mesh's axes.

A model says in mesh axes where an array of its computation lies, `constrain(x, BATCH, None, "tensor")`,
and runs anywhere: axes that the ambient mesh of `jax.set_mesh` lacks are left out, and without a
mesh nothing happens. The axes are

    data     sequences; parameters lie there in copies
    fsdp     sequences, and parameters that are gathered where they are used
    expert   as `fsdp`, but that experts lie over it and their tokens come to them
    tensor   heads and hidden units
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Rotations = tuple[jax.Array, jax.Array]
"""Cosines and sines of the rotary angles, `[1, t, 1, dim / 2]` each."""

Axes = str | tuple[str, ...] | None
"""Mesh axes that one axis of an array is cut over, major first."""

BATCH = ("data", "fsdp", "expert")
"""The mesh axes that sequences lie over."""

FSDP_AXES = ("fsdp", "expert")
"""The mesh axes that a matrix, or a row of experts, is cut over where it is stored."""


class Linear(nn.Module):
    """`x @ kernel`, no bias.

    Args:
        features: columns of the kernel.
        dtype: of the product.
        rows: mesh axes that the kernel's rows lie over while it is used.
        cols: the same for its columns.
    """

    features: int
    dtype: str
    rows: Axes = None
    cols: Axes = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to `x`, `[.., rows]`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        # Cast before it is gathered: half the bytes in bfloat16.
        return x.astype(self.dtype) @ constrain(kernel.astype(self.dtype), self.rows, self.cols)


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + eps)`, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to the last axis of `x`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * (inverse * scale.astype(jnp.float32).reshape([1] * (x.ndim - 1) + [-1]))


class Embed(nn.Module):
    """Rows of a table, by token.

    Args:
        vocab: rows.
        features: columns.
        dtype: of what is looked up.
    """

    vocab: int
    features: int
    dtype: str

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Look up `tokens`, `[b, t]`: `[b, t, features]`."""
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        table = self.param("embedding", normal, (self.vocab, self.features))
        return constrain(table.astype(self.dtype), None, None)[tokens]


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202, Eq. 6).

    Args:
        hidden: features of gate and up.
        dtype: of the products.
    """

    hidden: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to `x`, `[b, t, width]`."""
        gate = Linear(self.hidden, self.dtype, cols="tensor", name="gate_proj")(x)
        up = Linear(self.hidden, self.dtype, cols="tensor", name="up_proj")(x)
        return Linear(x.shape[-1], self.dtype, rows="tensor", name="down_proj")(nn.silu(gate) * up)


def rotations(dim: int, theta: float, length: int, dtype: str) -> Rotations:
    """Cosines and sines `[1, length, 1, dim / 2]` of `position * theta ** (-2 i / dim)`."""
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), theta**-exponents)
    angles = angles[None, :, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, rotations: Rotations) -> jax.Array:
    """Turn feature pairs `(i, i + h/2)` of `x`, `[b, t, heads, h]`, by their position's angles."""
    cos, sin = rotations
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def deinterleave(x: jax.Array) -> jax.Array:
    """Bring the pairs `(2 i, 2 i + 1)` of the last axis to `(i, i + h/2)`, as `rotate` wants them.

    >>> deinterleave(jnp.arange(6)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
    """Say where `x` lies on the ambient mesh, one entry for each of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(present_axes(entry) for entry in axes)))


def present_axes(axes: Axes) -> tuple[str, ...] | None:
    """Of these mesh axes, those that the ambient mesh has; None if it has none of them."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in names if name in mesh.axis_names) or None


def mark_varying(x: jax.Array, axes: Axes) -> jax.Array:
    """Inside `shard_map`: an `x` that is equal along these mesh axes, as if it differed.

    Its gradient is summed over them here, once, and not wherever `x` is used, such as in a loop.
    """
    names = present_axes(axes)
    return jax.lax.pcast(x, names, to="varying") if names else x


def with_auto_axes(function: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """The function with Explicit mesh axes Auto inside, its results on the specs `out`."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.sharding.auto_axes(function, out_sharding=out)
