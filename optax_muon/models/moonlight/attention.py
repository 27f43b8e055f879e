"""Multi-head latent attention, and the statistics of its logits."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from optax_muon.models.layers import Linear, RMSNorm, Rotations, deinterleave, rotate
from optax_muon.models.moonlight.config import MoonlightConfig

LATENT_EPS = 1e-6
"""Epsilon of the norms of latents: the published code does not pass `rms_norm_eps` on to them."""

HIGH_LOGIT = 100.0
"""Attention logits above it are counted (arXiv 2502.16982, section 3.3, figure 7)."""

HeadStats = tuple[jax.Array, jax.Array]
"""A block's `ForwardStats.max_logits` and `ForwardStats.high_logits`, `[heads]` each."""


class LatentAttention(nn.Module):
    """Causal multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    config: MoonlightConfig
    """The sizes."""

    @nn.compact
    def __call__(self, x: jax.Array, angles: Rotations) -> tuple[jax.Array, HeadStats]:
        """Attend over `x`, `[b, t, hidden_size]`."""
        config, (b, t, _) = self.config, x.shape
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        q = self._to_heads(config.queries, config.qk_head_dim)(self._query_input(x))
        q_nope, q_rope = jnp.split(q.reshape(b, t, heads, -1), [nope], axis=-1)
        latent = self._linear("kv_a_proj", config.kv_lora_rank + config.qk_rope_head_dim)(x)
        latent, k_rope = jnp.split(latent, [config.kv_lora_rank], axis=-1)
        latent = RMSNorm(LATENT_EPS, name="kv_a_norm")(latent)
        kv = self._to_heads("kv_b_proj", nope + config.v_head_dim)(latent)
        k_nope, v = jnp.split(kv.reshape(b, t, heads, -1), [nope], axis=-1)
        q_rope, k_rope = self._rotate(q_rope, angles), self._rotate(k_rope[:, :, None], angles)
        k_rope = jnp.broadcast_to(k_rope, (b, t, heads, config.qk_rope_head_dim))
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)
        y, stats = attention(q, k, v, config.query_block)
        output = Linear(config.hidden_size, config.dtype, rows="tensor", name="o_proj")
        return output(y.reshape(b, t, -1)), stats

    def _query_input(self, x: jax.Array) -> jax.Array:
        """What the heads' queries are computed from: a normalized latent, or the input."""
        if self.config.q_lora_rank is None:
            return x
        latent = self._linear("q_a_proj", self.config.q_lora_rank)(x)
        return RMSNorm(LATENT_EPS, name="q_a_norm")(latent)

    def _linear(self, name: str, features: int) -> Linear:
        return Linear(features, self.config.dtype, name=name)

    def _to_heads(self, name: str, features: int) -> Linear:
        """A linear layer with this many features per head."""
        columns = self.config.num_attention_heads * features
        return Linear(columns, self.config.dtype, cols="tensor", name=name)

    def _rotate(self, x: jax.Array, angles: Rotations) -> jax.Array:
        return rotate(deinterleave(x) if self.config.rope_interleave else x, angles)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, query_block: int
) -> tuple[jax.Array, HeadStats]:
    """Causal attention, and the statistics of its logits.

    Args:
        q: Queries, `[b, t, heads, d]`.
        k: Keys, `[b, t, heads, d]`.
        v: Values, `[b, t, heads, e]`.
        query_block: Queries whose logits, `[query_block, b, heads, t]` in float32, are in memory at
            once; the backward pass computes them again. Keys after the last query of a block are
            left out.

    Returns:
        `[b, t, heads, e]`, and for each head the largest logit and the share above `HIGH_LOGIT`.
    """
    queries = q.swapaxes(0, 1)
    outputs: list[jax.Array] = []
    stats: list[list[jax.Array]] = []
    for start in range(0, q.shape[1], query_block):
        stop = min(start + query_block, q.shape[1])
        if outputs:  # One block after the other, or the logits of several are in memory at once.
            queries, k, v, outputs[-1] = jax.lax.optimization_barrier((queries, k, v, outputs[-1]))
        attend = functools.partial(_attend, k[:, :stop], v[:, :stop])
        y, *of_block = jax.vmap(attend)(queries[start:stop], jnp.arange(start, stop))
        # Named before the barrier, or each block would have to be computed again for the next.
        outputs.append(checkpoint_name(y, "attention"))  # of `SAVED`
        stats.append(of_block)
    y = jnp.concatenate(outputs)
    largest, high = (jnp.concatenate(each) for each in zip(*stats, strict=True))
    pairs = q.shape[0] * q.shape[1] * (q.shape[1] + 1) / 2
    # Reduced over sequences, and so over devices, here once and not in every block of queries.
    return y.swapaxes(0, 1), (largest.max(axis=(0, 1)), high.sum(axis=(0, 1)) / pairs)


@jax.checkpoint
def _attend(
    k: jax.Array, v: jax.Array, query: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One position, all sequences and heads: output, largest logit, logits above `HIGH_LOGIT`."""
    logits = jnp.einsum("bhd,bshd->bhs", query, k, preferred_element_type=jnp.float32)
    visible = (jnp.arange(k.shape[1]) <= position)[None, None]
    logits = jnp.where(visible, logits * (query.shape[-1] ** -0.5), -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    y = jnp.einsum("bhs,bshe->bhe", weights, v)
    logits = jax.lax.stop_gradient(logits)
    high = (logits > HIGH_LOGIT).astype(jnp.float32)
    return y, logits.max(axis=2), high.sum(axis=2)
