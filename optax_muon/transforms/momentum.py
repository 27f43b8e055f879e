"""Momentum in the paper's sum form, with Nesterov's look-ahead (arXiv 2502.16982, Eq. 1).

    M_t = beta M_{t-1} + g_t          U_t = g_t + beta M_t   (Nesterov)   or   U_t = M_t

`U` has exactly the direction that it has in the averaging form, `M_t = beta M_{t-1} + (1 - beta)
g_t`, and orthogonalization keeps only the direction.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_muon.transforms.arguments import check_mu_dtype, check_number, static_args
from optax_muon.transforms.wrappers import accumulator_dtype, moment_dtype, promoted


class MomentumState(NamedTuple):
    """State of `scale_by_momentum`."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    """Number of updates so far, for a scheduled beta: int32 `[]`."""
    mu: optax.Updates
    """The momentum, with the shapes and shardings of the parameters."""


@static_args("mu_dtype")
def scale_by_momentum(
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Replace gradients by their momentum, summed in float32 or wider (arXiv 2502.16982, Eq. 1).

    Args:
        beta: The fraction of the momentum kept at each step, in [0, 1]; a number, an array or a
            schedule of the step. 0.95 is the paper's.
        nesterov: Whether to look one step ahead; the paper does.
        mu_dtype: Dtype that the momentum is stored in. None keeps float32, or float64 for float64
            gradients, whatever the parameters are stored in. Complex momenta stay complex, at
            least in complex64. Sums are as wide as this, if it is wider than float32.

    Returns:
        A transformation whose updates are `g + beta M` with Nesterov and `M` without, where
        `M <- beta M + g`.

    Raises:
        ValueError: `beta` is a number outside of [0, 1].
        TypeError: `beta` is not a number, or `mu_dtype` not a dtype of real floating-point numbers.

    >>> tx = scale_by_momentum(beta=0.5)
    >>> state = tx.init(jnp.zeros(()))
    >>> updates, state = tx.update(jnp.ones(()), state)        # M = 1, U = 1 + 0.5 M
    >>> float(updates)
    1.5
    """
    check_number("beta", beta, at_least=0, at_most=1)
    check_mu_dtype(mu_dtype)

    def init(params: optax.Params) -> MomentumState:
        def zeros(p: Any) -> jax.Array:
            return jnp.zeros_like(p, dtype=moment_dtype(p.dtype, mu_dtype))

        return MomentumState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: optax.Updates, state: MomentumState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MomentumState]:
        del params
        rate = beta(state.count) if callable(beta) else beta
        # Once for all leaves: making an array takes longer to trace than the sum.
        rate_in = functools.cache(functools.partial(jnp.asarray, rate))

        def accumulate(g: jax.Array, m: jax.Array) -> jax.Array:
            dtype = promoted(accumulator_dtype(g.dtype), m.dtype)
            return rate_in(dtype) * m.astype(dtype) + g.astype(dtype)

        mu = jax.tree.map(accumulate, updates, state.mu)
        ahead = jax.tree.map(accumulate, updates, mu) if nesterov else mu
        ahead = jax.tree.map(lambda u, g: u.astype(accumulator_dtype(g.dtype)), ahead, updates)
        stored = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        return ahead, MomentumState(optax.safe_increment(state.count), stored)

    return optax.GradientTransformation(init, update)
