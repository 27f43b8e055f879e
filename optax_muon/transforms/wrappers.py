"""What a chain is wrapped in: precision, dtype promotion, sharding, and views settled once.

Every wrapper is `_around`: the inner transformation with something done before and after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_muon.matrices import assign, paths
from optax_muon.matrices.views import View, Views

Update = Callable[..., tuple[optax.Updates, optax.OptState]]
"""`update(updates, state, params)` of a transformation."""


def _around(
    inner: optax.GradientTransformation,
    run: Callable[..., tuple[optax.Updates, optax.OptState]],
    init: optax.TransformInitFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose update is `run(inner_update, updates, state, params)`."""
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return run(functools.partial(inner.update, **extra_args), updates, state, params)

    return optax.GradientTransformationExtraArgs(init or inner.init, update)


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Float32 for narrower floats, else the dtype itself.

    >>> accumulator_dtype(jnp.bfloat16), accumulator_dtype(jnp.complex64)
    (dtype('float32'), dtype('complex64'))
    """
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32 if narrow else dtype)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation on float32 copies of narrower updates and parameters.

    Its accumulators become float32 (or wider) without any change to it, even when the parameters
    are stored in bfloat16 or float16. Updates come back in the dtype of the gradients.

    Args:
        inner: Any transformation.

    >>> tx = in_float32(optax.scale_by_adam())
    >>> state = tx.init({"w": jnp.ones(3, jnp.bfloat16)})
    >>> state.nu["w"].dtype
    dtype('float32')
    """

    def run(update: Update, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        wide_params = None if params is None else jax.tree.map(_widen, params)
        wide, state = update(jax.tree.map(_widen, updates), state, wide_params)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), wide, updates), state

    return _around(inner, run, lambda params: inner.init(jax.tree.map(_widen, params)))


def under_standard_promotion(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run a transformation of another package under JAX's standard dtype promotion.

    Optax's Adam raises a float to an integer count, which `jax_numpy_dtype_promotion="strict"`
    forbids.

    Args:
        inner: Any transformation.

    >>> tx = under_standard_promotion(optax.scale_by_adam())
    >>> with jax.numpy_dtype_promotion("strict"):
    ...     updates, _ = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
    """

    def run(update: Update, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return update(updates, state, params)

    return _around(inner, run)


def with_state_sharding(
    moments: Callable[[Any], optax.Updates], inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Run a transformation where its moments lie, and bring the updates back.

    With ZeRO-1 on Explicit mesh axes the sharding is part of the type: a gradient replicated over
    the data axis cannot be added to a momentum that is sharded over it. On Auto axes the compiler
    takes care of that.

    Args:
        moments: Takes the transformation's state and returns its moments: a tree like the updates.
        inner: The transformation.

    >>> tx = with_state_sharding(lambda state: state.trace, optax.trace(0.9))
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    """

    def run(update: Update, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        moved = jax.tree.map(_reshard_like, updates, moments(state))
        done, state = update(moved, state, params)
        return jax.tree.map(_reshard_like, done, updates), state

    return _around(inner, run)


def with_settled_views(
    build: Callable[[dict[str, View | None]], optax.GradientTransformation], views: Views
) -> optax.GradientTransformationExtraArgs:
    """Decide the views of a tree once, and build the chain that all of its links share them in.

    Links used alone decide for themselves. In a chain they would each decide again, and a link
    inside `optax.partition` sees a tree in which the other optimizer's leaves are masked.

    Args:
        build: Takes `{path: view}`, None for the fallback, and returns the chain.
        views: As in `optax_muon.label`.

    >>> from optax_muon.transforms.scale import match_rms, scale_by_shape
    >>> tx = with_settled_views(lambda views: scale_by_shape(match_rms(1.5), views=views), None)
    >>> params = {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> float(updates["kernel"][0, 0]), float(updates["bias"][0])
    (3.0, 1.0)
    """

    def built(tree: Any) -> optax.GradientTransformationExtraArgs:
        # No leaves at all: `optax.tree.map_params` asks for the structure of a state.
        settled = assign.assign(tree, views) if paths.named_leaves(tree) else {}
        return optax.with_extra_args_support(build(settled))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return built(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: built(params).init(params), update)


def _widen(x: Any) -> Any:
    dtype = accumulator_dtype(x.dtype)
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype)
    return x.astype(dtype)


def _reshard_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Give `x` the sharding of `other`, where shardings are part of the type."""
    current, wanted = jax.typeof(x).sharding, jax.typeof(other).sharding
    # From jax 0.12 on, zeros made inside a program know no mesh unless there is an ambient one.
    if wanted.mesh.empty or current.spec == wanted.spec:
        return x
    return jax.sharding.reshard(x, wanted)
