"""The plain form: every step multiplies the whole matrix."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
from jax.typing import DTypeLike

from optax_muon.polar.coefficients import Row
from optax_muon.polar.precision import at_least_float32, product
from optax_muon.polar.reductions import ALL_COLUMNS, ColumnShards, gather_rows, local_rows
from optax_muon.polar.symmetric import FULL, Products
from optax_muon.polar.work import Work

Scalar: TypeAlias = float | jax.Array
Step: TypeAlias = tuple[Scalar, Scalar, Scalar]
"""The (a, b, c) of a step: a row of a table, or one [..., 1, 1] for each matrix."""


@dataclasses.dataclass(frozen=True)
class Plain:
    r"""Newton-Schulz step by step, $X \leftarrow a X + (b A + c A^2) X$ with $A = X X^T$.

    >>> from optax_muon.polar import KELLER
    >>> Plain().count(4, 8, KELLER.rows).flops == (20 * 8 / 4 + 10) * 4**3
    True
    """

    products: Products = FULL
    """How $X X^T$ and $A^2$ are made."""
    looped: bool = False
    """Whether equal steps in a row are one loop, where all columns are on the device."""

    def __call__(
        self, x: jax.Array, rows: Sequence[Step], column_shards: ColumnShards = ALL_COLUMNS
    ) -> jax.Array:
        """Send wide matrices [..., m, n] of norm below 1 through the steps."""
        runs = [(row, 1) for row in rows]
        if self.looped and column_shards.size == 1:
            grouped = (list(equal) for _, equal in itertools.groupby(rows, _identity))
            runs = [(equal[0], len(equal)) for equal in grouped]
        y = x
        for row, count in runs:
            step = functools.partial(self._step, row, x.dtype, column_shards)
            y = _repeat(step, count, y)
        return y

    def _step(
        self, row: Step, dtype: DTypeLike, column_shards: ColumnShards, y: jax.Array
    ) -> jax.Array:
        """Return a X + (b A + c A^2) X, A = X X^H, in the accumulation dtype."""
        a, b, c = row
        # Rounding the whole of X between steps perturbs the input of the next one, which contracts
        # it; keeping a X in float32 does not, and is 4 times less accurate in POLAR_EXPRESS_8.
        # Unfenced, XLA defers the sums to the end and keeps the float32 products of all steps: on a
        # TPU 1.9 GiB where 0.4 do, for one matrix of 4096 x 14336.
        x = jax.lax.optimization_barrier(y.astype(dtype))
        gram = column_shards.psum(self.products.gram(x))
        moved = self.products.apply(self._factor(gram, b, c, x.dtype, column_shards), x)
        return a * x.astype(moved.dtype) + moved

    def _factor(
        self,
        gram: jax.Array,
        b: Scalar,
        c: Scalar,
        dtype: DTypeLike,
        column_shards: ColumnShards,
    ) -> jax.Array:
        """Return b A + c A^2 as an operand; where columns are shared, so are the rows of A^2."""
        operand = gram if is_zero(c) else self.products.operand(gram, dtype)
        mine = local_rows(operand, column_shards)
        if mine is operand:
            return self.products.operand(quadratic(operand, b, c, dtype, self.products), dtype)
        if is_zero(c):
            share = b * mine
        else:
            square = product(mine, operand)
            share = b * mine.astype(square.dtype) + c * square
        return gather_rows(share.astype(dtype), column_shards)

    def count(self, m: int, n: int, rows: Sequence[Row], devices: int = 1) -> Work:
        """Count one matrix [m, n], m <= n, its columns on so many devices."""
        shared = devices > 1 and m % devices == 0
        columns = n // devices
        squares = sum(bool(c) for _, _, c in rows)
        square = applied(m, m // devices) if shared else self.products.work(m, m)
        step = self.products.work(m, columns) + applied(m, columns)
        written = Work(0, passes=2 * len(rows) * m * columns)
        return dataclasses.replace(
            step * len(rows) + square * squares + written,
            sums=len(rows) * (devices > 1),
            gathers=len(rows) * shared,
            form=str(self),
        )

    def __str__(self) -> str:
        return ", ".join(filter(None, ("plain", str(self.products))))


def _identity(row: Step) -> Step | int:
    """What equal steps have in common; arrays cannot be compared, and each is one of its own."""
    return row if all(isinstance(each, float | int) for each in row) else id(row)


def _repeat(step: Callable[[jax.Array], jax.Array], count: int, y: jax.Array) -> jax.Array:
    """Apply a step several times, compiled once."""
    if count == 1:
        return step(y)
    done: jax.Array = jax.lax.fori_loop(0, count, lambda _, y: step(y), at_least_float32(y))
    return done


def quadratic(
    gram: jax.Array, b: Scalar, c: Scalar, dtype: DTypeLike, products: Products
) -> jax.Array:
    """Return b A + c A^2 of A rounded to `dtype`; c = 0 needs no product and no rounding.

    Both terms have the same rounded A: an error dA enters as (b + 2 c A) dA, and b is negative.
    Near singular values of 1 that is -0.7 dA in KELLER, and 4.1 dA if b A were not rounded; the
    plain form then has up to twice the error in bfloat16.
    """
    if is_zero(c):
        return b * at_least_float32(gram)
    operand = products.operand(gram, dtype)
    square = products.commuting(operand, operand)
    return b * operand.astype(square.dtype) + c * square


def is_zero(c: Scalar) -> bool:
    """Whether a coefficient is known to be 0, so that its product need not be made."""
    return isinstance(c, float | int) and c == 0


def applied(m: int, n: int) -> Work:
    """Work of one product [m, m] [m, n]."""
    return Work(2 * m * m * n, operands=m * m + 2 * m * n)
