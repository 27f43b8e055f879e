"""Layers that the models share: linear, embedding, RMSNorm, SwiGLU, rotary position embedding."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from optax_muon.models.mesh import Axes, constrain

Rotations = tuple[jax.Array, jax.Array]
"""Cosines and sines of the rotary angles, `[1, t, 1, dim / 2]` each."""


class Linear(nn.Module):
    """`x @ kernel`, without a bias."""

    features: int
    """Columns of the kernel."""
    dtype: str
    """Dtype of the product."""
    rows: Axes = None
    """Mesh axes that the kernel's rows are sharded over while it is used."""
    cols: Axes = None
    """Mesh axes that the kernel's columns are sharded over while it is used."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to `x`, `[.., rows]`: `[.., features]`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        # Cast before the all-gather: in bfloat16 it moves half the bytes.
        return x.astype(self.dtype) @ constrain(kernel.astype(self.dtype), self.rows, self.cols)


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + eps)`, in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    eps: float
    """Added to the mean square under the root."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis of `x`; the result is float32."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * (inverse * scale.astype(jnp.float32).reshape([1] * (x.ndim - 1) + [-1]))


class Embed(nn.Module):
    """Token embeddings."""

    vocab_size: int
    """Rows of the table."""
    features: int
    """Columns of the table."""
    dtype: str
    """Dtype of the embeddings that are looked up."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embed `tokens`, `[b, t]`: `[b, t, features]`."""
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        table = self.param("embedding", normal, (self.vocab_size, self.features))
        return constrain(table.astype(self.dtype), None, None)[tokens]


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202, Eq. 6)."""

    hidden: int
    """Features of gate and up."""
    dtype: str
    """Dtype of the products."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to `x`, `[b, t, hidden_size]`."""
        gate = Linear(self.hidden, self.dtype, cols="tensor", name="gate_proj")(x)
        up = Linear(self.hidden, self.dtype, cols="tensor", name="up_proj")(x)
        return Linear(x.shape[-1], self.dtype, rows="tensor", name="down_proj")(nn.silu(gate) * up)


def rotations(dim: int, theta: float, length: int, dtype: str) -> Rotations:
    """Cosines and sines of `position * theta ** (-2 i / dim)`, `[1, length, 1, dim / 2]` each.

    (Su et al., RoFormer, arXiv 2104.09864, section 3.2.2.)
    """
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), theta**-exponents)
    angles = angles[None, :, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, rotations: Rotations) -> jax.Array:
    """Rotate the feature pairs `(i, i + h/2)` of `x`, `[b, t, heads, h]`, by their angles."""
    cos, sin = rotations
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def deinterleave(x: jax.Array) -> jax.Array:
    """Move the pairs `(2 i, 2 i + 1)` of the last axis to `(i, i + h/2)`, as `rotate` needs them.

    >>> deinterleave(jnp.arange(6)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
