"""The choice of a form: the same polynomial, evaluated otherwise where that saves enough.

Counted in Python before anything is traced, from the shape, the table, the compute dtype and the
target platform. A plan asks the same function that `newton_schulz` asks, so what it prints is what
runs.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_muon.polar.coefficients import Row
from optax_muon.polar.gram import Gram
from optax_muon.polar.plain import Plain
from optax_muon.polar.reductions import WHOLE, ColumnShards
from optax_muon.polar.symmetric import FULL, Panels, Products
from optax_muon.polar.work import Work

__all__ = ["Form", "choose"]


class Form(Protocol):
    """A way to evaluate the polynomial."""

    def __call__(
        self, x: jax.Array, rows: Sequence[Row], column_shards: ColumnShards = WHOLE
    ) -> jax.Array:
        """Send wide matrices [..., m, n] of norm below 1 through the steps."""

    def count(self, m: int, n: int, rows: Sequence[Row], devices: int = 1) -> Work:
        """Count one matrix [m, n], m <= n, its columns on so many devices."""


GAIN, GAIN_TRANSPOSING = 0.9, 0.75
"""Share of the plain form's work that the Gram form must stay below.

It saves operations and squares the condition number; a tenth is the least to take that for. On CPUs
a transpose, which it needs in every step unless products are mirrored, takes as long as one product
of 128 x 128 or four of 512 x 512: there 0.88 of the operations take 1.2 times as long, 0.67 of them
0.8.
"""

EXCHANGE: Mapping[str, int] = MappingProxyType({"tpu": 1000, "gpu": 1300, "cpu": 40})
"""Operations that a device does while one byte arrives from another: v5p 459 TFLOP/s and 600 GB/s,
H100 990 and 450, fake devices of one CPU about 100 GFLOP/s and 2.5 GB/s."""


def choose(
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
    >>> str(choose(1024, 1024, KELLER.rows, dtype="float32", platform="cpu"))
    'plain, 4 panels'
    >>> str(choose(1024, 4096, KELLER.rows, dtype="bfloat16", platform="gpu"))
    'Gram 3'

    Args:
        m: Rows.
        n: Columns.
        rows: The steps.
        dtype: What the operands of the products are rounded to.
        platform: `tpu`, `gpu` or `cpu`.
        devices: How many devices the columns lie on.
    """
    dtype = jnp.dtype(dtype)
    plain = Plain(_products(m, dtype, platform, least=3, most=4))
    halves = _products(m, dtype, platform, least=2, most=8)
    gram = Gram.of(len(rows), dtype, products=halves)

    def price(form: Form) -> float:
        count = form.count(m, n, rows, devices)
        # A ring sum carries a matrix twice, a gather once.
        sent = m * m * (8 * count.sums + dtype.itemsize * count.gathers) * (devices - 1) / devices
        return count.flops + EXCHANGE[platform] * sent

    transposing = platform == "cpu" and halves == FULL
    gain = GAIN_TRANSPOSING if transposing else GAIN
    return gram if price(gram) < gain * price(plain) else plain


def _products(m: int, dtype: jnp.dtype, platform: str, *, least: int, most: int) -> Products:
    """Choose how symmetric products are made: in panels of 256 rows, if there are enough.

    Measured on two cores in float32 against whole products: the plain form takes 0.86 in four
    panels at 1024 x 1024, 0.88 in three at 768, and 1.0 in two at 512; the Gram form 0.8 in two at
    512 x 1408 and in three at 768 x 2048, 0.75 in four at 1024 x 4096. Panels of 128 rows are 5 to
    15 % slower again and take twice as long to compile. bfloat16 multiplies so fast there that
    mirroring costs more than it saves (1.1 to 1.3).

    Kernels are for whoever asks, `form=Plain(Kernel("tpu"))`: no accelerator has timed them yet,
    and in a program of several devices jax lets one stand inside `shard_map` only.
    """
    count = min(most, m // 256)
    halved = platform == "cpu" and jnp.finfo(dtype).bits >= 32 and count >= least
    return Panels(count) if halved else FULL
