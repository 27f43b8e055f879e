"""Integers that the compiler cannot know: XLA's CPU backend does things with those that it does.

It compiles a kernel for every slice at a known offset, and unrolls a loop of one turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def opaque_ints(numbers: Sequence[int], x: jax.Array) -> tuple[jax.Array, ...]:
    """Give the numbers back as int32 `[]`, from a conditional on `x` whose branches agree.

    >>> [int(number) for number in opaque_ints((3, 5), jnp.ones((2, 2, 2)))]
    [3, 5]
    """

    def same() -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(number, jnp.int32) for number in numbers)

    found: tuple[jax.Array, ...] = lax.cond(jnp.isfinite(x[(0,) * x.ndim]), same, same)
    return found
