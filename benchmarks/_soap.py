"""SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioner, as a baseline.

`L` and `R` are averages of `G G^T` and `G^T G`; their eigenvectors are found once by `eigh`, and
then followed by a step of orthogonal iteration every `EVERY` updates, as in section 4 there.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

BETA1, BETA2, EPSILON, EVERY = 0.95, 0.95, 1e-8, 10


class Moments(NamedTuple):
    """The state of a stack of matrices `[..., m, n]`."""

    mu: jax.Array
    """Average of the gradients."""
    nu: jax.Array
    """Average of their squares in the eigenbasis."""
    left: jax.Array
    """Average of `G G^T`, `[..., m, m]`."""
    right: jax.Array
    """Average of `G^T G`, `[..., n, n]`."""
    rows: jax.Array
    """Eigenvectors of `left`, as columns."""
    cols: jax.Array
    """Eigenvectors of `right`."""


class SoapState(NamedTuple):
    """State of `scale_by_soap`."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    """Number of updates."""
    moments: optax.Updates
    """`Moments` of each leaf."""


def scale_by_soap() -> optax.GradientTransformation:
    """Adam in the eigenbasis of Shampoo's preconditioner, for trees of `[..., m, n]`."""

    def init(params: optax.Params) -> SoapState:
        def zeros(p: jax.Array) -> Moments:
            *batch, m, n = p.shape
            square = [jnp.zeros((*batch, side, side)) for side in (m, n)]
            return Moments(jnp.zeros_like(p), jnp.zeros_like(p), *square, *square)

        return SoapState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: optax.Updates, state: SoapState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SoapState]:
        del params
        count = state.count + 1
        moments = jax.tree.map(
            lambda g, before: _follow(g, before, state.count), updates, state.moments
        )
        steps = jax.tree.map(lambda _, each: _step(each, count), updates, moments)
        return steps, SoapState(count, moments)

    return optax.GradientTransformation(init, update)


def _follow(g: jax.Array, before: Moments, count: jax.Array) -> Moments:
    """The moments after a gradient."""
    left = BETA2 * before.left + (1 - BETA2) * g @ g.mT
    right = BETA2 * before.right + (1 - BETA2) * g.mT @ g

    def basis(matrix: jax.Array, old: jax.Array) -> jax.Array:
        return jax.lax.cond(
            count == 0,
            lambda: jnp.linalg.eigh(matrix)[1],
            lambda: jax.lax.cond(
                count % EVERY == 0, lambda: jnp.linalg.qr(matrix @ old)[0], lambda: old
            ),
        )

    rows, cols = basis(left, before.rows), basis(right, before.cols)
    turned = rows.mT @ g @ cols
    return Moments(
        mu=BETA1 * before.mu + (1 - BETA1) * g,
        nu=BETA2 * before.nu + (1 - BETA2) * turned**2,
        left=left,
        right=right,
        rows=rows,
        cols=cols,
    )


def _step(moments: Moments, count: jax.Array) -> jax.Array:
    """Adam's step, with both averages corrected for their start at zero."""
    rows, cols = moments.rows, moments.cols
    mu = rows.mT @ moments.mu @ cols / (1 - BETA1**count)
    nu = moments.nu / (1 - BETA2**count)
    return rows @ (mu / (jnp.sqrt(nu) + EPSILON)) @ cols.mT
