r"""Gram Newton-Schulz: the same polynomial, on the m x m Gram matrix of elongated matrices.

Every step of Newton-Schulz multiplies from the left by a polynomial of $R = X X^T$, so k steps are
one factor, $X_k = Q_k X$, and the long side n is met only to build R and to apply Q:

$$Z = b R + c R^2, \qquad Q \leftarrow (aI + Z)\, Q, \qquad R \leftarrow (aI + Z)\, R\, (aI + Z).$$

R squares the condition number, and rounding in its null space grows with every step. The cure is a
restart: apply Q to X and form R anew. `SPANS` says how many steps one Gram matrix may serve.

With k = n / m, five steps cost (20 k + 10) m^3 as Newton-Schulz, (8 k + 28) m^3 with one restart
and (12 k + 22) m^3 with two, counting a multiply-add as 2: the Gram form is cheaper from k = 1.5.

The form is that of Dao-AILab, gram-newton-schulz, 2026. The plain form is in `plain.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_muon.polar.coefficients import Row
from optax_muon.polar.plain import Step, applied, quadratic
from optax_muon.polar.precision import at_least_float32, identity_like
from optax_muon.polar.reductions import ALL_COLUMNS, ColumnShards
from optax_muon.polar.symmetric import FULL, Products
from optax_muon.polar.work import Work

SPANS: Mapping[str, int] = MappingProxyType(
    {"bfloat16": 2, "float16": 2, "float32": 3, "float64": 3}
)
"""Steps that one Gram matrix may serve, by compute dtype.

Measured over every table and over Gaussian, power-law, log-spaced (1 to 1e-4), rank-one, low-rank
plus noise and 32:1 matrices, against a float64 SVD. Half precision in spans of 2 has at most 1.9
times the error of the plain form, and less than it on low rank; in spans of 3, 4 times where it
does not diverge, as POLAR_EXPRESS does on a power law.
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


@dataclasses.dataclass(frozen=True)
class Gram:
    """Newton-Schulz on the Gram matrix, formed anew before some of the steps.

    >>> from optax_muon.polar import KELLER
    >>> Gram((3,)).count(4, 8, KELLER.rows).flops == (8 * 8 / 4 + 28) * 4**3
    True
    """

    restarts: tuple[int, ...]
    """Steps, counted from 0, before which the Gram matrix is formed anew."""
    products: Products = FULL
    """How products of commuting Hermitian matrices are computed: all but the last of a span."""

    @classmethod
    def with_default_restarts(
        cls,
        steps: int,
        dtype: DTypeLike,
        restarts: Sequence[int] | None = None,
        products: Products = FULL,
    ) -> Gram:
        """Take these restarts, or where they are None those of the compute dtype."""
        chosen = default_restarts(steps, dtype) if restarts is None else tuple(restarts)
        return cls(chosen, products)

    def __call__(
        self, x: jax.Array, rows: Sequence[Step], column_shards: ColumnShards = ALL_COLUMNS
    ) -> jax.Array:
        """Send wide matrices [..., m, n] of norm below 1 through the steps.

        Raises:
            ValueError: The restarts do not fit the number of steps.
        """
        y = x
        for span in self._spans(rows):
            operand = jax.lax.optimization_barrier(y.astype(x.dtype))
            gram = column_shards.psum(self.products.gram(operand))
            y = self._apply(gram, span, operand)
        return y

    def _spans(self, rows: Sequence[Step]) -> list[Sequence[Step]]:
        """Group the steps by the Gram matrix that serves them."""
        bounds = (0, *map(operator.index, self.restarts), len(rows))
        spans = list(itertools.pairwise(bounds))
        if any(start >= stop for start, stop in spans):
            raise ValueError(
                f"restarts={self.restarts} does not fit {len(rows)} steps, "
                f"increasing indices between 0 and {len(rows)}, both excluded, are accepted."
            )
        return [rows[start:stop] for start, stop in spans]

    def _apply(self, gram: jax.Array, rows: Sequence[Step], x: jax.Array) -> jax.Array:
        """Return what the steps make of X, which is Q X, from R = X X^H."""
        operand = functools.partial(self.products.operand, dtype=x.dtype)
        in_half_precision = jnp.finfo(x.dtype).bits < 32
        a, b, c = rows[0]
        # What is multiplied and added is rounded once, for both: with the sum in float32 the two
        # errors do not cancel, and POLAR_EXPRESS_8 has 2.2 times the plain form's instead of 1.0.
        gram = operand(gram)
        z = operand(quadratic(gram, b, c, x.dtype, self.products))
        # An a I + Z that is an operand in half precision loses digits of Z on its diagonal, and on
        # TPUs it is a pass of its own. So a T stays out of the products that read Z.
        if in_half_precision and len(rows) == 1:
            moved = self.products.apply(z, x)
            return a * x.astype(moved.dtype) + moved
        factor = a * identity_like(at_least_float32(z)) + at_least_float32(z)
        for index, following in enumerate(rows[1:]):
            half = operand(a * at_least_float32(gram) + self.products.commuting(z, gram))
            moved = a * at_least_float32(half) + self.products.from_right(half, z)
            # A skew part of R would grow in the next steps: without this 2 to 40 times the error.
            gram = operand(self.products.symmetrize(moved))
            a_before, z_before = a, z
            a, b, c = following
            z = operand(quadratic(gram, b, c, x.dtype, self.products))
            if in_half_precision and index == 0:  # the factor so far is a I + Z of the step before
                product = self.products.commuting(z, z_before)
                grown = a_before * at_least_float32(z) + product
            else:
                grown = self.products.commuting(z, operand(factor))
            factor = a * factor + grown
        return self.products.apply(operand(factor), x)

    def count(self, m: int, n: int, rows: Sequence[Row], devices: int = 1) -> Work:
        """Count one matrix [m, n], m <= n, its columns on so many devices."""
        spans = self._spans(rows)
        columns = n // devices
        between = len(rows) - len(spans)
        squares = sum(bool(c) for _, _, c in rows)
        # Two products and the symmetric part of their result turn matrices.
        inner = self.products.work(m, m) * (3 * between + squares)
        turned = Work(0, transposed=between * self.products.turned(m))
        long = self.products.work(m, columns) + applied(m, columns)
        written = Work(0, passes=2 * (3 * between + squares) * m * m + 2 * len(spans) * m * columns)
        return dataclasses.replace(
            inner + turned + long * len(spans) + written,
            sums=len(spans) * (devices > 1),
            form=str(self),
        )

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"Gram {1 + len(self.restarts)}", str(self.products))))
