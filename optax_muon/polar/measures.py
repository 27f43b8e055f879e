r"""Four numbers that describe a matrix or an update.

How orthogonal (`orthogonality_error`), how large per entry (`update_rms`), how evenly spread over
directions (`svd_entropy`), and over how many (`stable_rank`). Each maps [..., m, n] to [...] in
float32. Each is finite for a zero matrix, and not for a matrix that is not finite.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jax.typing import ArrayLike

from optax_muon.polar.normalize import as_matrices, largest_entry, normalize
from optax_muon.polar.precision import adjoint, at_least_float32, identity_like, outer_product

__all__ = ["orthogonality_error", "singular_values", "stable_rank", "svd_entropy", "update_rms"]


def orthogonality_error(x: ArrayLike, /) -> jax.Array:
    r"""Return how far the Gram matrix of the short side is from the identity.

    $\|X X^T - I_k\|_F / \sqrt{k}$ with $k = \min(m, n)$: the root mean square of
    $\sigma_i^2 - 1$, so 0.1 means singular values about 5% off 1.

    >>> import jax.numpy as jnp
    >>> print(f"{orthogonality_error(1.1 * jnp.eye(3, 5)):.3f}")
    0.210

    Args:
        x: Matrices [..., m, n].

    Returns:
        Errors [...], 0 for orthonormal rows or columns, 1 for a zero matrix.
    """
    x = at_least_float32(as_matrices(x))
    wide = adjoint(x) if x.shape[-2] > x.shape[-1] else x
    gram = outer_product(wide, wide)
    gap = jnp.abs(gram - identity_like(gram))
    return jnp.sqrt(jnp.mean(jnp.sum(gap**2, -1), -1)).astype(jnp.float32)


def update_rms(x: ArrayLike, /) -> jax.Array:
    r"""Return the root mean square of the entries.

    $\|X\|_F / \sqrt{mn}$. It is $1/\sqrt{\max(m, n)}$ for a full-rank orthogonal matrix and
    $\sqrt{r/(mn)}$ for one of rank r: arXiv 2502.16982, Lemma 1.

    >>> import jax.numpy as jnp
    >>> print(f"{update_rms(jnp.eye(4, 100)):.3f}")
    0.100

    Args:
        x: Matrices [..., m, n].

    Returns:
        Root mean squares [...], in the unit of `x`; 0 for a zero matrix.
    """
    x = at_least_float32(as_matrices(x))
    peak = largest_entry(x)
    square = jnp.mean((jnp.abs(x) / peak) ** 2, axis=(-2, -1))
    return (peak[..., 0, 0] * jnp.sqrt(square)).astype(jnp.float32)


def singular_values(x: ArrayLike, /) -> jax.Array:
    r"""Return the singular values divided by the largest, descending.

    >>> import jax.numpy as jnp
    >>> print(singular_values(jnp.diag(jnp.array([1.0, 4.0, 2.0]))))
    [1.   0.5  0.25]

    Args:
        x: Matrices [..., m, n].

    Returns:
        Values [..., min(m, n)], float32 or wider; zeros for a zero matrix.
    """
    values = _normalized_values(x)
    return values / jnp.maximum(values[..., :1], jnp.finfo(jnp.float32).tiny)


def svd_entropy(x: ArrayLike, /) -> jax.Array:
    r"""Return how evenly the energy of the matrix is spread over its singular directions.

    $H = -\frac{1}{\log k} \sum_i q_i \log q_i$ with $q_i = \sigma_i^2 / \sum_j \sigma_j^2$ and
    $k = \min(m, n)$: 0 for rank one, 1 for an orthogonal matrix.

    >>> import jax.numpy as jnp
    >>> print(f"{svd_entropy(jnp.diag(jnp.array([1.0, 1.0, 0.0, 0.0]))):.3f}")
    0.500

    Args:
        x: Matrices [..., m, n].

    Returns:
        Entropies [...] between 0 and 1; 0 for a zero matrix and for a single row or column.

    Source: arXiv 2502.16982, section 3.4.
    """
    energy = _energies(x)
    # A single singular value has entropy 0, whatever it is divided by.
    unit = math.log(max(energy.shape[-1], 2))
    return (jnp.sum(entr(energy), -1) / unit).astype(jnp.float32)


def stable_rank(x: ArrayLike, /) -> jax.Array:
    r"""Return how many directions carry the energy of the matrix.

    $\|X\|_F^2 / \|X\|_2^2$, between 1 and the rank.

    >>> import jax.numpy as jnp
    >>> print(f"{stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))):.3f}")
    1.500

    Args:
        x: Matrices [..., m, n].

    Returns:
        Stable ranks [...]; 0 for a zero matrix.
    """
    energy = _energies(x)
    most = jnp.max(energy, -1)
    return jnp.where(most == 0, 0, 1 / jnp.where(most == 0, 1, most)).astype(jnp.float32)


def _energies(x: ArrayLike) -> jax.Array:
    """Return the share of each singular value in the squared norm; zeros for a zero matrix."""
    squares = _normalized_values(x) ** 2
    return squares / jnp.maximum(jnp.sum(squares, -1, keepdims=True), 0.5)


def _normalized_values(x: ArrayLike) -> jax.Array:
    """Return the singular values of the normalized matrix; XLA shares equal decompositions."""
    return jnp.linalg.svd(normalize(as_matrices(x)), compute_uv=False)
