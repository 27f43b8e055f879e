r"""A product known to be symmetric on GPU: the tiles under its diagonal, each written twice.

One program computes one tile: it walks along the rows i of `a` and j of `b`, and writes the sum to
(i, j) and its transpose to (j, i). Programs that run at the same time work on eight rows of tiles
and few columns, so that their operands come from the L2 cache.

This is Pallas for Triton, which all of jax 0.8 to 0.12 have, and which warns from 0.11 on that it
will go; the interface of its successor, Mosaic GPU, has changed in between.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from optax_muon.polar.kernels.tiles import Tiles, in_batch, result_type
from optax_muon.polar.precision import outer_product

__all__ = ["symmetric_product"]

ROWS_TOGETHER = 8
"""Rows of tiles that are walked together. Of 8192 x 8192 the 132 programs of an H100 then read
8 + 17 blocks of rows at a time, which in bfloat16 takes a third of its HBM's rate; row by row they
would read 3 + 64, and take all of it."""


def symmetric_product(
    a: jax.Array, b: jax.Array, *, tiles: Tiles | None = None, interpret: bool = False
) -> jax.Array:
    r"""Return $a b^T$, known to be symmetric, at about half the operations.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (2, 40, 300))
    >>> gram = symmetric_product(x, x, interpret=True)
    >>> bool((gram == gram.mT).all()), bool(abs(gram - x @ x.mT).max() < 1e-3)
    (True, True)

    Args:
        a: Matrices [..., m, k] of bfloat16, float16 or float32; leading axes are batch. float32 is
            true float32, without tensor cores. Sides that tiles do not divide cost a copy.
        b: Matrices of the shape and dtype of `a`: `a` itself for a Gram matrix, and for the product
            of commuting symmetric matrices the other one, which is its own transpose.
        tiles: How the product is cut, in powers of two from 16; `Tiles.for_gpu` by default.
        interpret: Run on any platform, as a check: slowly, operation by operation.

    Returns:
        Products [..., m, m] in float32, summed in float32, equal to their transposes bit for bit.
        Entries above the diagonal are copies of those below; in the tiles on the diagonal both
        are the mean of the two.

    Raises:
        ValueError: `a` and `b` differ in shape, or have fewer than two axes.
        TypeError: They differ in dtype, or it is another one.
    """
    return in_batch(functools.partial(_products, tiles=tiles, interpret=interpret), a, b)


def _products(a: jax.Array, b: jax.Array, tiles: Tiles | None, interpret: bool) -> jax.Array:
    m, k = a.shape[1:]
    tiles = tiles or Tiles.for_gpu(m, k, a.dtype)
    # Triton reads whole tiles; zeros add nothing to a sum.
    past = ((0, 0), (0, -m % tiles.block), (0, -k % tiles.depth))
    a, b = jnp.pad(a, past), jnp.pad(b, past)
    products = pl.pallas_call(
        functools.partial(_tile, tiles=tiles),
        out_shape=result_type(a, b),
        # One axis: the second and third of a CUDA grid end at 65535.
        grid=(a.shape[0] * tiles.count(m),),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="symmetric_product",
    )(*tiles.places(m, ROWS_TOGETHER), a, b)
    return products[:, :m, :m]


def _tile(rows: Any, columns: Any, a: Any, b: Any, out: Any, *, tiles: Tiles) -> None:
    """Compute one tile of one product, and write it to both its places."""
    program, count = pl.program_id(0), jnp.int32(rows.size)
    item, tile = jax.lax.div(program, count), jax.lax.rem(program, count)
    row, column = rows[tile], columns[tile]
    above = pl.ds(row * tiles.block, tiles.block)
    beside = pl.ds(column * tiles.block, tiles.block)

    def add(piece: Any, total: jax.Array) -> jax.Array:
        along = pl.ds(piece * tiles.depth, tiles.depth)
        return total + outer_product(a[item, above, along], b[item, beside, along])

    zero = jnp.zeros((tiles.block, tiles.block), jnp.float32)
    total = jax.lax.fori_loop(0, a.shape[2] // tiles.depth, add, zero)

    # Branches, and not a choice of values: 168 registers a thread and not 190 (Triton 3.9, sm_90).
    @pl.when(row == column)
    def _on_diagonal() -> None:
        out[item, above, beside] = 0.5 * (total + total.T)

    @pl.when(row != column)
    def _under_diagonal() -> None:
        out[item, above, beside] = total
        out[item, beside, above] = total.T
