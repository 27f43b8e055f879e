"""Weight decay decoupled from the gradient: `W -= lr (O + lambda W)` (arXiv 2502.16982, Eq. 3).

The links stand between the scale and the learning rate, so decay is multiplied by the learning rate
but not by the factor of the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_muon.matrices import paths

Decay = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(update, param, rate) -> update` of one leaf."""

Mask: TypeAlias = Any
"""True where a link applies: a tree of booleans or a prefix of one, or a function of the parameters
that returns such a tree; None applies it everywhere."""


class DecayState(NamedTuple):
    """State of the decay links."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    """Number of updates so far, for a scheduled rate: int32 `[]`."""


def decoupled_decay(
    rate: optax.ScalarOrSchedule = 0.1, mask: Mask = None
) -> optax.GradientTransformation:
    """Add `rate * W` to the updates.

    Args:
        rate: Decay per unit of learning rate: a number, an array or a schedule of the step. 0.1 is
            the paper's.
        mask: True where decay applies: a tree of booleans or a prefix of one, or a callable of the
            parameters that returns such a tree. None decays everything, norms too, which the paper
            calls crucial (Appendix D).

    Raises:
        ValueError: `update` is called without `params`.

    >>> link = decoupled_decay(0.1)
    >>> params = {"w": jnp.full(2, 3.0)}
    >>> updates, _ = link.update({"w": jnp.zeros(2)}, link.init(params), params)
    >>> print(updates["w"])
    [0.3 0.3]
    """
    return _decay(rate, mask, lambda update, param, rate: update + rate * param)


def cautious_decay(
    rate: optax.ScalarOrSchedule = 0.1, mask: Mask = None
) -> optax.GradientTransformation:
    """Add `rate * W` only where decay and update have the same sign (arXiv 2510.12402, Eq. 3).

    Args:
        rate: As in `decoupled_decay`.
        mask: As in `decoupled_decay`.

    Raises:
        ValueError: `update` is called without `params`.

    >>> link = cautious_decay(0.1)
    >>> params = {"w": jnp.array([1.0, -1.0])}
    >>> updates, _ = link.update({"w": jnp.ones(2)}, link.init(params), params)
    >>> print(updates["w"])
    [1.1 1. ]
    """

    def decay(update: jax.Array, param: jax.Array, rate: jax.Array) -> jax.Array:
        return jnp.where(update * param >= 0, update + rate * param, update)

    return _decay(rate, mask, decay)


def _decay(rate: optax.ScalarOrSchedule, mask: Mask, decay: Decay) -> optax.GradientTransformation:
    def init(params: optax.Params) -> DecayState:
        del params
        return DecayState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: DecayState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, DecayState]:
        if params is None:
            raise ValueError("Weight decay needs params: call update(updates, state, params).")
        now = rate(state.count) if callable(rate) else rate
        decays = _decays(params, mask)

        def leaf(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
            if not decays(paths.path_name(path)):
                return u
            return decay(u, p.astype(u.dtype), jnp.asarray(now, u.dtype))

        new = jax.tree.map_with_path(leaf, updates, params)
        return new, DecayState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _decays(params: optax.Params, mask: Mask) -> Callable[[str], bool]:
    """Return the mask as a function of the path; a path that no entry covers decays."""
    if mask is None:
        return lambda path: True
    # A mask made from an equinox module is a tree that can be called; a function is a leaf.
    is_function = callable(mask) and jax.tree_util.all_leaves([mask])
    entries = paths.named_leaves(mask(params) if is_function else mask)

    def decays(path: str) -> bool:
        entry = paths.longest_prefix(entries, path)
        return entry is None or bool(entries[entry])

    return decays
