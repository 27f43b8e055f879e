r"""A product known to be symmetric on TPU: the tiles under its diagonal, each written twice.

A step of the grid multiplies a piece [block, depth] of rows i of `a` with one of rows j of `b` into
a running sum in VMEM, and the steps of one tile follow each other: the last piece writes the tile
to (i, j), and one more step without a product writes its transpose to (j, i). Every entry of the
result goes to HBM once. A second pass that mirrors the lower half would read and write that half
again, two half-empty results joined by XLA cost twice that, and transfers started by hand would
have to be waited for by hand; here the pipeline that Pallas makes of block indices hides them.

The tiles' places are a table in scalar memory, so the grid has no idle steps above the diagonal.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optax_muon.polar.kernels.tiles import Tiles, in_batch, result_type
from optax_muon.polar.precision import outer_product

__all__ = ["symmetric_product"]


def symmetric_product(
    a: jax.Array, b: jax.Array, *, tiles: Tiles | None = None, interpret: bool = False
) -> jax.Array:
    r"""Return $a b^T$, known to be symmetric, at about half the operations.

    In a program of several devices jax lets a TPU kernel stand inside `shard_map` only.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (2, 40, 300))
    >>> gram = symmetric_product(x, x, interpret=True)
    >>> bool((gram == gram.mT).all()), bool(abs(gram - x @ x.mT).max() < 1e-3)
    (True, True)

    Args:
        a: Matrices [..., m, k] of bfloat16, float16 or float32; leading axes are batch. float16 is
            computed as float32, which a TPU has and float16 it has not.
        b: Matrices of the shape and dtype of `a`: `a` itself for a Gram matrix, and for the product
            of commuting symmetric matrices the other one, which is its own transpose.
        tiles: How the product is cut, in multiples of 128; `Tiles.for_tpu` by default.
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
    if a.dtype == jnp.float16:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    n, m, k = a.shape
    tiles = tiles or Tiles.for_tpu(m, k, a.dtype)
    block, depth = tiles.block, tiles.depth
    pieces = pl.cdiv(k, depth)
    rows, columns = tiles.places(m)

    def operand(place: int) -> pl.BlockSpec:
        """Rows of the tile's row (0) or column (1); the mirroring step fetches nothing new."""

        def index(item: Any, tile: Any, step: Any, *places: Any) -> tuple[Any, Any, Any]:
            return item, places[place][tile], jnp.minimum(step, pieces - 1)

        return pl.BlockSpec((None, block, depth), index)

    def result(item: Any, tile: Any, step: Any, rows: Any, columns: Any) -> tuple[Any, Any, Any]:
        row, column = rows[tile], columns[tile]
        mirror = step == pieces
        return item, jnp.where(mirror, column, row), jnp.where(mirror, row, column)

    return pl.pallas_call(
        functools.partial(_step, pieces=pieces, rest=k - (pieces - 1) * depth),
        out_shape=result_type(a, b),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(n, tiles.count(m), pieces + 1),
            in_specs=[operand(0), operand(1)],
            out_specs=pl.BlockSpec((None, block, block), result),
            scratch_shapes=[pltpu.VMEM((block, block), jnp.float32)],
        ),
        # Where a chip is two cores, as v4 and v5p are, they share the matrices and the tiles.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=n * tiles.flops(m, k),
            bytes_accessed=n * tiles.traffic(m, k, a.dtype.itemsize),
            transcendentals=0,
        ),
        interpret=interpret,
        name="symmetric_product",
    )(rows, columns, a, b)


def _step(
    rows: Any, columns: Any, a: Any, b: Any, out: Any, total: Any, *, pieces: int, rest: int
) -> None:
    """Add the product of one piece to the tile, or mirror the tile after the last.

    Rows past the end of a matrix hold anything, and so do the results in them, which are never
    written out. Columns past its end would spoil the sum: the last piece is cut to its `rest`.
    """
    tile, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(step < pieces - 1)
    def _add() -> None:
        total[...] += outer_product(a[...], b[...])

    @pl.when(step == pieces - 1)
    def _finish() -> None:
        total[...] += outer_product(a[:, :rest], b[:, :rest])
        out[...] = total[...]

    @pl.when(step == pieces)
    def _mirror() -> None:
        # A tile on the diagonal is still where it was written, and is overwritten there.
        same, mirrored = total[...], total[...].T
        out[...] = jnp.where(rows[tile] == columns[tile], 0.5 * (same + mirrored), mirrored)
