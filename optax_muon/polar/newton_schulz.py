r"""Newton-Schulz: the nearest orthogonal matrix, by matrix products alone.

Let $X = U \Sigma V^T$. Muon replaces it by (about) its polar factor $U V^T$, the direction of
steepest descent in the spectral norm. No decomposition is needed: with

$$X_0 = X / (s \|X\|_F), \qquad X_k = a_k X_{k-1} + b_k A X_{k-1} + c_k A^2 X_{k-1},
\qquad A = X_{k-1} X_{k-1}^T,$$

the singular vectors stay and every singular value $\sigma$ becomes
$p_N(\dots p_1(\sigma / (s \|X\|_F)))$, which a good table of coefficients (`coefficients.py`) has
sent to 1. A is as small as the short side, so tall matrices are turned on their side first.

How that is evaluated is a form: step by step (`plain.py`), or on the Gram matrix (`gram.py`), with
symmetric products made whole or in half (`symmetric.py`). All give the same update; `forms.py`
chooses. The paper is "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.1. The exact
factor is in `exact.py`.
"""

from collections.abc import Callable, Sequence

import jax
from jax.typing import ArrayLike, DTypeLike

from optax_muon.polar.coefficients import KELLER, Coefficients
from optax_muon.polar.gram import Gram
from optax_muon.polar.normalize import as_matrices, normalize
from optax_muon.polar.precision import adjoint, on_platform
from optax_muon.polar.reductions import WHOLE, ColumnShards
from optax_muon.polar.selection import Form, choose

__all__ = ["gram_newton_schulz", "newton_schulz"]


def newton_schulz(
    x: ArrayLike,
    /,
    coefficients: Coefficients = KELLER,
    *,
    steps: int | None = None,
    dtype: DTypeLike | None = None,
    form: Form | None = None,
    column_shards: ColumnShards = WHOLE,
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
        form: How the polynomial is evaluated, `Plain()` or `Gram(restarts)`; None takes the
            plain one unless another saves enough operations on these shapes and this platform.
        column_shards: The devices that hold the columns of these matrices, each its own; `x` is
        then
            [..., m, n / size] of matrices with m <= n. By default all columns are here.

    Returns:
        Matrices of the shape and dtype of `x`.

    Raises:
        ValueError: `steps` does not fit the table, or `x` has fewer than two axes.
        TypeError: `x` is not floating point, or `dtype` is not a float dtype to compute in.

    Source: arXiv 2502.16982, section 2.1, Eq. 2.
    """
    rows = coefficients.take(steps)

    def polynomial(x: jax.Array, platform: str) -> jax.Array:
        m, n = x.shape[-2], x.shape[-1] * column_shards.size
        chosen = form or choose(
            m, n, rows, dtype=x.dtype, platform=platform, devices=column_shards.size
        )
        return chosen(x, rows, column_shards)

    return _on_short_side(polynomial, x, coefficients.safety, dtype, column_shards)


def gram_newton_schulz(
    x: ArrayLike,
    /,
    coefficients: Coefficients = KELLER,
    *,
    steps: int | None = None,
    dtype: DTypeLike | None = None,
    restarts: Sequence[int] | None = None,
    column_shards: ColumnShards = WHOLE,
) -> jax.Array:
    r"""Compute what `newton_schulz` computes, on the Gram matrix whatever the shape.

    $X \mapsto Q(X X^T)\, X$ with $Q$ the product of the steps.

    >>> import jax
    >>> from optax_muon.polar import gram_newton_schulz, newton_schulz
    >>> gradient = jax.random.normal(jax.random.key(0), (2, 32, 512))
    >>> update = gram_newton_schulz(gradient)
    >>> bool(jax.numpy.allclose(update, newton_schulz(gradient), atol=1e-5))
    True

    Args:
        x: Matrices [..., m, n] of any float dtype and any scale; leading axes are batch.
        coefficients: The table of steps, as for `newton_schulz`.
        steps: How many steps, where the table leaves a choice; None takes it as it is.
        dtype: What the operands of the products are rounded to, as for `newton_schulz`.
        restarts: Steps, counted from 0, before which the Gram matrix is formed anew. None takes
            `default_restarts`. Fewer are cheaper and can diverge in half
            precision.
        column_shards: The devices that hold the columns of these matrices, as for
            `newton_schulz`. They are asked for one sum per Gram matrix: 1 + restarts.

    Returns:
        Matrices of the shape and dtype of `x`.

    Raises:
        ValueError: `steps` or `restarts` does not fit, or `x` has fewer than two axes.
        TypeError: `x` is not floating point, or `dtype` is not a float dtype to compute in.

    Source: Dao-AILab, gram-newton-schulz, 2026.
    """
    rows = coefficients.take(steps)

    def polynomial(x: jax.Array, platform: str) -> jax.Array:
        del platform
        return Gram.of(len(rows), x.dtype, restarts)(x, rows, column_shards)

    return _on_short_side(polynomial, x, coefficients.safety, dtype, column_shards)


def _on_short_side(
    polynomial: Callable[[jax.Array, str], jax.Array],
    x: ArrayLike,
    safety: float,
    dtype: DTypeLike | None,
    column_shards: ColumnShards,
) -> jax.Array:
    """Apply `polynomial` to wide matrices of norm 1 / safety, in the compute dtype."""
    x = as_matrices(x)
    tall = column_shards.size == 1 and x.shape[-2] > x.shape[-1]
    unit = normalize(adjoint(x) if tall else x, safety, column_shards)
    y = on_platform(polynomial, unit, dtype).astype(x.dtype)
    return adjoint(y) if tall else y
