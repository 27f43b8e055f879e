"""Weight decay decoupled from the gradient: `W -= lr (O + lambda W)` (arXiv 2502.16982, Eq. 3).

The links stand between the scale and the learning rate, so decay is multiplied by the learning rate
but not by the factor of the shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_muon.matrices import entries, paths
from optax_muon.transforms.arguments import check_number, is_zero, static_args

Decay = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(update, param, rate) -> update` of one leaf."""

Mask: TypeAlias = Any
"""True where a link applies: a tree of booleans or a prefix of one, a `{path: boolean}` dict, or a
function of the parameters that returns one of these; None applies it everywhere. Every parameter
must have an entry, and every entry a parameter."""


class DecayState(NamedTuple):
    """State of the decay links."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    """Number of updates so far, for a scheduled rate: int32 `[]`."""


@static_args("mask")
def decoupled_decay(
    rate: optax.ScalarOrSchedule = 0.1, mask: Mask = None
) -> optax.GradientTransformation:
    """Add `rate * W` to the updates.

    Args:
        rate: Decay per unit of learning rate: a number, an array or a schedule of the step. 0.1 is
            the paper's.
        mask: True where decay applies, see `Mask`. None decays everything, norms too, which the
            paper calls crucial (Appendix D).

    Raises:
        ValueError: `rate` is negative; `update` is called without `params`, and the rate is not the
            number 0; (in `init` and `update`) a parameter has no entry in the mask, or an entry no
            parameter.
        TypeError: `rate` is not a number, or an entry of the mask not a boolean.

    >>> link = decoupled_decay(0.1)
    >>> params = {"w": jnp.full(2, 3.0)}
    >>> updates, _ = link.update({"w": jnp.zeros(2)}, link.init(params), params)
    >>> print(updates["w"])
    [0.3 0.3]
    """
    return _decay(rate, mask, lambda update, param, rate: update + rate * param)


@static_args("mask")
def cautious_decay(
    rate: optax.ScalarOrSchedule = 0.1, mask: Mask = None
) -> optax.GradientTransformation:
    """Add `rate * W` only where decay and update have the same sign (arXiv 2510.12402, Eq. 3).

    Complex numbers have the same sign where the real part of `update conj(W)` is not negative.

    Args:
        rate: As in `decoupled_decay`.
        mask: As in `decoupled_decay`.

    Raises:
        ValueError: As `decoupled_decay` does.
        TypeError: As `decoupled_decay` does.

    >>> link = cautious_decay(0.1)
    >>> params = {"w": jnp.array([1.0, -1.0])}
    >>> updates, _ = link.update({"w": jnp.ones(2)}, link.init(params), params)
    >>> print(updates["w"])
    [1.1 1. ]
    """

    def decay(update: jax.Array, param: jax.Array, rate: jax.Array) -> jax.Array:
        return jnp.where(jnp.real(update * param.conj()) >= 0, update + rate * param, update)

    return _decay(rate, mask, decay)


def settle_mask(mask: Mask, tree: Any) -> dict[str, bool]:
    """Return `{path: whether the link applies}` of every array in a tree.

    Args:
        mask: What the user gave, not None.
        tree: Parameters or gradients; masked leaves are left out.

    Raises:
        ValueError: A parameter has no entry, or an entry no parameter.
        TypeError: An entry is not a boolean.

    >>> settle_mask({"norm": False, "mlp": True}, {"norm": jnp.ones(2), "mlp": {"w": jnp.ones(2)}})
    {'mlp/w': True, 'norm': False}
    """
    settled = entries.broadcast(
        "weight_decay_mask",
        mask,
        tree,
        is_entry=lambda entry: isinstance(entry, bool | np.bool_),
        expected="True or False",
    )
    return {path: bool(entry) for path, entry in settled.items()}


def _decay(rate: optax.ScalarOrSchedule, mask: Mask, decay: Decay) -> optax.GradientTransformation:
    check_number("weight_decay", rate, at_least=0)
    never = is_zero(rate)

    def init(params: optax.Params) -> DecayState:
        if mask is not None:
            settle_mask(mask, params)
        return DecayState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: DecayState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, DecayState]:
        following = DecayState(optax.safe_increment(state.count))
        if never:
            return updates, following
        if params is None:
            raise ValueError(
                "Weight decay needs params: call update(updates, state, params), or set"
                " weight_decay=0.0."
            )
        now = rate(state.count) if callable(rate) else rate
        now_in = functools.cache(functools.partial(jnp.asarray, now))
        decays = None if mask is None else settle_mask(mask, params)

        def leaf(path: str, u: jax.Array | None, p: jax.Array) -> jax.Array | None:
            if u is None or (decays is not None and not decays[path]):
                return u
            return decay(u, p.astype(u.dtype), now_in(u.dtype))

        done = paths.map_named(leaf, updates, params, is_leaf=lambda node: node is None)
        return done, following

    return optax.GradientTransformation(init, update)
