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

Without a capacity all tokens of a group may go to the experts of one device: with 16 sequences of
8192 tokens and 6 choices, 786432 rows where 49152 are its fair share. Memory for the most that can
come would be 16 times too much, so a device takes its rows `BLOCK` at a time, in as many turns as
its rows need; the backward pass makes each block again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from optax_muon.models.layers import BATCH, constrain, mark_varying, present_axes
from optax_muon.models.moe.grouped_matmul import grouped_dot

EXPERT = "expert"
"""The mesh axis that experts lie over."""

BLOCK = 16384
"""Rows that a device's experts work on at once: for Moonlight 64 MiB, and 44 MiB inside."""


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
        kernel = constrain(kernel.astype(jnp.float32), None, None)
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
            tokens = P(present_axes(BATCH))
            expert, fsdp, tensor = (present_axes(axis) for axis in (EXPERT, "fsdp", "tensor"))
            into, out = P(expert, fsdp, tensor), P(expert, tensor, fsdp)
            apply = jax.shard_map(
                apply, in_specs=(tokens, tokens, tokens, (into, into, out)), out_specs=tokens
            )
        return apply(x.astype(self.dtype), chosen, gates, kernels)

    def _stack(self, name: str, rows: int, cols: int) -> jax.Array:
        normal = nn.initializers.lecun_normal(batch_axis=0)
        return self.param(name, normal, (self.experts, rows, cols)).astype(self.dtype)


