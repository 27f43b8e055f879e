r"""The exact polar factor by a singular value decomposition, which the iterations approximate.

$X = U \Sigma V^T \mapsto U V^T$, the nearest matrix with orthonormal rows or columns. It costs
as much as tens of matrix products and is slow on accelerators, so it is for tests, plots and small
matrices; training uses `newton_schulz.py`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_muon.polar.normalize import as_matrices, normalize
from optax_muon.polar.precision import product

__all__ = ["polar_svd"]


def polar_svd(x: ArrayLike, /) -> jax.Array:
    r"""Set every nonzero singular value of each matrix to 1.

    $U \Sigma V^T \mapsto \sum_{\sigma_i > \epsilon} u_i v_i^T$.

    >>> import jax.numpy as jnp
    >>> from optax_muon.polar import polar_svd
    >>> polar_svd(jnp.array([[0.0, 2.0, 0.0], [-5.0, 0.0, 0.0]])).round(3)
    Array([[ 0.,  1.,  0.],
           [-1.,  0.,  0.]], dtype=float32)

    Args:
        x: Matrices [..., m, n] of any float dtype and any scale; computed in float32 at least.

    Returns:
        Matrices of the shape and dtype of `x`. Singular values up to max(m, n) times the
        machine epsilon times the largest one count as zero, so rank-deficient and zero matrices
        get no invented directions.

    Raises:
        ValueError: `x` has fewer than two axes.
        TypeError: `x` is not floating point.

    Source: Higham, Functions of Matrices, 2008, chapter 8.
    """
    x = as_matrices(x)
    u, sigma, vh = jnp.linalg.svd(normalize(x), full_matrices=False)
    null = max(x.shape[-2:]) * jnp.finfo(sigma.dtype).eps * jnp.max(sigma, -1, keepdims=True)
    kept = (sigma > null).astype(u.dtype)
    return product(u * kept[..., None, :], vh).astype(x.dtype)
