r"""Newton-Schulz: the nearest orthogonal matrix, by matrix products alone.

Let $X = U \Sigma V^T$. Muon replaces it by (approximately) its polar factor $U V^T$, the direction
of steepest descent in the spectral norm. No decomposition is needed: with

$$X_0 = X / (s \|X\|_F), \qquad X_k = a_k X_{k-1} + b_k A X_{k-1} + c_k A^2 X_{k-1},
\qquad A = X_{k-1} X_{k-1}^T,$$

the singular vectors stay and every singular value $\sigma$ becomes
$p_N(\dots p_1(\sigma / (s \|X\|_F)))$, which a good table of coefficients (`coefficients.py`) sends
close to 1. A is as small as the short side, so tall matrices are transposed first.

How the polynomial is evaluated is a form: step by step (`plain.py`) or on the Gram matrix
(`gram.py`), with symmetric products computed in full or in half (`symmetric.py`). All forms give
the same update; `selection.py` chooses one. The paper is "Muon is Scalable for LLM Training", arXiv
2502.16982, section 2.1. The exact factor is in `exact.py`.

`NewtonSchulz` and `GramNewtonSchulz` hold the settings, compute, and count the work that a plan
prices. `newton_schulz` and `gram_newton_schulz` are the same as plain functions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from optax_muon.platforms import get_platform
from optax_muon.polar.coefficients import KELLER, Coefficients, Row
from optax_muon.polar.gram import Gram
from optax_muon.polar.normalize import as_matrices, normalize, normalize_in_first_step
from optax_muon.polar.precision import (
    adjoint,
    at_least_float32,
    compute_dtype,
    on_platform,
)
from optax_muon.polar.reductions import ALL_COLUMNS, ColumnShards
from optax_muon.polar.selection import Form, choose_form, for_tall, full_products
from optax_muon.polar.work import Work

__all__ = ["GramNewtonSchulz", "NewtonSchulz", "gram_newton_schulz", "newton_schulz"]


@dataclasses.dataclass(frozen=True)
class _Iteration(abc.ABC):
    """A table of steps with a rule that chooses their form: enough to compute and to count."""

    coefficients: Coefficients = KELLER
    """The table of steps."""
    steps: int | None = None
    """How many steps, where the table leaves a choice; None takes it as it is."""
    dtype: DTypeLike | None = None
    """What the operands of the products are rounded to; None leaves it to the platform."""

    supports_column_shards: ClassVar[bool] = True
    """Whether `__call__` takes matrices whose columns lie on several devices."""
    supports_platform: ClassVar[bool] = True
    """Whether `__call__` takes the platform that it is traced for."""

    @abc.abstractmethod
    def form_for(
        self, m: int, n: int, *, dtype: DTypeLike, platform: str, devices: int = 1
    ) -> Form:
        """Choose the form for matrices [m, n], m <= n, whose columns lie on so many devices."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """The coefficients of every step."""
        return self.coefficients.take(self.steps)

    def __call__(
        self,
        x: ArrayLike,
        /,
        column_shards: ColumnShards = ALL_COLUMNS,
        platform: str | None = None,
    ) -> jax.Array:
        """Orthogonalize [..., m, n]; see `newton_schulz`.

        Args:
            x: The matrices.
            column_shards: The devices that hold their columns.
            platform: What it is traced for, `tpu`, `gpu` or `cpu`; None is any of them.
        """
        rows = self.rows

        safety, devices = self.coefficients.safety, column_shards.size

        def polynomial(x: jax.Array, dtype: jnp.dtype, platform: str) -> jax.Array:
            rows_here, columns = x.shape[-2], x.shape[-1] * devices
            tall = devices == 1 and rows_here > columns
            m, n = (columns, rows_here) if tall else (rows_here, columns)
            form = self.form_for(m, n, dtype=dtype, platform=platform, devices=devices)
            if tall and (lying := for_tall(form)) is not None:
                form, tall = lying, False
            # Otherwise the polynomial sees wide matrices.
            x = adjoint(x) if tall else x
            # Entries of 1 make Gram matrices of entries up to n, and float16 ends at 65504.
            divided = dtype == jnp.float16 or jnp.iscomplexobj(x)
            if get_platform(platform).operand_barrier and not divided:
                largest_is_one, steps = normalize_in_first_step(
                    x, rows, dtype, safety, column_shards
                )
                y = form(largest_is_one, steps, column_shards)
            else:
                y = form(normalize(x, safety, column_shards).astype(dtype), rows, column_shards)
            y = y.astype(x.dtype)
            return adjoint(y) if tall else y

        x = as_matrices(x)
        return on_platform(polynomial, at_least_float32(x), self.dtype, platform).astype(x.dtype)

    def count(self, m: int, n: int, devices: int = 1, *, platform: str) -> Work:
        """Count the work on one float32 matrix.

        Args:
            m: Rows. A tall matrix counts as its transpose, which is what is computed.
            n: Columns.
            devices: How many devices the columns lie on.
            platform: `tpu`, `gpu` or `cpu`.

        Returns:
            The work of one of the devices.

        Raises:
            ValueError: `platform` is unknown.
        """
        m, n = sorted((m, n))
        dtype = compute_dtype(self.dtype, jnp.float32, platform)
        form = self.form_for(m, n, dtype=dtype, platform=platform, devices=devices)
        return form.count(m, n, self.rows, devices)


@dataclasses.dataclass(frozen=True)
class NewtonSchulz(_Iteration):
    """`newton_schulz` with its settings.

    >>> orthogonalizer = NewtonSchulz(steps=5)
    >>> orthogonalizer(jnp.eye(4, 8)).shape
    (4, 8)
    >>> orthogonalizer.count(512, 2048, platform="gpu").form
    'Gram 3'
    """

    form: Form | None = None
    """How the polynomial is evaluated; None chooses by the modelled time on the target."""

    def form_for(
        self, m: int, n: int, *, dtype: DTypeLike, platform: str, devices: int = 1
    ) -> Form:
        """Return the form asked for, or choose one."""
        return self.form or choose_form(
            m, n, self.rows, dtype=dtype, platform=platform, devices=devices
        )


@dataclasses.dataclass(frozen=True)
class GramNewtonSchulz(_Iteration):
    """`gram_newton_schulz` with its settings.

    >>> GramNewtonSchulz().count(512, 2048, platform="cpu").form
    'Gram 2'
    """

    restarts: tuple[int, ...] | None = None
    """Steps, counted from 0, before which the Gram matrix is formed anew; None takes
    `default_restarts` of the compute dtype."""

    def __post_init__(self) -> None:
        if self.restarts is not None:
            object.__setattr__(self, "restarts", tuple(self.restarts))

    def form_for(
        self, m: int, n: int, *, dtype: DTypeLike, platform: str, devices: int = 1
    ) -> Form:
        """Return the Gram form, whatever the shape."""
        products = full_products(platform, dtype)
        return Gram.with_default_restarts(len(self.rows), dtype, self.restarts, products)


def newton_schulz(
    x: ArrayLike,
    /,
    coefficients: Coefficients = KELLER,
    *,
    steps: int | None = None,
    dtype: DTypeLike | None = None,
    form: Form | None = None,
    column_shards: ColumnShards = ALL_COLUMNS,
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
            closer to 1 at the same cost.
        steps: How many steps, where the table leaves a choice; None takes it as it is.
        dtype: What the operands of the products are rounded to. None is bfloat16 on TPU and
            GPU, as in the paper, and on CPU the input's dtype, float32 at least. Sums run in
            float32 at least. An explicit float32 is true float32 on every platform. bfloat16 takes
            twice the time of float32 on a CPU without bfloat16 instructions, half of it with them.
        form: How the polynomial is evaluated, `Plain()` or `Gram(restarts)`; None takes the
            form that takes least time on these shapes and this platform, by its model.
        column_shards: The devices that hold the columns of these matrices; `x` is then the local
            part [..., m, n / size] of matrices with m <= n. By default all columns are here.

    Returns:
        Matrices of the shape and dtype of `x`.

    Raises:
        ValueError: `steps` does not fit the table, or `x` has fewer than two axes.
        TypeError: `x` is not floating point, or `dtype` is not a float dtype to compute in.

    Source: arXiv 2502.16982, section 2.1, Eq. 2.
    """
    return NewtonSchulz(coefficients, steps, dtype, form)(x, column_shards)


def gram_newton_schulz(
    x: ArrayLike,
    /,
    coefficients: Coefficients = KELLER,
    *,
    steps: int | None = None,
    dtype: DTypeLike | None = None,
    restarts: Sequence[int] | None = None,
    column_shards: ColumnShards = ALL_COLUMNS,
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
            `default_restarts`. Fewer restarts are cheaper and can diverge in half precision.
        column_shards: The devices that hold the columns of these matrices, as for
            `newton_schulz`. They communicate one sum per Gram matrix: 1 + restarts.

    Returns:
        Matrices of the shape and dtype of `x`.

    Raises:
        ValueError: `steps` or `restarts` does not fit, or `x` has fewer than two axes.
        TypeError: `x` is not floating point, or `dtype` is not a float dtype to compute in.

    Source: Dao-AILab, gram-newton-schulz, 2026.
    """
    frozen = None if restarts is None else tuple(restarts)
    return GramNewtonSchulz(coefficients, steps, dtype, frozen)(x, column_shards)
