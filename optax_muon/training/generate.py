"""Text generation: tokens drawn one by one from a trained model."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from optax_muon.models.spec import Model

Carry = tuple[jax.Array, jax.Array]
"""The window of tokens, at most `context` of them, and how many are filled."""


def generate(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    prompt: Sequence[int],
    length: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Draw `length` tokens that continue the prompt.

    Args:
        model: The model.
        params: The parameters.
        bias: The router biases; None if the model has no router.
        prompt: The tokens to continue, at least one; the model sees the last `context` of them.
        length: Tokens to generate.
        temperature: Divides the logits; 0 takes the likeliest token.
        seed: Seed of the draws.

    Returns:
        The new tokens, without the prompt.
    """
    seen = prompt[-model.config.context :]
    # No longer than it can become: every token costs a pass over the whole window.
    size = min(model.config.context, len(seen) + length)
    window = jnp.zeros([size], jnp.int32).at[: len(seen)].set(jnp.array(seen, jnp.int32))
    count = jnp.asarray(len(seen), jnp.int32)
    keys = jax.random.split(jax.random.key(seed), length)
    tokens: list[int] = _draw(model, params, bias, window, count, keys, temperature).tolist()
    return tokens


@functools.partial(jax.jit, static_argnums=(0, 6))
def _draw(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    window: jax.Array,
    count: jax.Array,
    keys: jax.Array,
    temperature: float,
) -> jax.Array:
    """Scan over new tokens: the window fills up, then slides; tokens after `count` are ignored."""

    def write(carry: Carry, key: jax.Array) -> tuple[Carry, jax.Array]:
        window, count = carry
        last = model.forward(params, window[None], bias)[0][0, count - 1]
        token = _choose(key, last, temperature).astype(jnp.int32)
        full = count == window.size
        window = jnp.where(full, jnp.roll(window, -1), window)
        count = jnp.where(full, count, count + 1)
        return (window.at[count - 1].set(token), count), token

    _, tokens = jax.lax.scan(write, (window, count), keys)
    return tokens


def _choose(key: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    if temperature == 0:
        return jnp.argmax(logits)
    return jax.random.categorical(key, logits / temperature)
