"""A mixture of experts: which experts a token goes to, and what they make of it.

A token `x` goes to the `k` experts whose sigmoid score plus bias is largest; the bias has no other
use and no gradient (`balance.py`). The gates are the scores of the chosen, made to add up to one,
times a constant (DeepSeek-V3, arXiv 2412.19437, section 2.1.2):

    s = sigmoid(x W),   chosen = top_k(s + bias),   g = scale * s[chosen] / sum(s[chosen])
    y = sum over the chosen i of  g_i down_i(silu(gate_i(x)) * up_i(x))

Experts are stacked, `[experts, rows, cols]`. On a mesh with an `expert` axis each device holds some
of them: it gathers the tokens of its expert group, applies its own experts, and the sums go back
(an all-gather and a reduce-scatter of the tokens, nothing of the experts). No token is dropped,
unless a capacity says how many an expert takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from optax_muon.models.grouped import grouped_dot
from optax_muon.models.layers import BATCH, place, there

EXPERT = "expert"
"""The mesh axis that experts lie over."""


class Routing(NamedTuple):
    """Where tokens go."""

    chosen: jax.Array
    """Experts of each token, `[b, t, k]` int32."""
    gates: jax.Array
    """Their weights, `[b, t, k]` float32."""
    load: jax.Array
    """How often each expert was chosen, `[experts]` int32."""
    entropy: jax.Array
    """Mean entropy of the scores, made to add up to one, in nats; `log(experts)` if all equal."""


class Router(nn.Module):
    """Chooses experts.

    Args:
        experts: how many there are.
        chosen: how many a token goes to.
        groups: parts of the experts, in order; a token's experts are all in `groups_chosen` of
            them, those whose two best experts have the largest sum.
        groups_chosen: how many groups a token goes to.
        renormalise: whether the gates of a token add up to `scale`.
        scale: factor of the gates.
    """

    experts: int
    chosen: int
    groups: int
    groups_chosen: int
    renormalise: bool
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> Routing:
        """Route `x`, `[b, t, width]`, with the experts' biases `[experts]`."""
        shape = (x.shape[-1], self.experts)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        # In float32 always: rounding would change who is chosen.
        kernel = place(kernel.astype(jnp.float32), None, None)
        scores = nn.sigmoid(x.astype(jnp.float32) @ kernel)
        bias = bias.astype(jnp.float32)[None, None]
        chosen = self._choose(jax.lax.stop_gradient(scores) + bias)
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.renormalise:
            gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
        load = jnp.zeros([self.experts], jnp.int32).at[chosen].add(1)
        return Routing(chosen, gates * self.scale, load, _entropy(scores))

    def _choose(self, ranks: jax.Array) -> jax.Array:
        """The `[.., chosen]` experts with the largest `ranks`, `[.., experts]`."""
        if self.groups > 1:
            grouped = ranks.reshape(*ranks.shape[:-1], self.groups, -1)
            best = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
            kept = jax.lax.top_k(best, self.groups_chosen)[1]
            open_ = jax.nn.one_hot(kept, self.groups, dtype=bool).any(axis=-2)[..., None]
            ranks = jnp.where(open_, grouped, -jnp.inf).reshape(ranks.shape)
        return jax.lax.top_k(ranks, self.chosen)[1]


class Experts(nn.Module):
    """SwiGLUs, each for the tokens that go to it.

    Args:
        experts: how many.
        hidden: features inside each.
        dtype: of the products.
        capacity: how many tokens an expert takes, as a multiple of its fair share of those that its
            devices see together (all that differ in the `expert` axis alone); what comes later is
            dropped, its share of the output zero. None drops nothing, for any distribution.
    """

    experts: int
    hidden: int
    dtype: str
    capacity: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, chosen: jax.Array, gates: jax.Array) -> jax.Array:
        """Apply to `x`, `[b, t, width]`; experts and gates of its tokens are `[b, t, k]`."""
        kernels = (
            self._stack("gate_proj", x.shape[-1], self.hidden),
            self._stack("up_proj", x.shape[-1], self.hidden),
            self._stack("down_proj", self.hidden, x.shape[-1]),
        )
        apply = functools.partial(_mix, experts=self.experts, capacity=self.capacity)
        if not jax.sharding.get_abstract_mesh().empty:
            tokens, expert, tensor = P(there(BATCH)), there(EXPERT), there("tensor")
            into, out = P(expert, None, tensor), P(expert, tensor, None)
            apply = jax.shard_map(
                apply, in_specs=(tokens, tokens, tokens, (into, into, out)), out_specs=tokens
            )
        return apply(x.astype(self.dtype), chosen, gates, kernels)

    def _stack(self, name: str, rows: int, cols: int) -> jax.Array:
        normal = nn.initializers.lecun_normal(batch_axis=0)
        return self.param(name, normal, (self.experts, rows, cols)).astype(self.dtype)


