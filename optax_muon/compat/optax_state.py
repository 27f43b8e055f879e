"""Convert a state of `optax.contrib.muon` into a state of `optax_muon.muon`.

Optax keeps the average `(1 - beta) sum_k beta^k g_{t-k}`, this package the paper's sum without the
factor, so momenta are divided by `1 - beta`. Adam's moments and all counts stay as they are.
The coefficients in optax's state are dropped: here they are an option of the orthogonalizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax.contrib import MuonState

from optax_muon.matrices.paths import map_named, named_leaves
from optax_muon.transforms.momentum import MomentumState

COUNTS = ("count", "gradient_step")
"""Fields of optax's states that count the steps done; the second one is that of `MultiSteps`."""


def from_optax(
    state: optax.OptState,
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    beta: float = 0.95,
) -> optax.OptState:
    """Convert a state of `optax.contrib.muon` (or `compat.muon`) into a state of `tx`.

    Args:
        state: The state to continue from.
        tx: The `optax_muon.muon(...)` that continues. It must send the same leaves to Muon: pass
            the `muon_weight_dimension_numbers` of that run as `views=`, or, if it had none,
            `views=lambda params: jax.tree.map(lambda p: View(0, 1) if p.ndim == 2 else None,
            params)`.
        params: The parameters.
        beta: The momentum of the run that made `state`; the default is optax's.

    Returns:
        The state `tx.init(params)` would have, with momenta, Adam's moments and counts of `state`,
        in its own dtypes. What optax does not keep (such as NorMuon's second moment) starts from
        zero.

    Raises:
        ValueError: `state` has no momentum for a leaf that `tx` keeps one for.

    >>> import jax.numpy as jnp
    >>> from optax_muon.muon import muon
    >>> params = {"kernel": jnp.ones((4, 8))}
    >>> average = {"kernel": jnp.full((4, 8), 0.05)}
    >>> state = optax.tree.set(optax.contrib.muon(1e-3).init(params), mu=average)
    >>> state = from_optax(state, muon(1e-3), params)
    >>> print(optax.tree.get(state, "MomentumState").mu["kernel"][0, :3])
    [1. 1. 1.]
    """
    [theirs] = _found(state, MuonState)
    [adam] = _found(state, optax.ScaleByAdamState)

    sources = {"Muon": named_leaves(theirs.mu)}
    sources |= {kind: named_leaves(getattr(adam, kind)) for kind in ("mu", "nu")}

    def take(path: str, kind: str, group: str) -> jax.Array:
        if path not in sources[kind]:
            raise ValueError(
                f"{path} is in the {group} group and was not in optax's;"
                " pass the dimension numbers of that run as muon(views=...)."
            )
        return sources[kind][path]

    moved = filled(
        tx.init(params),
        momentum=lambda path, _: take(path, "Muon", "Muon") / (1 - beta),
        moment=lambda kind, path, _: take(path, kind, "Adam"),
    )
    return set_counts(moved, theirs.count)


def set_counts(state: optax.OptState, count: ArrayLike) -> optax.OptState:
    """A state whose every step count is this one: of schedules, Adam, and of wrappers around them.

    `optax.tree.set(state, count=...)` stops at the first one, `inject_hyperparams`' own.

    Args:
        state: Any optimizer state; counts are its int32 `[]` named `count` or `gradient_step`.
        count: How many steps were done. Each place gets a copy, so that the state can be donated.

    >>> tx = optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(1.0, 0.0, 10))
    >>> state = set_counts(tx.init(jax.numpy.ones(2)), 4)
    >>> [int(count) for _, count in optax.tree.get_all_with_path(state, "count")]
    [4, 4, 4]
    """

    def counted(path: Any, leaf: Any) -> Any:
        is_count = str(getattr(path[-1], "name", "")) in COUNTS and jnp.ndim(leaf) == 0
        return jnp.array(count, leaf.dtype) if is_count else leaf

    return jax.tree.map_with_path(counted, state)


def filled(
    state: optax.OptState,
    momentum: Callable[[str, jax.Array], jax.Array],
    moment: Callable[[str, str, jax.Array], jax.Array],
) -> optax.OptState:
    """A state of `optax_muon.muon` with its moments replaced, in its own dtypes.

    Args:
        state: A fresh state.
        momentum: `(path, leaf) -> momentum` of a parameter that Muon trains, as a sum.
        moment: `("mu" or "nu", path, leaf) -> moment` of a parameter that Adam trains.
    """

    def fill(take: Callable[[str, jax.Array], jax.Array], tree: Any) -> Any:
        return map_named(lambda path, leaf: take(path, leaf).astype(leaf.dtype), tree)

    def move(node: Any) -> Any:
        if isinstance(node, MomentumState):
            return node._replace(mu=fill(momentum, node.mu))
        if isinstance(node, optax.ScaleByAdamState):
            new = {k: fill(functools.partial(moment, k), getattr(node, k)) for k in ("mu", "nu")}
            return node._replace(**new)
        return node

    return jax.tree.map(move, state, is_leaf=_holds_moments)


def _holds_moments(node: Any) -> bool:
    return isinstance(node, MomentumState | optax.ScaleByAdamState)


def _found(state: optax.OptState, kind: type) -> list[Any]:
    """The parts of one kind in a state.

    Raises:
        ValueError: there is not exactly one, as in every state of `optax.contrib.muon`.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    found = [node for node in nodes if isinstance(node, kind)]
    if len(found) != 1:
        raise ValueError(
            f"The state has {len(found)} {kind.__name__}; a state of optax.contrib.muon has one."
        )
    return found
