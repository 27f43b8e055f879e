r"""Gram Newton-Schulz: the same polynomial, on the m x m Gram matrix of elongated matrices.

Every step of Newton-Schulz multiplies from the left by a polynomial of $R = X X^T$, so k steps are
one factor, $X_k = Q_k X$, and the long side n is met only to build R and to apply Q:

$$Z = b R + c R^2, \qquad Q \leftarrow (aI + Z)\, Q, \qquad R \leftarrow (aI + Z)\, R\, (aI + Z).$$

R squares the condition number, and rounding in its null space grows with every step. The cure is a
restart: apply Q to X and form R anew. `SPANS` says how many steps one Gram matrix may serve.

With k = n / m, five steps cost (20 k + 10) m^3 as Newton-Schulz, (8 k + 28) m^3 with one restart
and (12 k + 22) m^3 with two, counting a multiply-add as 2: the Gram form is cheaper from k = 1.5.

The form is that of Dao-AILab, gram-newton-schulz, 2026. The plain form is in `newton_schulz.py`.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from optax_muon.polar.coefficients import KELLER, Coefficients, Row
from optax_muon.polar.columns import WHOLE, Columns
from optax_muon.polar.newton_schulz import on_short_side, quadratic
from optax_muon.polar.precision import adjoint, gram_matrix, identity_like, product

__all__ = ["SPANS", "default_restarts", "gram_newton_schulz"]

SPANS: Mapping[str, int] = MappingProxyType(
    {"bfloat16": 2, "float16": 2, "float32": 3, "float64": 3}
)
"""Steps that one Gram matrix may serve, by compute dtype.

Measured over every table and over Gaussian, power-law, log-spaced (1 to 1e-4), rank-one, low-rank
plus noise and 32:1 matrices, against a float64 SVD. Half precision in spans of 2 has at most 2.4
times the error of the plain form, on 32:1, and less than it on low rank; spans of 3 reach 4 times.
float32 in spans of 3 stays below 2e-5 wherever the plain form does; spans of 4 reach 2e-4.
"""


def default_restarts(steps: int, dtype: DTypeLike) -> tuple[int, ...]:
    """Return the steps before which the Gram matrix is formed anew.

    >>> default_restarts(5, "bfloat16"), default_restarts(5, "float32")
    ((2, 4), (3,))

    Args:
        steps: How many steps the polynomial has.
        dtype: What the operands of the products are rounded to.

    Returns:
        Indices of steps, counted from 0, increasing.
    """
    span = SPANS[jnp.finfo(dtype).dtype.name]
    return tuple(range(span, steps, span))


def gram_newton_schulz(
    x: ArrayLike,
    /,
    coefficients: Coefficients = KELLER,
    *,
    steps: int | None = None,
    dtype: DTypeLike | None = None,
    restarts: Sequence[int] | None = None,
    columns: Columns = WHOLE,
) -> jax.Array:
    r"""Compute what `newton_schulz` computes, for less where one side is 1.5 times the other.

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
            `default_restarts`. Fewer are cheaper and can diverge in half precision.
        columns: The devices that hold the columns of these matrices, as for `newton_schulz`. They
            are asked for one sum per Gram matrix: 1 + restarts.

    Returns:
        Matrices of the shape and dtype of `x`.

    Raises:
        ValueError: `steps` or `restarts` does not fit, or `x` has fewer than two axes.
        TypeError: `x` is not floating point, or `dtype` is not a float dtype to compute in.

    Source: Dao-AILab, gram-newton-schulz, 2026.
    """
    rows = coefficients.take(steps)
    if restarts is not None:
        restarts = _checked(restarts, len(rows))
    return on_short_side(
        lambda x: _polynomial(x, rows, restarts, columns), x, coefficients.safety, dtype, columns
    )


def _checked(restarts: Sequence[int], steps: int) -> tuple[int, ...]:
    bounds = (0, *map(operator.index, restarts), steps)
    if any(left >= right for left, right in itertools.pairwise(bounds)):
        raise ValueError(
            f"restarts={tuple(restarts)} does not fit {steps} steps, "
            f"increasing indices between 0 and {steps}, both excluded, are accepted."
        )
    return bounds[1:-1]


def _polynomial(
    x: jax.Array, rows: tuple[Row, ...], restarts: Sequence[int] | None, columns: Columns
) -> jax.Array:
    if restarts is None:
        restarts = default_restarts(len(rows), x.dtype)
    y = x
    for start, stop in itertools.pairwise((0, *restarts, len(rows))):
        operand = y.astype(x.dtype)
        gram = columns.psum(gram_matrix(operand))
        factor = _factor(gram, rows[start:stop], x.dtype)
        y = product(factor.astype(x.dtype), operand)
    return y


def _factor(gram: jax.Array, rows: tuple[Row, ...], dtype: DTypeLike) -> jax.Array:
    """Return Q such that Q X is what the steps make of X, from R = X X^H."""
    a, b, c = rows[0]
    z = quadratic(gram, gram, b, c, dtype)
    factor = a * identity_like(gram) + z
    for following in rows[1:]:
        gram = _times(_times(gram, a, z, dtype), a, z, dtype)
        a, b, c = following
        z = quadratic(gram, gram, b, c, dtype)
        factor = _times(factor, a, z, dtype)
    return factor


def _times(t: jax.Array, a: float, z: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return (a I + Z) T for Hermitian commuting T and Z, Hermitian again.

    a T stays out of the product: the diagonal of a I + Z would lose its digits in half precision.
    """
    y = a * t + product(z.astype(dtype), t.astype(dtype))
    # Rounding leaves a skew part, which the next steps would amplify.
    return 0.5 * (y + adjoint(y))
