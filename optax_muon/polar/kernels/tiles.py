"""How a kernel cuts a product known to be symmetric, and what that costs.

A result [m, m] is cut into square tiles, of which the kernels compute those on and under the
diagonal: T (T + 1) / 2 of T^2. Small tiles waste little on the diagonal, large ones read their
operands less often.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from optax_muon.polar.precision import outer_product

MIB = 2**20


@dataclass(frozen=True)
class Tiles:
    """How the products [m, k] x [k, m] of one call are cut.

    >>> tiles = Tiles.for_tpu(4096, 14336, "bfloat16")
    >>> tiles, tiles.count(4096)
    (Tiles(block=1024, depth=256), 10)
    >>> tiles.flops(4096, 14336) / (2 * 4096**2 * 14336)
    0.625
    """

    block: int
    """Rows and columns of a tile of the result."""
    depth: int
    """Columns of the operands that are multiplied at a time."""

    @classmethod
    def for_tpu(cls, m: int, k: int, dtype: DTypeLike) -> "Tiles":
        """Return the fastest cut by flops and traffic, of those that fit any TPU since v4.

        A tile of bfloat16 must be large: v6e does 560 flops in the time of a byte of HBM, v5e 240,
        v5p 187, and a tile does block / 2 with every byte that it reads. Counted for 4096 x 14336,
        the cut for 560 takes 0.76 of the time of a whole product on v6e, and the one for 240 1.31;
        on v5e and v5p they take 0.62 and 0.56. Up to m = 1024 it is one tile, and nothing is saved.
        """
        # The MXU multiplies bfloat16; float32 takes six products of pieces.
        passes, itemsize = (1, 2) if jnp.dtype(dtype) == jnp.bfloat16 else (6, 4)

        def price(tiles: "Tiles") -> float:
            return max(passes * tiles.flops(m, k), 560 * tiles.traffic(m, k, itemsize))

        blocks = range(128, min(1024, _multiple(m, 128)) + 1, 128)
        depths = {
            block: min(_depth_in_vmem(block, itemsize), _multiple(k, 128)) for block in blocks
        }
        return min((cls(block, depth) for block, depth in depths.items() if depth), key=price)

    @classmethod
    def for_gpu(cls, m: int, k: int, dtype: DTypeLike) -> "Tiles":
        """Return the cut for tensor cores: 128 x 128 results, of 128 bytes of each row at a time.

        Three such pieces of both operands in flight fill 96 KiB of shared memory, of the 227 of an
        H100 and the 99 of the smallest NVIDIA GPU with bfloat16. The powers of two are Triton's.
        """
        wide = 128 // jnp.dtype(dtype).itemsize
        return cls(min(128, _power_of_two(m)), min(wide, _power_of_two(k)))

    def side(self, m: int) -> int:
        """Return how many tiles cover m rows."""
        return -(-m // self.block)

    def count(self, m: int) -> int:
        """Return how many tiles of a result [m, m] are computed."""
        return self.side(m) * (self.side(m) + 1) // 2

    def flops(self, m: int, k: int) -> int:
        """Return the operations of one product; every tile counts whole."""
        return 2 * self.count(m) * self.block**2 * k

    def traffic(self, m: int, k: int, itemsize: int) -> int:
        """Return the bytes of one product to and from memory, where no cache keeps operands."""
        return 2 * self.count(m) * self.block * k * itemsize + 4 * m**2

    def places(self, m: int, group: int = 1) -> NDArray[np.int32]:
        """Return the row and the column of every tile computed, as [2, count].

        Args:
            m: Rows of the result.
            group: How many rows of tiles are walked together, column by column: neighbours then
                share `group` rows of one operand and few of the other.
        """
        row, column = np.tril_indices(self.side(m))
        order = np.lexsort((row, column, row // group))
        return np.stack([row[order], column[order]]).astype(np.int32)


def in_batch(
    kernel: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array, b: jax.Array
) -> jax.Array:
    """Apply `kernel`, a function of matrices [n, m, k], to [..., m, k].

    Raises:
        ValueError: `a` and `b` differ in shape, or have fewer than two axes.
        TypeError: They differ in dtype, or it is none that the kernels multiply.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"symmetric_product: shapes {a.shape} and {b.shape} were given, two of the same"
            " [..., m, k] are accepted."
        )
    if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(
            f"symmetric_product: dtypes {a.dtype} and {b.dtype} were given, two of the same of"
            " bfloat16, float16 and float32 are accepted."
        )
    *batch, m, k = a.shape
    if a.size == 0:
        return jnp.zeros((*batch, m, m), jnp.float32)
    return kernel(a.reshape(-1, m, k), b.reshape(-1, m, k)).reshape(*batch, m, m)


def result_type(a: jax.Array, b: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the type of the products of [n, m, k]; inside `shard_map` it varies as they do."""
    return jax.eval_shape(outer_product, a, b)


def _depth_in_vmem(block: int, itemsize: int) -> int:
    """Return the columns that fit beside a tile, 1024 at most; 0 where none do.

    The smallest limit for the VMEM of a kernel is 16 MiB, on v4 all there is. Two are left to
    libtpu, which adds up to 1.1 to these 14 (bfloat16 in blocks of 896, v4).
    """
    # The running sum, and the result's window twice: one is written out while the other is filled.
    left = 14 * MIB - 3 * 4 * block**2
    # Both operands' windows, twice each; float32 is split into pieces of bfloat16 besides.
    column = block * (2 * 2 * itemsize + (20 if itemsize == 4 else 0))
    return max(0, min(1024, left // column // 128 * 128))


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _power_of_two(size: int) -> int:
    """Return the power of two from `size` on, 16 at least: the smallest side of a `tl.dot`."""
    return max(16, 1 << (size - 1).bit_length())
