"""Balance of experts without an auxiliary loss, and the scale of their gates.

Each expert has a bias that affects only which experts are chosen (Wang et al., arXiv 2408.15664):
after every step it rises by a constant, the bias update speed (DeepSeek-V3, arXiv 2412.19437,
section 4.2), if the expert had less than the mean load, and falls if it had more. Moonlight
subtracts the mean of the signs, so that the biases do not drift together ("Muon is Scalable for LLM
Training", arXiv 2502.16982, appendix C):

    b_i <- b_i + speed * (sign(e_i) - mean_j sign(e_j)),    e_i = mean load - load of i

The paper's speed is 1e-3 in its first two stages and 0 in its cooldown.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 100_000
"""Random routers that `gate_scaling` averages over; its standard error at 6 of 64 is then 1e-5."""


def update_bias(
    bias: jax.Array, load: jax.Array, bias_update_speed: float | jax.Array
) -> jax.Array:
    """The router biases after a step.

    Args:
        bias: of each expert of each layer, `[.., experts]` float32.
        load: number of tokens routed to each expert in the step, `[.., experts]`; summed over the
            micro-batches.
        bias_update_speed: change of a bias in the step; for a schedule, its value at the step.

    Returns:
        The new biases; their mean is that of the old ones.

    >>> update_bias(jnp.zeros(4), jnp.array([10, 2, 2, 2]), 1e-3).tolist()  # the mean load is 4
    [-0.001500..., 0.000500..., 0.000500..., 0.000500...]
    """
    load = load.astype(jnp.float32)
    sign = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
    return bias + jnp.float32(bias_update_speed) * (sign - sign.mean(axis=-1, keepdims=True))


def imbalance(load: jax.Array) -> jax.Array:
    """The load violation MaxVio of arXiv 2408.15664, Eq. 4: largest load over mean load, less one.

    Args:
        load: number of tokens routed to each expert, `[.., experts]`.

    Returns:
        `[..]` float32; 0 if all loads are equal.

    >>> imbalance(jnp.array([10, 2, 2, 2])).item()
    1.5
    """
    load = load.astype(jnp.float32)
    return load.max(axis=-1) / load.mean(axis=-1) - 1


@functools.cache
def gate_scaling(n_routed_experts: int, num_experts_per_tok: int, *, seed: int = 0) -> float:
    """The `routed_scaling_factor` that keeps the size of a mixture's output.

    It is the mean of `1 / sqrt(sum p^2)`, where `p` are the `num_experts_per_tok` largest of
    `n_routed_experts` sigmoids of normal logits, divided by their sum (arXiv 2502.16982, appendix
    C). The mean is over `DRAWS` draws from a generator with this seed, so it is reproducible.

    >>> round(gate_scaling(64, 6), 3)
    2.446
    """
    shape = [DRAWS, n_routed_experts]
    logits = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    first = n_routed_experts - num_experts_per_tok
    largest = np.partition(logits, first, axis=1)[:, first:]
    scores = 1 / (1 + np.exp(-largest.astype(np.float64)))
    gates = scores / scores.sum(axis=1, keepdims=True)
    return float(np.mean(1 / np.sqrt((gates**2).sum(axis=1))))
