"""Newton-Schulz as `optax.contrib.muon` computes it, on stacks `[..., m, n]` with `m <= n`.

One step is the quintic of `optax_muon.polar`, written with the Gram matrix `A = X X^H`:

    X <- a X + (b A + c A A) X

It needs singular values of at most about one. Optax has four ways of scaling `X` to that, each a
function `(X, eps) -> (X, A)` here. Each also returns the Gram matrix of the scaled `X`: `aol` and
`schatten` compute their scale from the Gram matrix, and the first step uses it again.

    frobenius   X / (||X||_F + eps)
    spectral    X / (||X||_2 + eps)              exact, by SVD: slow
    aol         D X,  D_ii = (sum_j |A_ij|)^-1/2   almost-orthogonal layer, arXiv 2512.04632
    schatten    X ||A||_F^-1/2                   the Schatten-4 norm, arXiv 2506.10935

Everything runs in the dtype of `X`. This iteration exists to reproduce optax's numbers; the
package's own, which is scale-invariant and has a compute dtype, is `optax_muon.newton_schulz`. The
optimizer that uses this one is in `contrib.py`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_muon.polar.normalize import safe_sqrt

Preconditioner = Callable[[jax.Array, ArrayLike], tuple[jax.Array, jax.Array]]
"""`(X, eps) -> (scaled X, its Gram matrix)`, of shapes `[..., m, n]` and `[..., m, m]`."""

_GRAM_FLOOR = 1e-8
"""The smallest norm of a Gram matrix that aol and schatten divide by; they ignore `eps`."""

_MATRIX = (-2, -1)


def newton_schulz(
    x: jax.Array,
    rows: jax.Array,
    precondition: Preconditioner,
    eps: ArrayLike = 1e-8,
    steps: ArrayLike | None = None,
) -> jax.Array:
    """Drive every singular value towards one.

    Args:
        x: `[..., m, n]` with `m <= n`, real or complex.
        rows: `[steps, 3]`, one `(a, b, c)` per step, at least one; or `[3]` for all of them.
        precondition: One of `PRECONDITIONERS`.
        eps: Added to the norm by frobenius and spectral, in units of the norm of `x`.
        steps: How many steps, where `rows` is one; it may be traced.

    Returns:
        `[..., m, n]` in the dtype of `x`.

    >>> x = newton_schulz(jnp.eye(2, 3), jnp.array([[2.0, -1.5, 0.5]] * 9), frobenius)
    >>> print(x.round(4) + 0.0)
    [[1. 0. 0.]
     [0. 1. 0.]]
    """
    rows = rows.astype(x.dtype)
    # Selecting zeros makes the derivative at a zero matrix zero as well.
    x = jnp.where(jnp.any(x != 0, _MATRIX, keepdims=True), x, jnp.zeros_like(x))
    x, gram = precondition(x, eps)
    if rows.ndim == 1:
        x = _step(x, gram, rows)
        return jax.lax.fori_loop(1, steps, lambda _, x: _step(x, _gram(x), rows), x)
    x = _step(x, gram, rows[0])
    return jax.lax.scan(lambda x, row: (_step(x, _gram(x), row), None), x, rows[1:])[0]


def frobenius(x: jax.Array, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Divide by the Frobenius norm.

    Args:
        x: `[..., m, n]`, `m <= n`, real or complex.
        eps: Added to the norm.

    Returns:
        The scaled `x` and its Gram matrix `[..., m, m]`, in the dtype of `x`.

    >>> x, gram = frobenius(jnp.array([[3.0, 4.0]]), 0.0)
    >>> print(x, gram)
    [[0.6 0.8]] [[1.]]
    """
    x = _divided(x, _frobenius_norm(x), eps)
    return x, _gram(x)


def spectral(x: jax.Array, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Divide by the largest singular value, computed by an SVD.

    Args:
        x: `[..., m, n]`, `m <= n`, real or complex.
        eps: Added to the norm.

    Returns:
        The scaled `x` and its Gram matrix `[..., m, m]`, in the dtype of `x`.
    """
    x = _divided(x, jnp.linalg.norm(x, 2, _MATRIX, keepdims=True), eps)
    return x, _gram(x)


def aol(x: jax.Array, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Scale row i by `(sum_j |A_ij|)^-1/2`, which bounds the spectral norm by one (Gershgorin).

    Args:
        x: `[..., m, n]`, `m <= n`, real or complex.
        eps: Ignored, as in optax; the sums are at least 1e-8.

    Returns:
        The scaled `x` and its Gram matrix `[..., m, m]`, in the dtype of `x`.

    Source: arXiv 2512.04632.
    """
    del eps
    gram = _gram(x)
    scale = _inverse_root(jnp.abs(gram).sum(-1, keepdims=True), x.dtype)
    return x * scale, gram * scale * scale.mT


def schatten(x: jax.Array, eps: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Divide by the Schatten-4 norm, which lies between the spectral and the Frobenius norm.

    Args:
        x: `[..., m, n]`, `m <= n`; real, since optax does not conjugate the Gram matrix here.
        eps: Ignored, as in optax; the norm of the Gram matrix is at least 1e-8.

    Returns:
        The scaled `x` and its Gram matrix `[..., m, m]`, in the dtype of `x`.

    Source: arXiv 2506.10935.
    """
    del eps
    gram = x @ x.mT  # optax 0.2.8 does not conjugate here; its numbers are the contract
    scale = _inverse_root(_frobenius_norm(gram), x.dtype)
    return x * scale, gram * scale**2


PRECONDITIONERS: Mapping[str, Preconditioner] = MappingProxyType(
    {"frobenius": frobenius, "spectral": spectral, "aol": aol, "schatten": schatten}
)
"""The preconditioners by optax's names."""


def _frobenius_norm(x: jax.Array) -> jax.Array:
    """The norm as `jnp.linalg.norm` computes it, with the derivative 0 at 0 instead of NaN."""
    return safe_sqrt(jnp.sum(jnp.real(x * jnp.conj(x)), _MATRIX, keepdims=True))


def _divided(x: jax.Array, norm: jax.Array, eps: ArrayLike) -> jax.Array:
    divisor = norm + eps
    # In float16 an eps of 1e-8 is zero, and a zero matrix would become NaN.
    divisor = jnp.where(divisor == 0, jnp.ones_like(divisor), divisor)
    return x / divisor.astype(x.dtype)


def _gram(x: jax.Array) -> jax.Array:
    return x @ x.mT.conj()


def _inverse_root(norm: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.rsqrt(jnp.clip(norm, min=_GRAM_FLOOR)).astype(dtype)


def _step(x: jax.Array, gram: jax.Array, row: jax.Array) -> jax.Array:
    a, b, c = row
    return a * x + (b * gram + (c * gram) @ gram) @ x
