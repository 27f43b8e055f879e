"""Balance of experts without an auxiliary loss, and the scale of their gates.

Each expert has a bias that only helps to choose it (Wang et al., arXiv 2408.15664): after every
step it rises by `rate` where the expert had less than the mean load, and falls where it had more.
Moonlight subtracts the mean of the signs, so that the biases do not drift together ("Muon is
Scalable for LLM Training", arXiv 2502.16982, appendix C):

    b_i <- b_i + rate * (sign(e_i) - mean_j sign(e_j)),    e_i = mean load - load of i

The rate is 1e-3 in its first two stages and 0 in its cooldown.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 100_000
"""Routers drawn for the gate scale: at 6 of 64 its standard error is then 1e-5."""


def update_bias(bias: jax.Array, load: jax.Array, rate: float | jax.Array) -> jax.Array:
    """The biases after a step.

    Args:
        bias: of each expert of each layer, `[.., experts]` float32.
        load: how often each was chosen in the step, `[.., experts]`; of several micro-batches the
            sum.
        rate: change of a bias in a step; a schedule is called by the caller, `rate(step)`.

    Returns:
        The new biases; their mean is that of the old ones.

    >>> update_bias(jnp.zeros(4), jnp.array([10, 2, 2, 2]), 1e-3).tolist()  # 6 too many, 2 too few
    [-0.001500..., 0.000500..., 0.000500..., 0.000500...]
    """
    load = load.astype(jnp.float32)
    sign = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
    return bias + jnp.float32(rate) * (sign - sign.mean(axis=-1, keepdims=True))


def imbalance(load: jax.Array) -> jax.Array:
    """The largest load of an expert over the mean, less one, per layer (arXiv 2408.15664, Eq. 4).

    >>> imbalance(jnp.array([10, 2, 2, 2])).item()
    1.5
    """
    load = load.astype(jnp.float32)
    return load.max(axis=-1) / load.mean(axis=-1) - 1


@functools.cache
def gate_scaling(experts: int, chosen: int, *, seed: int = 0) -> float:
    """The factor by which the gates of a mixture are scaled to keep the size of its output.

    It is the mean of `1 / sqrt(sum p^2)`, where `p` are the `chosen` largest of `experts` sigmoids
    of normal logits, divided by their sum (arXiv 2502.16982, appendix C). The mean is over
    `DRAWS` draws from a generator with this seed, so the same numbers give the same factor.

    >>> round(gate_scaling(64, 6), 3)
    2.446
    """
    logits = np.random.default_rng(seed).standard_normal([DRAWS, experts], dtype=np.float32)
    largest = np.partition(logits, experts - chosen, axis=1)[:, experts - chosen :]
    scores = 1 / (1 + np.exp(-largest.astype(np.float64)))
    gates = scores / scores.sum(axis=1, keepdims=True)
    return float(np.mean(1 / np.sqrt((gates**2).sum(axis=1))))
