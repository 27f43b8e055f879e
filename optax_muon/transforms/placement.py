"""Gradients meet moments that lie elsewhere: ZeRO-1 on meshes whose axes are Explicit.

There the sharding is part of the type, and a gradient that is copied over the data axis cannot be
added to a momentum that is cut over it. On Auto axes the compiler sees to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax


def beside(
    moments: Callable[[Any], optax.Updates], inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Run a transformation where its moments lie, and bring what it returns back.

    Args:
      moments: takes the transformation's state, returns its moments: a tree like the updates.
      inner: the transformation.

    >>> import jax.numpy as jnp
    >>> tx = beside(lambda state: state.trace, optax.trace(0.9))
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        there = jax.tree.map(_lay_like, updates, moments(state))
        done, state = inner.update(there, state, params, **extra_args)
        return jax.tree.map(_lay_like, done, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _lay_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Give `x` the sharding of `other`, where shardings are part of the type."""
    here, there = jax.typeof(x).sharding, jax.typeof(other).sharding
    # From jax 0.12 on, zeros made inside a program know no mesh unless there is an ambient one.
    if there.mesh.empty or here.spec == there.spec:
        return x
    return jax.reshard(x, there)
