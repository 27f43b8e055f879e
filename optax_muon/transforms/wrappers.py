"""What a chain is wrapped in: trainable leaves, views settled once, precision, promotion, sharding.

Every wrapper is `_around`: the inner transformation with something done before and after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_muon.matrices import assign, paths
from optax_muon.matrices.views import View, Views
from optax_muon.planning import settled_views

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


def moment_dtype(
    dtype: jax.typing.DTypeLike, mu_dtype: jax.typing.DTypeLike | None = None
) -> jnp.dtype:
    """The dtype that a momentum is stored in: `mu_dtype`, or the complex dtype of its precision.

    >>> moment_dtype(jnp.float32, jnp.bfloat16), moment_dtype(jnp.complex64, jnp.bfloat16)
    (dtype(bfloat16), dtype('complex64'))
    >>> moment_dtype(jnp.bfloat16)
    dtype('float32')
    """
    wide = accumulator_dtype(dtype)
    if mu_dtype is None:
        return wide
    if jnp.issubdtype(wide, jnp.complexfloating):
        return promoted(jnp.dtype(mu_dtype), jnp.dtype(jnp.complex64))
    return jnp.dtype(mu_dtype)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation on float32 copies of narrower updates and parameters.

    Its accumulators become float32 (or wider) without any change to it, even when the parameters
    are stored in bfloat16 or float16. Updates come back in the dtype that gradient and parameter
    promote to, so that they have at least the parameter's precision; without `params`, in the
    dtype of the gradient.

    Args:
        inner: Any transformation.

    >>> tx = in_float32(optax.scale_by_adam())
    >>> state = tx.init({"w": jnp.ones(3, jnp.bfloat16)})
    >>> state.nu["w"].dtype
    dtype('float32')
    """

    def run(update: Update, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        if params is None:
            dtypes = jax.tree.map(lambda u: u.dtype, updates)
        else:
            dtypes = jax.tree.map(lambda u, p: promoted(u.dtype, p.dtype), updates, params)
            params = jax.tree.map(_widen, params)
        wide, state = update(jax.tree.map(_widen, updates, dtypes), state, params)
        return jax.tree.map(lambda u, dtype: u.astype(dtype), wide, dtypes), state

    return _around(inner, run, lambda params: inner.init(jax.tree.map(_widen, params)))


def with_mu_dtype(
    inner: optax.GradientTransformation, mu_dtype: jax.typing.DTypeLike | None
) -> optax.GradientTransformationExtraArgs:
    """Store the first moments `state.mu` of a transformation in this precision, complex ones too.

    Optax's own `mu_dtype` drops the imaginary part of complex moments.

    Args:
        inner: A transformation whose state has a field `mu`.
        mu_dtype: As in `moment_dtype`; None leaves the state as it is.

    >>> tx = with_mu_dtype(optax.scale_by_adam(), jnp.bfloat16)
    >>> tx.init({"w": jnp.ones(3), "z": jnp.ones(3, jnp.complex64)}).mu["w"].dtype
    dtype(bfloat16)
    """

    def stored(state: Any) -> Any:
        if mu_dtype is None:
            return state
        mu = jax.tree.map(lambda m: m.astype(moment_dtype(m.dtype, mu_dtype)), state.mu)
        return state._replace(mu=mu)

    def run(update: Update, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        wide = state if mu_dtype is None else state._replace(mu=jax.tree.map(_widen, state.mu))
        updates, state = update(updates, wide, params)
        return updates, stored(state)

    return _around(inner, run, lambda params: stored(inner.init(params)))


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
        moved = jax.tree.map(reshard_like, updates, moments(state))
        done, state = update(moved, state, params)
        return jax.tree.map(reshard_like, done, updates), state

    return _around(inner, run)


def on_trainable_leaves(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run a transformation on the floating-point leaves of trees that hold other things as well.

    An Equinox module holds functions and settings, a Flax state random keys and counters. Such
    leaves have no state. Their updates are what was given, or zero where that is an array of
    integers or JAX's float0, the gradient of an integer. Python floats count as arrays.

    A leaf of floats is frozen by None in its place both in `init` and in the gradients. Parameters
    that `update` gets may have it all the same.

    Args:
        inner: Any transformation; it sees None in the place of these leaves.

    Raises:
        ValueError: (in `update`) A leaf has no gradient, and the state was made for it.

    >>> tx = on_trainable_leaves(optax.sgd(0.5))
    >>> params = {"w": 1.0, "act": jax.nn.relu, "step": jnp.ones((), jnp.int32)}
    >>> updates, _ = tx.update(params | {"act": None}, tx.init(params), params)
    >>> float(updates["w"]), updates["act"], int(updates["step"])
    (-0.5, None, 0)
    """

    def run(update: Update, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        gradients = jax.tree.map(_trainable, updates)
        _check_gradients(gradients, state, params)
        given = updates if params is None else params
        if params is not None:
            params = jax.tree.map(
                lambda g, p: None if g is None else _trainable(p),
                gradients,
                params,
                is_leaf=_is_none,
            )
        new, state = update(gradients, state, params)
        return jax.tree.map(_put_back, updates, new, given, is_leaf=_is_none), state

    return _around(inner, run, lambda params: inner.init(jax.tree.map(_trainable, params)))


def _trainable(leaf: Any) -> Any:
    """A leaf that can be trained, as an array; None for any other."""
    if isinstance(leaf, float | complex) and not isinstance(leaf, np.generic):
        return jnp.asarray(leaf)
    return leaf if jnp.issubdtype(getattr(leaf, "dtype", np.void), jnp.inexact) else None


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _put_back(gradient: Any, new: Any, param: Any) -> Any:
    """The update of a leaf; `param` is the gradient again where there are no parameters."""
    if new is not None:
        return new
    dtype = getattr(gradient, "dtype", np.void)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.zeros_like(gradient)
    if dtype != jax.dtypes.float0:
        return gradient
    held = getattr(param, "dtype", np.void)
    if held == jax.dtypes.float0:
        # A zero of Python's, which takes the dtype of whatever it is added to.
        return jnp.broadcast_to(0, param.shape)
    # Nothing can be added to a random key.
    return gradient if jnp.issubdtype(held, jax.dtypes.extended) else jnp.zeros_like(param)


def _check_gradients(gradients: Any, state: Any, params: Any) -> None:
    """Check that no leaf that the state was made for lacks its gradient.

    Raises:
        ValueError: One does.
    """
    if not any(map(_is_none, jax.tree.leaves(gradients, is_leaf=_is_none))):
        return
    if params is None:
        leaves = paths.named_leaves(gradients, is_leaf=_is_none)
        lacking = {path for path, leaf in leaves.items() if leaf is None}
    else:
        leaves = paths.named_leaves(jax.tree.map(_trainable, params))
        lacking = leaves.keys() - paths.named_leaves(gradients).keys()
    # The path of a moment ends in that of its parameter; counts of steps are integers.
    moments = [p for p, leaf in paths.named_leaves(state).items() if _trainable(leaf) is not None]
    moved = {paths.longest_suffix(leaves, path) for path in moments}
    if trained := sorted(lacking & moved):
        raise ValueError(
            f"The gradient of {trained[0]} is None, but the state was made for it; give zeros, or"
            " None in its place to init as well."
        )


def with_settled_views(
    build: Callable[[Any, dict[str, View | None]], optax.GradientTransformation], views: Views
) -> optax.GradientTransformationExtraArgs:
    """Decide the views of a tree once, and build the chain that all of its links share them in.

    It is the outermost wrapper of an optimizer, and so it takes trees as users have them
    (`on_trainable_leaves`).

    `update` decides for its `params`, as `init` does, and for the updates where it has none: what a
    user's function says of parameters, it need not say of gradients in another dtype.

    Links used alone decide for themselves. In a chain they would each decide again, and a link
    inside `optax.partition` sees a tree in which the other optimizer's leaves are masked. Links
    without views of their own, such as a user's `normuon()`, take those of the chain around them.

    Args:
        build: Takes a tree and its `{path: view}`, None for the fallback, and returns the chain.
        views: As in `optax_muon.label`.

    >>> from optax_muon.transforms.scale import match_rms, scale_by_shape
    >>> def build(tree, settled):
    ...     return scale_by_shape(match_rms(1.5))
    >>> tx = with_settled_views(build, {"kernel": View(0, 1), "bias": None})
    >>> params = {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> float(updates["kernel"][0, 0]), float(updates["bias"][0])
    (3.0, 1.0)
    """
    # Outside of jit every step comes with the same tree: what was built for the last one is kept.
    last: dict[Hashable, tuple[dict[str, View | None], optax.GradientTransformationExtraArgs]] = {}

    def built(tree: Any) -> tuple[dict[str, View | None], optax.GradientTransformationExtraArgs]:
        leaves, structure = jax.tree.flatten(tree)
        key = (structure, *((np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves))
        if key not in last:
            # No leaves at all: `optax.tree.map_params` asks for the structure of a state.
            settled = assign.assign(tree, views) if paths.named_leaves(tree) else {}
            last.clear()
            last[key] = settled, optax.with_extra_args_support(build(tree, settled))
        return last[key]

    def init(params: optax.Params) -> optax.OptState:
        settled, chain = built(params)
        with settled_views(settled):
            return chain.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is not None:
            _check_shapes(updates, params)
        settled, chain = built(updates if params is None else params)
        with settled_views(settled):
            return chain.update(updates, state, params, **extra_args)

    return on_trainable_leaves(optax.GradientTransformationExtraArgs(init, update))


def _check_shapes(updates: optax.Updates, params: optax.Params) -> None:
    """Check that every update has the shape of its parameter.

    Raises:
        ValueError: One has another shape, or no parameter.
    """
    shapes, wanted = (list(map(np.shape, jax.tree.leaves(tree))) for tree in (updates, params))
    if shapes == wanted:
        return
    named = paths.named_leaves(params)
    for path, update in paths.named_leaves(updates).items():
        if path not in named:
            raise ValueError(f"There is an update of {path}, which is no parameter.")
        if (shape := np.shape(update)) != (right := np.shape(named[path])):
            raise ValueError(f"The update of {path} has the shape {shape}, the parameter {right}.")


def promoted(*dtypes: jnp.dtype) -> jnp.dtype:
    """What dtypes promote to, also where `jax_numpy_dtype_promotion` is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(*dtypes)


def _widen(x: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
    dtype = accumulator_dtype(x.dtype if dtype is None else dtype)
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype)
    return x.astype(dtype)


def reshard_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Give `x` the sharding of `other`, where shardings are part of the type."""
    current, wanted = jax.typeof(x).sharding, jax.typeof(other).sharding
    # From jax 0.12 on, zeros made inside a program know no mesh unless there is an ambient one.
    if wanted.mesh.empty or current.spec == wanted.spec:
        return x
    return jax.sharding.reshard(x, wanted)
