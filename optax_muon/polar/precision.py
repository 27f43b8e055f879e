"""In which dtype the products of an iteration run, and how exactly.

Muon computes in bfloat16 on accelerators (arXiv 2502.16982, section 2.2). What is low there is
only the operands of the matrix products: sums run in float32, here called the accumulation dtype.
The platform is that of the compiled program, not of the host that traces it, so a TPU program
compiled on a laptop gets bfloat16. The iterations are in `plain.py` and `gram.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_muon.platforms import get_platform

_REAL = ("bfloat16", "float16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")


def on_platform(
    polynomial: Callable[[jax.Array, jnp.dtype, str], jax.Array],
    x: jax.Array,
    dtype: DTypeLike | None,
    platform: str | None = None,
) -> jax.Array:
    """Apply `polynomial` to `x` in the dtype asked for, or in the one of the target platform.

    Args:
        polynomial: Takes `x`, the dtype that it shall round operands to, and the platform: `tpu`,
            `gpu` or `cpu`.
        x: In float32 at least.
        dtype: None means bfloat16 on TPU and GPU and the dtype of `x` on CPU. Complex numbers
            have no short form and are computed in complex64 at least on every platform.
        platform: The target; None traces the polynomial for all of them.

    Returns:
        The result in the dtype of `x`.
    """

    def on(platform: str) -> Callable[[jax.Array], jax.Array]:
        compute = compute_dtype(dtype, x.dtype, platform)
        return lambda x: polynomial(x, compute, platform).astype(x.dtype)

    if platform is not None:
        return on(platform)(x)
    gpu = on("gpu")
    chosen: jax.Array = jax.lax.platform_dependent(
        x, tpu=on("tpu"), cuda=gpu, rocm=gpu, default=on("cpu")
    )
    return chosen


def compute_dtype(dtype: DTypeLike | None, given: DTypeLike, platform: str) -> jnp.dtype:
    """Return what numbers of dtype `given` are multiplied in.

    >>> compute_dtype(None, "float32", "tpu").name, compute_dtype(None, "float32", "cpu").name
    ('bfloat16', 'float32')

    Args:
        dtype: What is asked for; None leaves it to the platform.
        given: float32 or wider, real or complex.
        platform: `tpu`, `gpu` or `cpu`.

    Raises:
        TypeError: `dtype` is not a float dtype to compute in.
    """
    given = jnp.dtype(given)
    if dtype is None:
        default = get_platform(platform).compute_dtype
        return default if default.itemsize < 4 and given.kind != "c" else given
    asked = jnp.dtype(dtype)
    complex_input = jnp.issubdtype(given, jnp.complexfloating)
    if asked.name not in _REAL + (_COMPLEX if complex_input else ()):
        raise TypeError(f"dtype={asked.name} was given, one of {', '.join(_REAL)} is accepted.")
    if not complex_input:
        return asked
    return jnp.dtype(jnp.complex128 if jnp.finfo(asked).bits == 64 else jnp.complex64)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Widen half precision to float32; leave wider numbers as they are."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def adjoint(x: jax.Array) -> jax.Array:
    """Conjugate and transpose the last two axes."""
    return jnp.conj(x.mT)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply [..., m, k] by [..., k, n], summing in float32 at least."""
    return _contract(a, b, over=(-1, -2))


def outer_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b^H of [..., m, k] and [..., n, k], summed in float32 at least."""
    return _contract(a, jnp.conj(b), over=(-1, -1))


def inner_product(a: jax.Array) -> jax.Array:
    """Return a^H a of [..., n, m], summed in float32 at least."""
    return _contract(jnp.conj(a), a, over=(-2, -2))


def identity_like(gram: jax.Array) -> jax.Array:
    """Return an identity for each square matrix of [..., m, m]."""
    rows, cols = (
        jax.lax.broadcasted_iota(jnp.int32, gram.shape, gram.ndim + axis) for axis in (-2, -1)
    )
    return (rows == cols).astype(gram.dtype)


def _contract(a: jax.Array, b: jax.Array, *, over: tuple[int, int]) -> jax.Array:
    """Sum over these axes of a and b, matrix by matrix."""
    # By default a TPU rounds float32 operands to bfloat16; an explicit float32 request must stay
    # float32. bfloat16 operands are exact in one pass.
    short = a.dtype == jnp.bfloat16
    precision = jax.lax.Precision.DEFAULT if short else jax.lax.Precision.HIGHEST
    wide = jnp.float32 if jnp.finfo(a.dtype).bits < 32 else a.dtype
    batch = tuple(range(a.ndim - 2))
    axes = (((a.ndim + over[0],), (b.ndim + over[1],)), (batch, batch))
    # `jnp.einsum` makes the same program, and takes 1 ms to trace.
    done: jax.Array = jax.lax.dot_general(
        a, b, axes, precision=precision, preferred_element_type=wide
    )
    return done
