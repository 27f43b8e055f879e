r"""Newton-Schulz: the nearest orthogonal matrix, by matrix products alone.

Let $X = U \Sigma V^T$. Muon replaces it by (about) its polar factor $U V^T$, the direction of
steepest descent in the spectral norm. No decomposition is needed: with

$$X_0 = X / (s \|X\|_F), \qquad X_k = a_k X_{k-1} + b_k A X_{k-1} + c_k A^2 X_{k-1},
\qquad A = X_{k-1} X_{k-1}^T,$$

the singular vectors stay and every singular value $\sigma$ becomes
$p_N(\dots p_1(\sigma / (s \|X\|_F)))$, which a good table of coefficients (`coefficients.py`) has
sent to 1. A is as small as the short side, so tall matrices are turned on their side first.

The paper is "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.1. The same
polynomial for elongated matrices is in `gram.py`, the exact factor in `exact.py`.
"""

from collections.abc import Callable

import jax
from jax.typing import ArrayLike, DTypeLike

from optax_muon.polar.coefficients import KELLER, Coefficients, Row
from optax_muon.polar.columns import WHOLE, Columns, all_rows, my_rows
from optax_muon.polar.normalize import as_matrices, normalize
from optax_muon.polar.precision import adjoint, gram_matrix, in_compute_dtype, product

__all__ = ["newton_schulz"]


def newton_schulz(
    x: ArrayLike,
    /,
    coefficients: Coefficients = KELLER,
    *,
    steps: int | None = None,
    dtype: DTypeLike | None = None,
    columns: Columns = WHOLE,
) -> jax.Array:
    r"""Send every singular value of each matrix near 1, and keep the singular vectors.

    $U \Sigma V^T \mapsto U\, p(\Sigma / \|\Sigma\|_F)\, V^T$ with `p = coefficients`.

    >>> import jax
    >>> from optax_muon.polar import POLAR_EXPRESS, newton_schulz
    >>> gradient = jax.random.normal(jax.random.key(0), (4, 64, 256))
    >>> update = newton_schulz(gradient, POLAR_EXPRESS)
    >>> bool(jax.numpy.linalg.svd(update, compute_uv=False).min() > 0.85)
    True
    >>> tiny = newton_schulz(1e-20 * gradient, POLAR_EXPRESS)
    >>> bool(jax.numpy.allclose(tiny, update, atol=1e-4))
    True

    Args:
        x: Matrices [..., m, n] of any float dtype and any scale; leading axes are batch.
            Zero matrices stay zero.
        coefficients: The table of steps. The paper's is the default; `POLAR_EXPRESS` ends
            nearer to 1 at the same cost.
        steps: How many steps, where the table leaves a choice; None takes it as it is.
        dtype: What the operands of the products are rounded to. None is bfloat16 on TPU and
            GPU, as in the paper, and on CPU the input's dtype, float32 at least. Sums run in
            float32 at least. An explicit float32 is true float32 on every platform.
        columns: The devices that hold the columns of these matrices, each its own; `x` is then
            [..., m, n / size] of matrices with m <= n. By default all columns are here.

    Returns:
        Matrices of the shape and dtype of `x`.

    Raises:
        ValueError: `steps` does not fit the table, or `x` has fewer than two axes.
        TypeError: `x` is not floating point, or `dtype` is not a float dtype to compute in.

    Source: arXiv 2502.16982, section 2.1, Eq. 2.
    """
    rows = coefficients.take(steps)
    return on_short_side(
        lambda x: _polynomial(x, rows, columns), x, coefficients.safety, dtype, columns
    )


def on_short_side(
    polynomial: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    safety: float,
    dtype: DTypeLike | None,
    columns: Columns,
) -> jax.Array:
    """Apply `polynomial` to wide matrices of norm 1 / safety, in the compute dtype."""
    x = as_matrices(x)
    tall = columns.size == 1 and x.shape[-2] > x.shape[-1]
    unit = normalize(adjoint(x) if tall else x, safety, columns)
    y = in_compute_dtype(polynomial, unit, dtype).astype(x.dtype)
    return adjoint(y) if tall else y


def _polynomial(x: jax.Array, rows: tuple[Row, ...], columns: Columns) -> jax.Array:
    y = x
    for row in rows:
        # Rounding the whole of X between steps perturbs the input of the next one, which contracts
        # it; keeping a X in float32 does not, and is 4 times less accurate in POLAR_EXPRESS_8.
        # Unfenced, XLA defers the sums to the end and keeps the float32 products of all steps: on a
        # TPU 1.9 GiB where 0.4 do, for one matrix of 4096 x 14336.
        y = _step(jax.lax.optimization_barrier(y.astype(x.dtype)), row, columns)
    return y


def _step(x: jax.Array, row: Row, columns: Columns) -> jax.Array:
    """Return a X + (b A + c A^2) X, A = X X^H, in the accumulation dtype."""
    a, b, c = row
    gram = columns.psum(gram_matrix(x))
    share = quadratic(my_rows(gram, columns), gram, b, c, x.dtype)
    moved = product(all_rows(share.astype(x.dtype), columns), x)
    return a * x.astype(moved.dtype) + moved


def quadratic(rows: jax.Array, gram: jax.Array, b: float, c: float, dtype: DTypeLike) -> jax.Array:
    """Return some rows of b A + c A^2, the operands of A^2 in `dtype`; c = 0 needs no product."""
    if c == 0:
        return b * rows
    return b * rows + c * product(rows.astype(dtype), gram.astype(dtype))
