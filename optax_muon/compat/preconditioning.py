"""Newton-Schulz as `optax.contrib.muon` computes it, on stacks `[..., m, n]` with `m <= n`.

One step is the quintic of `optax_muon.polar`, written with the Gram matrix `A = X X^H`:

    X <- a X + (b A + c A A) X

It needs singular values of at most about one. Optax knows four ways to get there, each here a
function `(X, eps) -> (X, A)` that hands on the Gram matrix of what it returns, so that the two ways
that read their scale off the Gram matrix cost the first step nothing:

    frobenius   X / (||X||_F + eps)
    spectral    X / (||X||_2 + eps)              exact, by SVD: slow
    aol         D X,  D_ii = (sum_j |A_ij|)^-1/2   almost-orthogonal layer, arXiv 2512.04632
    schatten    X ||A||_F^-1/2                   the Schatten-4 norm, arXiv 2506.10935

Everything runs in the dtype of `X`. The package's own iteration, scale-free and with a compute
dtype, is `optax_muon.newton_schulz`; this one exists for optax's numbers. The optimizer around it
is in `contrib.py`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Preconditioner = Callable[[jax.Array, ArrayLike], tuple[jax.Array, jax.Array]]
"""`(X, eps) -> (X scaled, its Gram matrix)`, on `[..., m, n]` and `[..., m, m]`."""

# The least norm of a Gram matrix that aol and schatten divide by; optax passes them no `eps`.
_GRAM_FLOOR = 1e-8

_MATRIX = (-2, -1)


def newton_schulz(
    x: jax.Array, rows: jax.Array, precondition: Preconditioner, eps: ArrayLike = 1e-8
) -> jax.Array:
    """Drive every singular value towards one.

    Args:
        x: `[..., m, n]` with `m <= n`, real or complex.
        rows: `[steps, 3]`, one `(a, b, c)` per step, at least one.
        precondition: One of `PRECONDITIONERS`.
        eps: Added to the norm by frobenius and spectral, in units of the norm of `x`.

    Returns:
        `[..., m, n]` in the dtype of `x`.

    >>> x = newton_schulz(jnp.eye(2, 3), jnp.array([[2.0, -1.5, 0.5]] * 9), frobenius)
    >>> print(x.round(4) + 0.0)
    [[1. 0. 0.]
     [0. 1. 0.]]
    """
    rows = rows.astype(x.dtype)
    x, gram = precondition(x, eps)
    x = _step(x, gram, rows[0])
    return jax.lax.scan(lambda x, row: (_step(x, _gram(x), row), None), x, rows[1:])[0]


def frobenius(x: jax.Array, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Divide by the Frobenius norm."""
    norm = jnp.linalg.norm(x, "fro", _MATRIX, keepdims=True)
    x = x / (norm + eps).astype(x.dtype)
    return x, _gram(x)


def spectral(x: jax.Array, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Divide by the largest singular value."""
    norm = jnp.linalg.norm(x, 2, _MATRIX, keepdims=True)
    x = x / (norm + eps).astype(x.dtype)
    return x, _gram(x)


def aol(x: jax.Array, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Divide every row by the root of the sum of its row of `|A|`, a bound by Gershgorin."""
    del eps
    gram = _gram(x)
    scale = _inverse_root(jnp.abs(gram).sum(-1, keepdims=True), x.dtype)
    return x * scale, gram * scale * scale.mT


def schatten(x: jax.Array, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Divide by the Schatten-4 norm, between the spectral norm and the Frobenius norm."""
    del eps
    gram = x @ x.mT  # optax 0.2.8 does not conjugate here; its numbers are the contract
    scale = _inverse_root(jnp.linalg.norm(gram, "fro", _MATRIX, keepdims=True), x.dtype)
    return x * scale, gram * scale**2


PRECONDITIONERS: Mapping[str, Preconditioner] = MappingProxyType(
    {"frobenius": frobenius, "spectral": spectral, "aol": aol, "schatten": schatten}
)
"""Optax's names of the ways to scale."""


def _gram(x: jax.Array) -> jax.Array:
    return x @ x.mT.conj()


def _inverse_root(norm: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.rsqrt(jnp.clip(norm, min=_GRAM_FLOOR)).astype(dtype)


def _step(x: jax.Array, gram: jax.Array, row: jax.Array) -> jax.Array:
    a, b, c = row
    return a * x + (b * gram + (c * gram) @ gram) @ x
