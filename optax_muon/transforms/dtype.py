"""Precision of the chain: accumulate in float32 or wider, answer in the gradients' own dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Float32 for narrower floats, else the dtype itself.

    >>> at_least_float32(jnp.bfloat16), at_least_float32(jnp.complex64)
    (dtype('float32'), dtype('complex64'))
    """
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32 if narrow else dtype)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation on float32 copies of narrower updates, and cast what it returns back.

    Its accumulators become float32 (or wider) without a word from it, also when the parameters are
    stored in bfloat16 or float16.

    Args:
      inner: any transformation.

    >>> tx = in_float32(optax.scale_by_adam())
    >>> state = tx.init({"w": jnp.ones(3, jnp.bfloat16)})
    >>> state.nu["w"].dtype
    dtype('float32')
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        wide_params = None if params is None else jax.tree.map(_widen, params)
        wide, state = inner.update(jax.tree.map(_widen, updates), state, wide_params, **extra_args)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), wide, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: inner.init(jax.tree.map(_widen, params)), update
    )


def under_standard_promotion(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run a transformation of another package under JAX's ordinary promotion of dtypes.

    Optax's Adam raises a float to an integer count, which `jax_numpy_dtype_promotion="strict"`
    forbids.

    Args:
      inner: any transformation.

    >>> tx = under_standard_promotion(optax.scale_by_adam())
    >>> with jax.numpy_dtype_promotion("strict"):
    ...     updates, _ = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _widen(x: Any) -> Any:
    dtype = at_least_float32(x.dtype)
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype)
    return x.astype(dtype)
