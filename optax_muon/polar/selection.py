"""The choice of a form: how the polynomial is evaluated, by the work it takes on the target.

Counted in Python before anything is traced, from the shape, the table, the compute dtype and the
target platform. A plan calls the function that `newton_schulz` calls, so what it prints is what
runs.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_muon.platforms import get_platform
from optax_muon.polar.coefficients import Row
from optax_muon.polar.gram import Gram
from optax_muon.polar.plain import Plain
from optax_muon.polar.reductions import ALL_COLUMNS, ColumnShards
from optax_muon.polar.symmetric import AS_STORED, BARRIER, FULL, Panels, Products
from optax_muon.polar.work import Work

__all__ = ["Form", "choose_form"]


class Form(Protocol):
    """A way to evaluate the polynomial."""

    def __call__(
        self, x: jax.Array, rows: Sequence[Row], column_shards: ColumnShards = ALL_COLUMNS
    ) -> jax.Array:
        """Send wide matrices [..., m, n] of norm below 1 through the steps."""

    def count(self, m: int, n: int, rows: Sequence[Row], devices: int = 1) -> Work:
        """Count one matrix [m, n], m <= n, its columns on so many devices."""


GAIN, GAIN_SHORT_ON_CPU = 0.9, 0.75
"""Fraction of the plain form's work that the Gram form must stay below.

The Gram form saves operations and squares the condition number, so it must save a tenth at least.
In float32 on CPUs 0.88 of the operations take 0.92 to 0.97 of the time from 64 x 128 to 256 x 512,
and 0.78 of them 0.8. With bfloat16 operands on CPUs it rounds more often than it saves
(`benchmarks/orthogonalize_speed.py`).
"""


def choose_form(
    m: int,
    n: int,
    rows: Sequence[Row],
    *,
    dtype: DTypeLike,
    platform: str,
    devices: int = 1,
) -> Form:
    """Choose the form for matrices [m, n], m <= n.

    >>> from optax_muon.polar import KELLER
    >>> str(choose_form(1024, 1024, KELLER.rows, dtype="float32", platform="cpu"))
    'plain, 4 panels'
    >>> str(choose_form(1024, 4096, KELLER.rows, dtype="bfloat16", platform="gpu"))
    'Gram 3'

    Args:
        m: Rows.
        n: Columns.
        rows: The steps.
        dtype: What the operands of the products are rounded to.
        platform: `tpu`, `gpu` or `cpu`.
        devices: How many devices the columns lie on.

    Raises:
        ValueError: `platform` is unknown.
    """
    dtype = jnp.dtype(dtype)
    plain = Plain(_products(m, dtype, platform, least=3, most=4), looped=platform == "cpu")
    exchange = get_platform(platform).flops_per_byte
    halves = _products(m, dtype, platform, least=2, most=8)
    gram = Gram.with_default_restarts(len(rows), dtype, products=halves)

    def price(form: Form) -> float:
        count = form.count(m, n, rows, devices)
        # A ring sum carries a matrix twice, a gather once.
        sent = m * m * (8 * count.sums + dtype.itemsize * count.gathers) * (devices - 1) / devices
        return count.flops + exchange * sent

    short = platform == "cpu" and jnp.finfo(dtype).bits < 32
    gain = GAIN_SHORT_ON_CPU if short else GAIN
    return gram if price(gram) < gain * price(plain) else plain


def _products(m: int, dtype: jnp.dtype, platform: str, *, least: int, most: int) -> Products:
    """Choose how symmetric products are made: in panels of 256 rows, if there are enough.

    In float32 on two cores four panels take 0.86 of the time of full products at 1024 x 1024, and
    0.75 in the Gram form at 1024 x 4096; with bfloat16 operands mirroring costs more than it saves,
    1.1 to 1.3 (`benchmarks/orthogonalize_speed.py`).

    Kernels are opt-in, `form=Plain(Kernel("tpu"))`: no accelerator has timed them yet, and in a
    program of several devices JAX accepts one inside `shard_map` only.
    """
    count = min(most, m // 256)
    halved = platform == "cpu" and jnp.finfo(dtype).bits >= 32 and count >= least
    return Panels(count) if halved else full_products(platform, dtype)


def full_products(platform: str, dtype: DTypeLike) -> Products:
    """Return how the platform computes a product of operands of this dtype in full."""
    if get_platform(platform).operand_barrier:
        return BARRIER
    # Half precision needs the symmetry that a b^H restores.
    return AS_STORED if platform == "cpu" and jnp.finfo(dtype).bits >= 32 else FULL
