r"""Products that are known to be symmetric, at about half the work.

Most products of the iteration are known to be symmetric: $X X^T$, $A^2$, and all products of
polynomials of one symmetric matrix, which commute. XLA has no such product (cuBLAS calls it
`syrkx`, LAPACK `gemmtr`), so half of each is computed twice. Here it is computed in panels of rows,
each only up to the diagonal,

$$C_{ij} = A_i B_j^T \;(j \le i), \qquad C_{ji} = C_{ij}^T,$$

which is (t + 1) / 2t of the work with t panels, or by a kernel that skips tiles (`kernels/`). The
mirrored result is symmetric to the last bit. A form of the iteration holds one of these objects,
chosen in `selection.py`; it also says how the operands of products are rounded.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_muon.polar.kernels.tiles import Tiles
from optax_muon.polar.precision import adjoint, inner_product, outer_product, product
from optax_muon.polar.work import Work


class Products(Protocol):
    """A way to compute a b^H, given that the result is Hermitian."""

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply a and b, both [..., m, k], to [..., m, m]; summed in float32 at least."""

    def gram(self, x: jax.Array) -> jax.Array:
        """Return x x^H of [..., m, n]."""
        return self(x, x)

    def apply(self, q: jax.Array, x: jax.Array) -> jax.Array:
        """Multiply x, [..., m, n], from its short side by q, [..., m, m]."""
        return product(q, x)

    def commuting(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply Hermitian a and b, both [..., m, m], that commute up to rounding."""
        return self(a, b)

    def from_right(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return a b for Hermitian b and a b, which is b a^H."""
        return self(b, a)

    def operand(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Round to `dtype` what products are about to read; the compiler may do it as they read."""
        return x.astype(dtype)

    def symmetrize(self, c: jax.Array) -> jax.Array:
        """Remove the skew part that rounding may have left in a sum of such products."""

    def flops(self, m: int, k: int) -> int:
        """Operations of one product, a multiply-add counted as two."""

    def work(self, m: int, k: int) -> Work:
        """Work of one product."""
        return Work(self.flops(m, k), operands=2 * m * k + m * m)

    def turned(self, m: int) -> int:
        """Numbers that two products of commuting [m, m] and symmetrizing a third transpose."""
        return 0


@dataclasses.dataclass(frozen=True)
class Full(Products):
    """Compute all of it, as any other product."""

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply a and b, both [..., m, k], to [..., m, m]."""
        return outer_product(a, b)

    def symmetrize(self, c: jax.Array) -> jax.Array:
        """Return the mean of c and c^H."""
        return 0.5 * (c + adjoint(c))

    def flops(self, m: int, k: int) -> int:
        """Operations of one product."""
        return 2 * m * m * k

    def turned(self, m: int) -> int:
        """Numbers that are transposed: an operand of each product, and the result."""
        return 3 * m * m

    def __str__(self) -> str:
        return ""


FULL: Products = Full()
"""Compute the full product."""


@dataclasses.dataclass(frozen=True)
class AsStored(Full):
    """Full products that read Hermitian operands as they are stored.

    XLA transposes a copy of b for a b^H: on CPUs 9 x (128 x 344) take 1.2 times as long in the Gram
    form.
    """

    def commuting(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply as stored."""
        return product(a, b)

    def from_right(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply as stored."""
        return product(a, b)

    def turned(self, m: int) -> int:
        """Numbers that are transposed: the result."""
        return m * m


AS_STORED: Products = AsStored()
"""Compute the full product, of Hermitian operands as they are stored."""


@dataclasses.dataclass(frozen=True)
class Barrier(AsStored):
    """Products as stored for TPUs, whose operands are rounded behind an optimization barrier.

    XLA for TPU rounds operands as it reads them if it may, and then every tile of the result reads
    and rounds float32: by the compiler's estimate a product of 4096 x 4096 takes 1.4 million cycles
    of a v5p, and 0.55 million after a barrier.
    """

    def turned(self, m: int) -> int:
        """None: the result stays as it is."""
        return 0

    def operand(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Round to `dtype` before any product reads it, or adds it.

        A product that adds float32 takes 0.84 million cycles instead of 0.55.
        """
        return x if x.dtype == dtype else jax.lax.optimization_barrier(x.astype(dtype))

    def symmetrize(self, c: jax.Array) -> jax.Array:
        """Return c: its transpose is a pass of its own, of a third of a product of 4096 x 4096.

        Multiplied as stored, from the left and then from the right, c is as near to symmetric as
        its entries are rounded: the Gram form keeps 0.8 to 1.7 times the error of the plain one.
        """
        return c


BARRIER: Products = Barrier()
"""Compute the full product, of operands that are rounded first."""


@dataclasses.dataclass(frozen=True)
class TallBarrier(Barrier):
    """The same for tall matrices [..., n, m], which stay as they lie.

    Turned to wide ones and back, 7168 x 2048 on a v5p takes a copy of 0.17 million cycles more.
    """

    def gram(self, x: jax.Array) -> jax.Array:
        """Return x^H x of [..., n, m]."""
        return inner_product(x)

    def apply(self, q: jax.Array, x: jax.Array) -> jax.Array:
        """Multiply x, [..., n, m], from its short side by q, [..., m, m]."""
        return product(x, q)


TALL_BARRIER: Products = TallBarrier()
"""The same for tall matrices as they lie."""


class _Mirrored(Products, Protocol):
    """Products whose upper half is copied from the lower: they have no skew part."""

    def symmetrize(self, c: jax.Array) -> jax.Array:
        """Return c, which has no skew part."""
        return c


@dataclasses.dataclass(frozen=True)
class Panels(_Mirrored):
    """In panels of rows, each up to the diagonal and mirrored.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(12.0).reshape(4, 3)
    >>> bool((Panels(2)(x, x) == x @ x.T).all())
    True
    >>> Panels(2).flops(4, 3) / Full().flops(4, 3)
    0.75
    """

    count: int
    """Panels of a square product, at most; all have the same height. Twice as many where the sums
    are twice as long."""

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply a and b, both [..., m, k], to [..., m, m]."""
        m, k = a.shape[-2:]
        height = m // self._panels(m, k)
        starts = range(0, m, height)
        panels = [
            outer_product(a[..., start : start + height, :], b[..., : start + height, :])
            for start in starts
        ]
        # All corners in one array: one kernel per corner would take twice as long to compile.
        corners = jnp.stack([panel[..., -height:] for panel in panels])
        corners = jax.lax.optimization_barrier(0.5 * (corners + adjoint(corners)))
        rows = []
        for index, start in enumerate(starts):
            below = [panel[..., start : start + height] for panel in panels[index + 1 :]]
            row = [panels[index][..., :start], corners[index], *map(adjoint, below)]
            rows.append(jnp.concatenate(row, axis=-1))
        return jnp.concatenate(rows, axis=-2)

    def flops(self, m: int, k: int) -> int:
        """Operations of one product: (t + 1) / 2t of all for t panels."""
        t = self._panels(m, k)
        return m * m * k * (t + 1) // t

    def work(self, m: int, k: int) -> Work:
        """Work of one product: each panel reads b up to the diagonal, and the result is mirrored.

        Mirroring cuts, turns and joins.
        """
        t = self._panels(m, k)
        read = m * k * (t + 1) // 2 if t > 1 else m * k
        return Work(
            self.flops(m, k),
            operands=read + m * k + m * m,
            passes=3 * m * m if t > 1 else 0,
        )

    def _panels(self, m: int, k: int) -> int:
        most = self.count if k < 2 * m else 2 * self.count
        return max(t for t in range(1, most + 1) if m % t == 0)

    def __str__(self) -> str:
        return f"{self.count} panels"


KERNEL_TILES: Mapping[str, Callable[[int, int, DTypeLike], Tiles]] = MappingProxyType(
    {"tpu": Tiles.for_tpu, "gpu": Tiles.for_gpu}
)
"""How each kernel cuts a product; `kernels/` has a module of the same name for each."""


@dataclasses.dataclass(frozen=True)
class Kernel(_Mirrored):
    """By a kernel that computes the tiles on and under the diagonal and writes each twice."""

    platform: str
    """A key of `KERNEL_TILES`: `tpu` or `gpu`."""

    def __post_init__(self) -> None:
        if self.platform not in KERNEL_TILES:
            raise ValueError(
                f"no kernel is written for the platform {self.platform!r}; there are kernels for "
                f"{', '.join(KERNEL_TILES)}."
            )

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply a and b, both [..., m, k], to [..., m, m]."""
        # Pallas takes up to a second to import, and most programs do not need it.
        kernel = importlib.import_module(f"optax_muon.polar.kernels.{self.platform}")
        c: jax.Array = kernel.symmetric_product(a, b)
        return c

    def flops(self, m: int, k: int) -> int:
        """Operations of one product: those of the tiles that the kernel computes."""
        return KERNEL_TILES[self.platform](m, k, jnp.bfloat16).flops(m, k)

    def __str__(self) -> str:
        return "kernel"
