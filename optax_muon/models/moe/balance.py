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
        bias: Of each expert of each layer, `[.., experts]` float32.
        load: Number of tokens routed to each expert in the step, `[.., experts]`; summed over the
            micro-batches. Integers are compared exactly, however large; floats are rounded to
            float32.
        bias_update_speed: Change of a bias in the step; for a schedule, its value at the step.

    Returns:
        The new biases; their mean is that of the old ones.

    >>> update_bias(jnp.zeros(4), jnp.array([10, 2, 2, 2]), 1e-3).tolist()  # the mean load is 4
    [-0.001500..., 0.000500..., 0.000500..., 0.000500...]
    """
    sign = jnp.sign(_below_mean(load)).astype(jnp.float32)
    return bias + jnp.float32(bias_update_speed) * (sign - sign.mean(axis=-1, keepdims=True))


def imbalance(load: jax.Array) -> jax.Array:
    """The load violation MaxVio of arXiv 2408.15664, Eq. 4: largest load over mean load, less one.

    Args:
        load: Number of tokens routed to each expert, `[.., experts]`.

    Returns:
        `[..]` float32; 0 if all loads are equal, also if all are 0.

    >>> imbalance(jnp.array([10, 2, 2, 2])).item()
    1.5
    """
    above = -_below_mean(load).min(axis=-1)
    mean = load.astype(jnp.float32).mean(axis=-1)
    return jnp.where(mean > 0, above / jnp.where(mean > 0, mean, 1.0), 0.0)


def _below_mean(load: jax.Array) -> jax.Array:
    """Mean load less load, `[.., experts]` float32: zero, or of the right sign, for any integers.

    float32 has 24 bits, so loads of 2^24 and 2^24 + 1 would be equal; and their sum may not fit
    32 bits. So the mean is found as a whole number and a rest, `sum = experts * whole + rest`.
    """
    if not jnp.issubdtype(load.dtype, jnp.integer):
        load = load.astype(jnp.float32)
        return load.mean(axis=-1, keepdims=True) - load
    experts = load.shape[-1]
    load = load if load.dtype.itemsize >= 4 else load.astype(jnp.int32)
    rests = (load % experts).sum(axis=-1, keepdims=True, dtype=load.dtype)
    whole = (load // experts).sum(axis=-1, keepdims=True, dtype=load.dtype) + rests // experts
    rest = (rests % experts).astype(jnp.float32) / experts
    # Both differences are kept from wrapping round, which unsigned ones would.
    more = jnp.where(whole > load, whole - load, 0).astype(jnp.float32)
    less = jnp.where(load > whole, load - whole, 0).astype(jnp.float32)
    return more - less + rest


@functools.cache
def gate_scaling(n_routed_experts: int, num_experts_per_tok: int, *, seed: int = 0) -> float:
    """The `routed_scaling_factor` that keeps the size of a mixture's output.

    It is the mean of `1 / sqrt(sum p^2)`, where `p` are the `num_experts_per_tok` largest of
    `n_routed_experts` sigmoids of normal logits, divided by their sum (arXiv 2502.16982, appendix
    C). The mean is over `DRAWS` draws from a generator with this seed, so it is reproducible.

    Raises:
        ValueError: a token goes to no expert, or to more than there are.

    >>> round(gate_scaling(64, 6), 3)
    2.446
    """
    if not 1 <= num_experts_per_tok <= n_routed_experts:
        raise ValueError(
            f"num_experts_per_tok is {num_experts_per_tok}, it must be at least 1 and at most"
            f" n_routed_experts, {n_routed_experts}"
        )
    shape = [DRAWS, n_routed_experts]
    logits = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    first = n_routed_experts - num_experts_per_tok
    largest = np.partition(logits, first, axis=1)[:, first:]
    scores = 1 / (1 + np.exp(-largest.astype(np.float64)))
    gates = scores / scores.sum(axis=1, keepdims=True)
    return float(np.mean(1 / np.sqrt((gates**2).sum(axis=1))))
