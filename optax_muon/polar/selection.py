"""The choice of a form: how the polynomial is evaluated, by the time it takes on the target.

Modelled in Python before anything is traced, from the work of each form, which the shape, the table
and the compute dtype decide, and the rates of the target (`platforms.py`). A plan calls the
function that `newton_schulz` calls, so what it prints is what runs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_muon.platforms import get_platform
from optax_muon.polar.coefficients import Row
from optax_muon.polar.gram import Gram
from optax_muon.polar.plain import Plain, Step
from optax_muon.polar.reductions import ALL_COLUMNS, ColumnShards
from optax_muon.polar.symmetric import (
    AS_STORED,
    BARRIER,
    FULL,
    TALL_BARRIER,
    Panels,
    Products,
)
from optax_muon.polar.work import Work

__all__ = ["Form", "choose_form"]


class Form(Protocol):
    """A way to evaluate the polynomial."""

    def __call__(
        self, x: jax.Array, rows: Sequence[Step], column_shards: ColumnShards = ALL_COLUMNS
    ) -> jax.Array:
        """Send wide matrices [..., m, n] of norm below 1 through the steps."""

    def count(self, m: int, n: int, rows: Sequence[Row], devices: int = 1) -> Work:
        """Count one matrix [m, n], m <= n, its columns on so many devices."""


GAIN = 0.95
"""Fraction of the plain form's time that the Gram form must stay below: it squares the condition
number, and the model of the time is off by a few percent."""


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
    target = get_platform(platform)
    rates = target.rates_for(dtype)

    def seconds(form: Form) -> float:
        count = form.count(m, n, rows, devices)
        # A ring sum carries a matrix twice, a gather once.
        sent = m * m * (8 * count.sums + dtype.itemsize * count.gathers) * (devices - 1) / devices
        return rates.product_seconds(count) + sent / target.bandwidth

    plain = min(
        (Plain(each, looped=platform == "cpu") for each in _products(m, platform, dtype, (4,))),
        key=seconds,
    )
    gram = min(
        (
            Gram.with_default_restarts(len(rows), dtype, products=each)
            for each in _products(m, platform, dtype, (2, 4, 8))
        ),
        key=seconds,
    )
    return gram if seconds(gram) < GAIN * seconds(plain) else plain


def _products(m: int, platform: str, dtype: DTypeLike, counts: Sequence[int]) -> list[Products]:
    """List how symmetric products may be made: in full, and on CPUs in panels of 192 rows or more.

    Kernels are opt-in, `form=Plain(Kernel("tpu"))`: no accelerator has timed them yet, and in a
    program of several devices JAX accepts one inside `shard_map` only.
    """
    full = full_products(platform, dtype)
    panels = max((count for count in counts if m >= 192 * count), default=1)
    return [full, Panels(panels)] if platform == "cpu" and panels > 1 else [full]


def full_products(platform: str, dtype: DTypeLike) -> Products:
    """Return how the platform computes a product of operands of this dtype in full."""
    if get_platform(platform).operand_barrier:
        return BARRIER
    # Half precision needs the symmetry that a b^H restores.
    return AS_STORED if platform == "cpu" and jnp.finfo(dtype).bits >= 32 else FULL


def for_tall(form: Form) -> Form | None:
    """Return the form that takes tall matrices as they lie; None where they are turned first."""
    if isinstance(form, Plain | Gram) and form.products == BARRIER:
        return dataclasses.replace(form, products=TALL_BARRIER)
    return None
