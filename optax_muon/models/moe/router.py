"""The router: which experts a token goes to, and with which gates.

A token `x` goes to the `k` experts whose sigmoid score plus bias is largest. The bias serves only
this choice and has no gradient (`balance.py`). The gates are the scores of the chosen experts,
normalized to add up to one, times a constant (DeepSeek-V3, arXiv 2412.19437, section 2.1.2):

    s = sigmoid(x W),   chosen = top_k(s + bias),   g = scale * s[chosen] / sum(s[chosen])

Below a logit of -104 the score is zero in float32. Where the scores of a token are nearly or all
zero, their shares are computed from their logarithms, so that the gates still add up to `scale`.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from optax_muon.models.mesh import constrain


class Routing(NamedTuple):
    """Where tokens go."""

    chosen: jax.Array
    """Experts of each token, `[b, t, k]` int32."""
    gates: jax.Array
    """Their weights, `[b, t, k]` float32."""
    load: jax.Array
    """Number of tokens routed to each expert, `[n_routed_experts]` int32."""
    entropy: jax.Array
    """Mean entropy of the normalized scores, in nats; `log(n_routed_experts)` if all are equal."""


class Router(nn.Module):
    """Chooses experts; the fields are those of `MoonlightConfig`."""

    n_routed_experts: int
    """Experts to choose from."""
    num_experts_per_tok: int
    """Experts of each token."""
    n_group: int
    """Groups of consecutive experts; a token's experts are all in `topk_group` of them, those
    whose two best experts have the largest sum."""
    topk_group: int
    """Groups that a token's experts may be in."""
    norm_topk_prob: bool
    """Whether the gates of a token add up to `routed_scaling_factor`."""
    routed_scaling_factor: float
    """Factor of the gates."""

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> Routing:
        """Route `x`, `[b, t, hidden_size]`, with the experts' biases `[n_routed_experts]`."""
        shape = (x.shape[-1], self.n_routed_experts)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        # Always float32: rounding would change which experts are chosen.
        kernel = constrain(kernel.astype(jnp.float32), None, None)
        logits = x.astype(jnp.float32) @ kernel
        scores = nn.sigmoid(logits)
        bias = bias.astype(jnp.float32)[None, None]
        chosen = self._top_k(jax.lax.stop_gradient(scores) + bias)
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.norm_topk_prob:
            gates = _shares(gates, jnp.take_along_axis(logits, chosen, axis=-1))
        load = jnp.zeros([self.n_routed_experts], jnp.int32).at[chosen].add(1)
        entropy = _entropy(*jax.lax.stop_gradient((scores, logits)))
        return Routing(chosen, gates * self.routed_scaling_factor, load, entropy)

    def _top_k(self, ranks: jax.Array) -> jax.Array:
        """The `[.., k]` experts with the largest `ranks`, `[.., n_routed_experts]`."""
        if self.n_group > 1:
            grouped = ranks.reshape(*ranks.shape[:-1], self.n_group, -1)
            best = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
            kept = jax.lax.top_k(best, self.topk_group)[1]
            open_ = jax.nn.one_hot(kept, self.n_group, dtype=bool).any(axis=-2)[..., None]
            ranks = jnp.where(open_, grouped, -jnp.inf).reshape(ranks.shape)
        return jax.lax.top_k(ranks, self.num_experts_per_tok)[1]


_SMALLEST_SUM = 1e-10
"""Below it, scores are divided by their sum as logarithms. Above it, the 1e-20 that DeepSeek-V3's
code adds to the sum is lost in rounding."""


def _shares(scores: jax.Array, logits: jax.Array) -> jax.Array:
    """Scores over their sum along the last axis; `scores` are the sigmoids of `logits`."""
    total = scores.sum(axis=-1, keepdims=True)
    # Clipped, because the difference of two infinities is none.
    logarithms = jnp.maximum(nn.log_sigmoid(logits), jnp.finfo(logits.dtype).min)
    by_logarithms = nn.softmax(logarithms, axis=-1)
    is_usual = total > _SMALLEST_SUM
    # The 1 keeps 0 / 0 out of the branch that is not taken, and out of its gradient.
    return jnp.where(is_usual, scores / jnp.where(is_usual, total, 1.0), by_logarithms)


def _entropy(scores: jax.Array, logits: jax.Array) -> jax.Array:
    shares = _shares(scores, logits)
    # The logarithm of 1 for a share of zero, which adds zero; xlogy computes 0 * -inf on the way.
    logarithms = jnp.log(jnp.where(shares > 0, shares, 1.0))
    return -(shares * logarithms).sum(axis=-1).mean()
