"""NorMuon: every output neuron moves by the same amount (Li et al., arXiv 2510.05491, Algorithm 1).

    v_j <- beta2 v_j + (1 - beta2) mean_i O_ij^2        O_ij <- O_ij / (sqrt(v_j) + eps)

and the matrix is rescaled to the Frobenius norm it had before. The state is one number per neuron.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_muon.matrices import paths
from optax_muon.matrices.views import Axes, BoundView, Split, Views
from optax_muon.planning import bind_views
from optax_muon.polar.normalize import safe_sqrt
from optax_muon.transforms.arguments import check_number, static_args
from optax_muon.transforms.wrappers import accumulator_dtype, reshard_like


class NorMuonState(NamedTuple):
    """State of `normuon`."""

    nu: optax.Updates
    """Mean squares of the neurons in float32 or wider: a tree like the parameters. Each leaf has
    the shape of its parameter with row axes of length 1, or one entry per matrix where the row axis
    is split."""


@static_args("views")
def normuon(
    beta2: jax.typing.ArrayLike = 0.95, eps: float = 1e-8, *, views: Views = None
) -> optax.GradientTransformation:
    """Normalize an orthogonal update per neuron, by a moving average of the mean square.

    NorMuon, arXiv 2510.05491, Algorithm 1: `v_j <- beta2 v_j + (1 - beta2) mean_i O_ij^2` and
    `O_ij <- O_ij / (sqrt(v_j) + eps)`; the matrix keeps its Frobenius norm. It comes after
    `orthogonalize` and before `scale_by_shape`: `muon(3e-4, post=normuon())`. A neuron is an output
    of the layer, a column of the view.

    Args:
        beta2: The fraction of the mean square kept at each step; the default is the paper's.
        eps: Added to the root of the mean square, which is about `1 / sqrt(max(m, n))`.
        views: Which leaves are matrices, and how; see `optax_muon.label`. Leaves without a view
            pass unchanged. None takes those of the `muon` around this link, if there is one.

    Raises:
        ValueError: `beta2` is outside of [0, 1), or `eps` is negative.
        TypeError: One of them is not a number; schedules are not.

    >>> link = normuon()
    >>> params = {"kernel": jnp.zeros((4, 2))}
    >>> rows = {"kernel": jnp.ones((4, 2)) * jnp.array([[1.0, 3.0]])}
    >>> updates, _ = link.update(rows, link.init(params))
    >>> bool(jnp.allclose(updates["kernel"], 5.0**0.5))          # equal neurons, same norm
    True
    """
    check_number("beta2", beta2, at_least=0, below=1, scheduled=False)
    check_number("eps", eps, at_least=0, scheduled=False)

    def init(params: optax.Params) -> NorMuonState:
        found = bind_views(params, views)

        def zeros(path: str, leaf: Any) -> jax.Array | optax.MaskedNode:
            bound = found.get(path)
            if bound is None:
                return optax.MaskedNode()
            # Made as `update` makes them, and so of the same type, to which shardings may belong.
            nothing = jnp.zeros_like(leaf, dtype=accumulator_dtype(leaf.dtype))
            squares = [_mean_squares(part, bound.part_rows) for part in bound.parts(nothing)]
            return _neurons(bound).join(squares)

        return NorMuonState(paths.map_named(zeros, params))

    def update(
        updates: optax.Updates, state: NorMuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NorMuonState]:
        del params
        leaves, nu = paths.named_leaves(updates), paths.named_leaves(state.nu)
        for path, bound in bind_views(updates, views).items():
            neurons, axes = _neurons(bound), (bound.part_rows, bound.part_cols)
            pairs = zip(bound.parts(leaves[path]), neurons.parts(nu[path]), strict=True)
            moved = [_normalize(part, old, *axes, beta2, eps) for part, old in pairs]
            leaves[path] = bound.join([part for part, _ in moved])
            # A state that was placed otherwise, such as whole everywhere, stays there.
            nu[path] = reshard_like(neurons.join([squares for _, squares in moved]), nu[path])
        return _like(updates, leaves), NorMuonState(_like(state.nu, nu))

    return optax.GradientTransformation(init, update)


def _like(tree: Any, leaves: dict[str, jax.Array]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), leaves.values())


def _neurons(bound: BoundView) -> BoundView:
    """Return the view of the mean squares: the parameter's, with one row."""
    shape, split = list(bound.shape), bound.split
    for axis in bound.row_axes:
        shape[axis] = 1
    if split is not None and split.axis in bound.row_axes:
        split = Split(split.axis, split.heads, split.heads)
        shape[split.axis] = split.total
    return dataclasses.replace(bound, shape=tuple(shape), split=split)


def _mean_squares(x: jax.Array, rows: Axes) -> jax.Array:
    """Return the mean square of each neuron of a part `[heads, ...]`: real numbers."""
    return jnp.mean(jnp.square(jnp.abs(x)), rows, keepdims=True)


def _normalize(
    x: jax.Array, nu: jax.Array, rows: Axes, cols: Axes, beta2: jax.typing.ArrayLike, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return the normalized part `[heads, ...]` and its new mean squares."""
    wide = x.astype(accumulator_dtype(x.dtype))
    keep = jnp.asarray(beta2, nu.dtype)
    squares = _mean_squares(wide, rows)
    nu = keep * reshard_like(nu, squares) + (1 - keep) * squares
    root = safe_sqrt(nu) + eps
    even = wide / jnp.where(root == 0, jnp.ones_like(root), root)
    before, after = (
        jnp.sum(jnp.square(jnp.abs(y)), (*rows, *cols), keepdims=True) for y in (wide, even)
    )
    ratio = safe_sqrt(before / jnp.where(after == 0, jnp.ones_like(after), after))
    return (even * ratio).astype(x.dtype), nu
