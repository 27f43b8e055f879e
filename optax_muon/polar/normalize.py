r"""The first step of every function here: check the input, and remove its scale.

Gradients come in every size, and the polynomial of `newton_schulz.py` needs singular values
between 0 and 1. The Frobenius norm bounds the largest one; dividing by the largest entry before
squaring keeps the sum of squares inside float32 from 1e-38 to 3e38.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from optax_muon.polar.coefficients import Row
from optax_muon.polar.plain import Step
from optax_muon.polar.precision import at_least_float32
from optax_muon.polar.reductions import ALL_COLUMNS, ColumnShards


def as_matrices(x: ArrayLike) -> jax.Array:
    """Return `x` as an array of matrices [..., m, n] of real or complex floats.

    Raises:
        TypeError: The entries are not floats.
        ValueError: There are fewer than two axes.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"matrices of dtype {x.dtype} were given, floating point is accepted.")
    if x.ndim < 2:
        raise ValueError(f"shape {x.shape} was given, matrices [..., m, n] are accepted.")
    return x


def normalize(
    x: jax.Array, safety: float = 1.0, column_shards: ColumnShards = ALL_COLUMNS
) -> jax.Array:
    """Divide each matrix by `safety` times its Frobenius norm, in float32 at least; 0 stays 0.

    A matrix with an entry that is not finite becomes NaN, all of it.
    """
    x, norm = scale_out(x, column_shards)
    unit = x / (safety * jnp.maximum(norm, 1.0)).astype(x.dtype)
    # Selecting zeros makes the derivative at a zero matrix zero as well. The norm is NaN where the
    # matrix is not finite, and that must not look like zero.
    return jnp.where(norm == 0, jnp.zeros_like(unit), unit)


def normalize_in_first_step(
    x: jax.Array,
    rows: Sequence[Row],
    dtype: DTypeLike,
    safety: float = 1.0,
    column_shards: ColumnShards = ALL_COLUMNS,
) -> tuple[jax.Array, list[Step]]:
    """Divide real matrices by their largest entry only, and let the first step do the rest.

    With s = 1 / (safety norm), a (s X) + b (s X)^3 + c (s X)^5 has the coefficients a s, b s^3 and
    c s^5 in X. The division by the norm, which has to wait for it, is then no pass over X: by the
    compiler's estimate 0.12 million of a v5p's 9.7 million cycles at 4096 x 4096, and 31 of 650
    thousand at 1024 x 4096.

    Returns:
        Matrices of largest entry 1 in `dtype`, and the steps; the first is [..., 1, 1] in the dtype
        that products of these are summed in.
    """
    x, norm = scale_out(x, column_shards)
    # A factor of 0 makes the derivative at a zero matrix zero as well.
    s = jnp.where(norm == 0, 0.0, 1.0 / (safety * jnp.maximum(norm, 1.0)))
    x = x.astype(dtype)
    s = s.astype(at_least_float32(x).dtype)
    a, b, c = rows[0]
    return x, [(a * s, b * s**3, c * s**5 if c else c), *rows[1:]]


def scale_out(
    x: jax.Array, column_shards: ColumnShards = ALL_COLUMNS
) -> tuple[jax.Array, jax.Array]:
    """Divide each matrix by its largest entry, in float32 at least.

    Returns:
        The matrices, and their Frobenius norms [..., 1, 1]: below 1 only where a matrix is zero,
        and NaN where an entry is not finite.
    """
    x = at_least_float32(x)
    x = x / largest_entry(x, column_shards).astype(x.dtype)
    square = column_shards.psum(jnp.sum(jnp.abs(x) ** 2, axis=(-2, -1), keepdims=True))
    return x, safe_sqrt(square)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root of nonnegative numbers, with the derivative 0 at 0 instead of infinity.

    >>> float(jax.grad(safe_sqrt)(0.0)), float(jax.grad(safe_sqrt)(4.0))
    (0.0, 0.25)
    """
    zero = x == 0
    return jnp.where(zero, jnp.zeros_like(x), jnp.sqrt(jnp.where(zero, jnp.ones_like(x), x)))


def largest_entry(x: jax.Array, column_shards: ColumnShards = ALL_COLUMNS) -> jax.Array:
    """Return max |x| of each matrix as [..., 1, 1]; 1 where all entries are zero or subnormal."""
    peak = column_shards.pmax(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0))
    return jnp.where(peak < jnp.finfo(x.dtype).tiny, 1.0, peak)