Kernels = tuple[jax.Array, jax.Array, jax.Array]
"""Of gate and up `[experts, width, hidden]`, of down `[experts, hidden, width]`."""


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
    here, dtype = kernels[0].shape[0], x.dtype
    if present_axes("fsdp"):
        gather = functools.partial(jax.lax.all_gather, axis_name="fsdp", tiled=True)
        gate, up, down = kernels
        kernels = gather(gate, axis=1), gather(up, axis=1), gather(down, axis=2)
    if present_axes(EXPERT):
        x, chosen, gates = (
            jax.lax.all_gather(y, EXPERT, axis=0, tiled=True) for y in (x, chosen, gates)
        )
        first = jax.lax.axis_index(EXPERT) * here
    mine = chosen.reshape(-1) - first
    mine = jnp.where((mine >= 0) & (mine < here), mine, here)
    gate, up, down = (mark_varying(kernel, "data") for kernel in kernels)
    rows, flat = (
        mark_varying(x.reshape(-1, x.shape[-1]), "tensor"),
        mark_varying(gates, "tensor").reshape(-1),
    )
    if capacity is None:
        y = _all(rows, flat, (gate, up, down), mine)
    else:
        tokens = rows.shape[0]  # an expert can have no more
        most = min(tokens, math.ceil(capacity * mine.size / experts))
        y = _first(rows, flat, (gate, up, down), mine, most)
    y = y.reshape(x.shape)
    if present_axes("tensor"):
        y = jax.lax.psum(y, "tensor")
    return _home(y, dtype) if present_axes(EXPERT) else y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _home(y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sums over devices, float32, each of the tokens that the device brought."""
    return jax.lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True).astype(dtype)


def _home_forward(y: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, None]:
    return _home(y, dtype), None


def _home_backward(dtype: jnp.dtype, saved: None, dy: jax.Array) -> tuple[jax.Array]:
    """Gathered as it comes, half the bytes of float32 in bfloat16."""
    del dtype, saved
    return (jax.lax.all_gather(dy, EXPERT, axis=0, tiled=True).astype(jnp.float32),)


_home.defvjp(_home_forward, _home_backward)


# ---- a device's tokens, gates and experts --------------------------------------------------------
#
# An assignment is one of the `n k` pairs of a token and an expert chosen for it, token-major. Each
# has a gate, `[n k]` float32, and `mine`, `[n k]`, says which of a device's experts it is, or how
# many experts there are where it is another device's. Results are gated sums, `[n, width]` float32:
# sums of k and over devices are float32; only what is added is rounded.


class Order(NamedTuple):
    """Assignments by expert, those of other devices last, in blocks."""

    source: jax.Array
    """Assignments, `[blocks, block]`."""
    ends: jax.Array
    """How many the experts up to each have, `[experts]`."""

    @property
    def turns(self) -> jax.Array:
        """Blocks that hold all assignments of the device."""
        return -(-self.ends[-1] // self.source.shape[1])

    def block(self, i: jax.Array, assignments: int) -> tuple[jax.Array, jax.Array]:
        """Assignments of a block and how many of them each expert has; `n k` past the last."""
        size = self.source.shape[1]
        ends = jnp.clip(self.ends - i * size, 0, size)
        source = jnp.where(jnp.arange(size) < ends[-1], self.source[i], assignments)
        return source, jnp.diff(ends, prepend=0)


Saved = tuple[jax.Array, jax.Array, Kernels, Order]


@jax.custom_vjp
def _all(x: jax.Array, gates: jax.Array, kernels: Kernels, mine: jax.Array) -> jax.Array:
    """All of a device's assignments, in blocks."""
    return _all_forward(x, gates, kernels, mine)[0]


def _all_forward(
    x: jax.Array, gates: jax.Array, kernels: Kernels, mine: jax.Array
) -> tuple[jax.Array, Saved]:
    order = _ordered(mine, kernels[0].shape[0])
    k = gates.size // x.shape[0]

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        source, sizes = order.block(i, gates.size)
        part = _gated(_rows(x, source // k), _rows(gates, source), kernels, sizes)
        return y.at[source // k].add(part, mode="drop")

    y = jax.lax.fori_loop(0, order.turns, add, jnp.zeros_like(x, jnp.float32))
    return y, (x, gates, kernels, order)


def _all_backward(saved: Saved, dy: jax.Array) -> tuple[jax.Array, jax.Array, Kernels, None]:
    x, gates, kernels, order = saved
    k = gates.size // x.shape[0]

    def add(i: jax.Array, total: Any) -> Any:
        dx, d_gates, d_kernels = total
        source, sizes = order.block(i, gates.size)
        gated = functools.partial(_gated, sizes=sizes)
        pull = jax.vjp(gated, _rows(x, source // k), _rows(gates, source), kernels)[1]
        dh, d_gate, more = pull(_rows(dy, source // k))
        return (
            dx.at[source // k].add(dh.astype(jnp.float32), mode="drop"),
            d_gates.at[source].set(d_gate, mode="drop"),
            jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_kernels, more),
        )

    given = (x, gates, kernels)
    zero = jax.tree.map(lambda y: jnp.zeros_like(y, jnp.float32), given)
    total = jax.lax.fori_loop(0, order.turns, add, zero)
    return *jax.tree.map(lambda y, like: y.astype(like.dtype), total, given), None


_all.defvjp(_all_forward, _all_backward)


def _ordered(mine: jax.Array, experts: int) -> Order:
    block = min(BLOCK, mine.size)
    source = jnp.pad(jnp.argsort(mine, stable=True), (0, -mine.size % block))
    sizes = jnp.zeros([experts], jnp.int32).at[mine].add(1, mode="drop")
    return Order(source.reshape(-1, block), jnp.cumsum(sizes))


def _gated(h: jax.Array, gates: jax.Array, kernels: Kernels, sizes: jax.Array) -> jax.Array:
    y = _swiglu(h, kernels, lambda x, w: grouped_dot(x, w, sizes))
    return y.astype(jnp.float32) * gates[:, None]


def _first(
    x: jax.Array, gates: jax.Array, kernels: Kernels, mine: jax.Array, capacity: int
) -> jax.Array:
    """Of every expert the `capacity` assignments that come first, each a slot of the expert."""
    experts, k = kernels[0].shape[0], gates.size // x.shape[0]
    order = jnp.argsort(mine, stable=True)
    sizes = jnp.zeros([experts + 1], jnp.int32).at[mine].add(1)
    starts = jnp.cumsum(sizes) - sizes
    slot = jnp.arange(capacity)[None]
    source = order.at[starts[:-1, None] + slot].get(mode="fill", fill_value=mine.size)
    source = jnp.where(slot < sizes[:-1, None], source, mine.size).reshape(-1)
    rank = jnp.argsort(order) - starts[mine]
    fits = (rank < capacity) & (mine < experts)
    target = jnp.where(fits, mine * capacity + rank, experts * capacity)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        stacked = jnp.einsum("ecd,edf->ecf", x.reshape(experts, capacity, -1), w)
        return stacked.reshape(experts * capacity, -1)

    y = _swiglu(_rows(x, source // k), kernels, product)
    y = _rows(y, target).reshape(*x.shape[:1], k, -1).astype(jnp.float32)
    return jnp.einsum("nkd,nk->nd", y, gates.reshape(-1, k))


def _swiglu(
    h: jax.Array, kernels: Kernels, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """`product` multiplies rows with each one's expert, `[experts, d, f]`."""
    gate, up, down = kernels
    return product(nn.silu(product(h, gate)) * product(h, up), down)


def _rows(x: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of `x`, zero past the last."""
    return x.at[at].get(mode="fill", fill_value=0)


def _entropy(scores: jax.Array) -> jax.Array:
    shares = jax.lax.stop_gradient(scores / scores.sum(axis=-1, keepdims=True))
    # Written so that a score that underflows to zero adds zero.
    return -jax.scipy.special.xlogy(shares, shares).sum(axis=-1).mean()