class Slots(NamedTuple):
    """Where the experts of a device work on which tokens.

    An assignment is one of the `n k` pairs of a token and an expert chosen for it, token-major.
    """

    source: jax.Array
    """Assignment in each slot, `[slots]`; `n k` where the slot is empty."""
    target: jax.Array
    """Slot of each assignment, `[n k]`; past the last slot where it has none."""
    product: Callable[[jax.Array, jax.Array], jax.Array]
    """Multiplies `[slots, d]` with each slot's expert out of `[experts, d, f]`."""


Kernels = tuple[jax.Array, jax.Array, jax.Array]


def _mix(
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    kernels: Kernels,
    *,
    experts: int,
    capacity: float | None,
) -> jax.Array:
    """One device's part: its own experts on the tokens of its expert group."""
    first: int | jax.Array = 0
    here = kernels[0].shape[0]
    if there(EXPERT):
        x, chosen, gates = (
            jax.lax.all_gather(y, EXPERT, axis=0, tiled=True) for y in (x, chosen, gates)
        )
        first = jax.lax.axis_index(EXPERT) * here
    mine = chosen.reshape(-1) - first
    mine = jnp.where((mine >= 0) & (mine < here), mine, here)
    if capacity is None:
        slots = _sorted(mine, here)
    else:
        tokens = mine.size // gates.shape[-1]  # an expert can have no more
        slots = _padded(mine, here, min(tokens, math.ceil(capacity * mine.size / experts)))
    y = _apply(x.reshape(-1, x.shape[-1]), gates, kernels, slots).reshape(x.shape)
    if there("tensor"):
        y = jax.lax.psum(y, "tensor")
    if there(EXPERT):
        y = jax.lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True)
    return y.astype(x.dtype)


def _apply(x: jax.Array, gates: jax.Array, kernels: Kernels, slots: Slots) -> jax.Array:
    """Gated sums, `[n, d]` float32, of tokens `[n, d]`."""
    n, k = x.shape[0], gates.shape[-1]
    gate, up, down = kernels
    h = x.at[slots.source // k].get(mode="fill", fill_value=0)
    y = slots.product(nn.silu(slots.product(h, gate)) * slots.product(h, up), down)
    y = y.at[slots.target].get(mode="fill", fill_value=0).reshape(n, k, -1)
    # Sums of k and over devices are float32; only what is added is rounded.
    return jnp.einsum("nkd,nk->nd", y.astype(jnp.float32), gates.reshape(n, k))


def _sorted(mine: jax.Array, experts: int) -> Slots:
    """A slot per assignment, by expert; those of other devices (`mine == experts`) come last."""
    order = jnp.argsort(mine, stable=True)
    sizes = jnp.zeros([experts], jnp.int32).at[mine].add(1, mode="drop")
    return Slots(order, jnp.argsort(order), lambda x, w: grouped_dot(x, w, sizes))


def _padded(mine: jax.Array, experts: int, capacity: int) -> Slots:
    """`capacity` slots per expert, for the assignments that come first."""
    order = jnp.argsort(mine, stable=True)
    sizes = jnp.zeros([experts + 1], jnp.int32).at[mine].add(1)
    starts = jnp.cumsum(sizes) - sizes
    place = jnp.arange(capacity)[None]
    source = order.at[starts[:-1, None] + place].get(mode="fill", fill_value=mine.size)
    source = jnp.where(place < sizes[:-1, None], source, mine.size).reshape(-1)
    rank = jnp.argsort(order) - starts[mine]
    fits = (rank < capacity) & (mine < experts)
    target = jnp.where(fits, mine * capacity + rank, experts * capacity)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        stacked = jnp.einsum("ecd,edf->ecf", x.reshape(experts, capacity, -1), w)
        return stacked.reshape(experts * capacity, -1)

    return Slots(source, target, product)


def _entropy(scores: jax.Array) -> jax.Array:
    shares = jax.lax.stop_gradient(scores / scores.sum(axis=-1, keepdims=True))
    # Written so that a score that underflows to zero adds zero.
    return -jax.scipy.special.xlogy(shares, shares).sum(axis=-1).mean()
