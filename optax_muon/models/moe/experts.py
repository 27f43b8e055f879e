"""Routed experts: each token's sum of the experts that the router chose for it (`router.py`).

    y = sum over the chosen i of  g_i down_i(silu(gate_i(x)) * up_i(x))

Experts are stacked, `[experts, rows, cols]`. On a mesh with an `expert` axis each device holds some
of them, and no expert is moved (`exchanged`). A device sends the row of a token once to every
device that has an expert of it, and gets back the gated sum of these experts: at 6 of 64 experts on
16 devices 5.3 rows per token, where gathering the tokens would be 16. No token is dropped, unless a
capacity limits how many an expert accepts; then the tokens of a group of devices are gathered.

Arrays have static shapes, so a device sends as many rows to each other as an even choice of experts
needs, and four standard deviations more. Rows beyond are sent in further rounds, as many as the
fullest pair of devices needs, usually none.

All tokens of a group may go to the experts of one device. Memory for the worst case would be 16
times too much, so a device processes its rows `BLOCK` at a time, in as many iterations as its rows
need; the backward pass computes each block again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from optax_muon.models.mesh import BATCH, mark_varying, present_axes
from optax_muon.models.moe.grouped_matmul import grouped_dot

EXPERT = "expert"
"""The mesh axis that experts are sharded over."""

BLOCK = 16384
"""Rows that a device's experts process at once: for Moonlight 64 MiB, and 44 MiB inside."""


FURTHER_ROUNDS = "further_rounds"
"""Scope of the loop over further rounds in the names of a compiled program's instructions."""


class Experts(nn.Module):
    """SwiGLUs, each for the tokens that are routed to it."""

    experts: int
    """Number of experts."""
    hidden: int
    """Features inside each."""
    dtype: str
    """Dtype of the products."""
    capacity: float | None = None
    """Tokens that an expert accepts, as a multiple of an even share of those that its devices see
    together (all that differ in the `expert` axis alone). Later tokens are dropped: the expert adds
    zero to their output. None drops no token, whatever the distribution."""

    @nn.compact
    def __call__(self, x: jax.Array, chosen: jax.Array, gates: jax.Array) -> jax.Array:
        """Apply to `x`, `[b, t, hidden_size]`; experts and gates of its tokens are `[b, t, k]`."""
        kernels = (
            self._stack("gate_proj", x.shape[-1], self.hidden),
            self._stack("up_proj", x.shape[-1], self.hidden),
            self._stack("down_proj", self.hidden, x.shape[-1]),
        )
        apply = functools.partial(expert_parallel, experts=self.experts, capacity=self.capacity)
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
"""Of gate and up `[experts, hidden_size, hidden]`, of down `[experts, hidden, hidden_size]`."""


def expert_parallel(
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    kernels: Kernels,
    *,
    experts: int,
    capacity: float | None,
) -> jax.Array:
    """One device's part: its own experts on the tokens of its expert group.

    Args:
        x: The device's tokens, `[b, t, hidden_size]`.
        chosen: Their experts, `[b, t, k]` int32.
        gates: Their gates, `[b, t, k]` float32.
        kernels: The device's shards of the kernels.
        experts: Number of experts on all devices.
        capacity: As in `Experts`.

    Returns:
        The gated sums of the device's tokens, `[b, t, hidden_size]` in the dtype of `x`.
    """
    held, dtype = kernels[0].shape[0], x.dtype
    if present_axes("fsdp"):
        gather = functools.partial(jax.lax.all_gather, axis_name="fsdp", tiled=True)
        gate, up, down = kernels
        kernels = gather(gate, axis=1), gather(up, axis=1), gather(down, axis=2)
    is_sent = present_axes(EXPERT) and capacity is None
    is_gathered = present_axes(EXPERT) and not is_sent
    if is_gathered:
        x, chosen, gates = (
            jax.lax.all_gather(y, EXPERT, axis=0, tiled=True) for y in (x, chosen, gates)
        )
    gate, up, down = (mark_varying(kernel, "data") for kernel in kernels)
    rows = mark_varying(x.reshape(-1, x.shape[-1]), "tensor")
    flat = mark_varying(gates, "tensor").reshape(-1)
    tokens = rows.shape[0]
    if is_sent:
        sent = Sent(rows, chosen.reshape(tokens, -1), flat.reshape(tokens, -1), (gate, up, down))
        y = exchanged(sent, experts)
    elif capacity is None:
        y = dropless(rows, flat, (gate, up, down), _local(chosen, held))
    else:
        # No expert can have more rows than there are tokens.
        most = min(tokens, math.ceil(capacity * flat.size / experts))
        y = with_capacity(rows, flat, (gate, up, down), _local(chosen, held), most)
    y = y.reshape(x.shape)
    if present_axes("tensor"):
        y = jax.lax.psum(y, "tensor")
    return combine(y, dtype) if is_gathered else y.astype(dtype)


def _local(chosen: jax.Array, held: int) -> jax.Array:
    """Flat indices among the experts that a device holds; `held` for those of other devices."""
    first = jax.lax.axis_index(EXPERT) * held if present_axes(EXPERT) else 0
    local = chosen.reshape(-1) - first
    return jnp.where((local >= 0) & (local < held), local, held)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def combine(y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sum over the devices of `expert`, float32; each device keeps the sums of its own tokens."""
    return jax.lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True).astype(dtype)


def _combine_forward(y: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, None]:
    return combine(y, dtype), None


def _combine_backward(dtype: jnp.dtype, saved: None, dy: jax.Array) -> tuple[jax.Array]:
    """Gather the cotangent in its own dtype: bfloat16 is half the bytes of float32."""
    del dtype, saved
    return (jax.lax.all_gather(dy, EXPERT, axis=0, tiled=True).astype(jnp.float32),)


combine.defvjp(_combine_forward, _combine_backward)


# ---- rows sent to the devices of their experts ---------------------------------------------------


class Sent(NamedTuple):
    """A device's tokens and kernels; a token's row goes to the devices of its experts."""

    x: jax.Array
    """Rows of the tokens, `[n, hidden_size]`."""
    chosen: jax.Array
    """Their experts, `[n, k]` int32."""
    gates: jax.Array
    """Their gates, `[n, k]` float32."""
    kernels: Kernels
    """Kernels of the experts that the device holds."""


def exchanged(sent: Sent, experts: int) -> jax.Array:
    """Gated sums `[n, hidden_size]` float32 of the device's tokens, each from its experts' devices.

    What a device returns for a token is rounded to the dtype of `x`; the sums over devices are
    float32.
    """
    (n, k), held = sent.chosen.shape, sent.kernels[0].shape[0]
    first = rows_of_pair(n, k, experts, held)
    further = max(1, first // 8)
    devices = jnp.arange(experts // held)[None, None]
    goes = (sent.chosen[..., None] // held == devices).any(axis=1)
    # For each device the tokens that go to it, then `n`.
    tokens = jnp.sort(jnp.where(goes, jnp.arange(n)[:, None], n), axis=0).T
    tokens = jnp.pad(tokens, [(0, 0), (0, further)], constant_values=n)
    y = _round(sent, tokens[:, :first])
    if first == n:
        return y
    most = jax.lax.pmax(goes.sum(axis=0).max(), jax.sharding.get_abstract_mesh().axis_names)
    rounds = jnp.maximum(0, -(-(most - first) // further))
    return y + _further(sent, Further(tokens, rounds, first, further))


def rows_of_pair(n: int, k: int, experts: int, held: int) -> int:
    """Rows that a device sends at once to each device of its group: those of an even choice.

    A token has an expert on a device with probability `p = 1 - C(experts - held, k) / C(experts,
    k)`, if all choices of `k` are equally likely; four standard deviations are added to `n p`.

    Args:
        n: Tokens of the device.
        k: Experts of each token.
        experts: Number of experts on all devices.
        held: Experts that a device holds.

    >>> rows_of_pair(8192, 6, 64, 4), rows_of_pair(8192, 6, 64, 64)
    (2896, 8192)
    """
    p = 1 - math.comb(experts - held, k) / math.comb(experts, k)
    rows = math.ceil(n * p + 4 * math.sqrt(n * p * (1 - p)))
    return min(n, rows + -rows % 8)


def _round(sent: Sent, tokens: jax.Array) -> jax.Array:
    """What the devices return for these tokens, `[devices, rows]`; `n` stands for none."""
    exchange = functools.partial(
        jax.lax.all_to_all, axis_name=EXPERT, split_axis=0, concat_axis=0, tiled=True
    )
    held, width = sent.kernels[0].shape[:2]
    # float32, because the gradient of each row sums over the devices that it goes to.
    x = _rows(sent.x.astype(jnp.float32), tokens).astype(sent.x.dtype)
    x = checkpoint_name(exchange(x), "rows")
    nowhere = held * tokens.shape[0]
    chosen = exchange(sent.chosen.at[tokens].get(mode="fill", fill_value=nowhere))
    gates = exchange(_rows(sent.gates, tokens))
    y = dropless(
        x.reshape(-1, width), gates.reshape(-1), sent.kernels, _local(chosen, held)
    ).astype(x.dtype)
    y = exchange(y.reshape(x.shape)).astype(jnp.float32)
    return jnp.zeros_like(sent.x, jnp.float32).at[tokens].add(y, mode="drop")


class Further(NamedTuple):
    """The rows after the first of each pair of devices, and in how many rounds they are sent."""

    tokens: jax.Array
    """For each device the tokens that go to it, then their number, `[devices, rows]`."""
    rounds: jax.Array
    """Number of rounds, the same on all devices."""
    first: int
    """Rows that have been sent."""
    rows: int
    """Rows of a round."""

    def of_round(self, i: jax.Array) -> jax.Array:
        """The tokens of a round, `[devices, rows]`."""
        start = self.first + i * self.rows
        return jax.lax.dynamic_slice_in_dim(self.tokens, start, self.rows, axis=1)


def _further(sent: Sent, further: Further) -> jax.Array:
    """Gated sums of the rows of further rounds."""
    given = sent.x, sent.gates, sent.kernels
    rest = sent.chosen, further.tokens, further.rounds
    return _in_rounds(further.first, further.rows, given, rest)


Given = tuple[jax.Array, jax.Array, Kernels]
Rest = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(first: int, rows: int, given: Given, rest: Rest) -> jax.Array:
    return _in_rounds_forward(first, rows, given, rest)[0]


def _in_rounds_forward(
    first: int, rows: int, given: Given, rest: Rest
) -> tuple[jax.Array, tuple[Given, Rest]]:
    further = Further(*rest[1:], first, rows)

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        return y + _given_round(given, rest[0], further.of_round(i))

    with jax.named_scope(FURTHER_ROUNDS):
        y = jax.lax.fori_loop(0, further.rounds, add, jnp.zeros_like(given[0], jnp.float32))
    return y, (given, rest)


def _in_rounds_backward(
    first: int, rows: int, saved: tuple[Given, Rest], dy: jax.Array
) -> tuple[Given, None]:
    given, rest = saved
    further = Further(*rest[1:], first, rows)

    def add(i: jax.Array, total: Given) -> Given:
        pull = jax.vjp(lambda g: _given_round(g, rest[0], further.of_round(i)), given)[1]
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, pull(dy)[0])

    zero = jax.tree.map(lambda y: jnp.zeros_like(y, jnp.float32), given)
    with jax.named_scope(FURTHER_ROUNDS):
        total = jax.lax.fori_loop(0, further.rounds, add, zero)
    return jax.tree.map(lambda y, like: y.astype(like.dtype), total, given), None


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _given_round(given: Given, chosen: jax.Array, tokens: jax.Array) -> jax.Array:
    x, gates, kernels = given
    return _round(Sent(x, chosen, gates, kernels), tokens)


# ---- a device's tokens, gates and experts --------------------------------------------------------
#
# An assignment is one of the `n k` pairs of a token and an expert chosen for it, token-major. Each
# has a gate, `[n k]` float32. `local`, `[n k]`, is the index of its expert among the device's own,
# or their number if the expert is another device's. Results are gated sums, `[n, hidden_size]`:
# the sums over k and over devices are float32, their terms have the dtype of the products.


class Dispatch(NamedTuple):
    """Assignments sorted by expert, in blocks; those of other devices come last."""

    source: jax.Array
    """Assignments, `[blocks, block]`."""
    ends: jax.Array
    """Cumulative number of assignments of the device's experts, `[experts]`."""

    @property
    def num_blocks(self) -> jax.Array:
        """Blocks that hold the assignments of the device's experts."""
        return -(-self.ends[-1] // self.source.shape[1])

    def block(self, i: jax.Array, assignments: int) -> tuple[jax.Array, jax.Array]:
        """A block's assignments, `n k` past the last, and how many of them each expert has."""
        size = self.source.shape[1]
        ends = jnp.clip(self.ends - i * size, 0, size)
        source = jnp.where(jnp.arange(size) < ends[-1], self.source[i], assignments)
        return source, jnp.diff(ends, prepend=0)


Saved = tuple[jax.Array, jax.Array, Kernels, Dispatch]


@jax.custom_vjp
def dropless(x: jax.Array, gates: jax.Array, kernels: Kernels, local: jax.Array) -> jax.Array:
    """Gated sums of all assignments of the device's experts, a block at a time."""
    return _dropless_forward(x, gates, kernels, local)[0]


def _dropless_forward(
    x: jax.Array, gates: jax.Array, kernels: Kernels, local: jax.Array
) -> tuple[jax.Array, Saved]:
    dispatch = _dispatch(local, kernels[0].shape[0])
    k = gates.size // x.shape[0]

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        source, sizes = dispatch.block(i, gates.size)
        part = _gated(_rows(x, source // k), _rows(gates, source), kernels, sizes)
        return y.at[source // k].add(part, mode="drop")

    y = jax.lax.fori_loop(0, dispatch.num_blocks, add, jnp.zeros_like(x, jnp.float32))
    return y, (x, gates, kernels, dispatch)


def _dropless_backward(saved: Saved, dy: jax.Array) -> tuple[jax.Array, jax.Array, Kernels, None]:
    x, gates, kernels, dispatch = saved
    k = gates.size // x.shape[0]

    def add(i: jax.Array, total: Any) -> Any:
        dx, d_gates, d_kernels = total
        source, sizes = dispatch.block(i, gates.size)
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
    total = jax.lax.fori_loop(0, dispatch.num_blocks, add, zero)
    return *jax.tree.map(lambda y, like: y.astype(like.dtype), total, given), None


dropless.defvjp(_dropless_forward, _dropless_backward)


def _dispatch(local: jax.Array, experts: int) -> Dispatch:
    block = min(BLOCK, local.size)
    source = jnp.pad(jnp.argsort(local, stable=True), (0, -local.size % block))
    sizes = jnp.zeros([experts], jnp.int32).at[local].add(1, mode="drop")
    return Dispatch(source.reshape(-1, block), jnp.cumsum(sizes))


def _gated(h: jax.Array, gates: jax.Array, kernels: Kernels, sizes: jax.Array) -> jax.Array:
    y = _swiglu(h, kernels, lambda x, w: grouped_dot(x, w, sizes))
    return y.astype(jnp.float32) * gates[:, None]


def with_capacity(
    x: jax.Array, gates: jax.Array, kernels: Kernels, local: jax.Array, capacity: int
) -> jax.Array:
    """Gated sums of the first `capacity` assignments of each expert; the others are dropped."""
    experts, k = kernels[0].shape[0], gates.size // x.shape[0]
    order = jnp.argsort(local, stable=True)
    sizes = jnp.zeros([experts + 1], jnp.int32).at[local].add(1)
    starts = jnp.cumsum(sizes) - sizes
    slot = jnp.arange(capacity)[None]
    source = order.at[starts[:-1, None] + slot].get(mode="fill", fill_value=local.size)
    source = jnp.where(slot < sizes[:-1, None], source, local.size).reshape(-1)
    rank = jnp.argsort(order) - starts[local]
    fits = (rank < capacity) & (local < experts)
    target = jnp.where(fits, local * capacity + rank, experts * capacity)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        stacked = jnp.einsum("ecd,edf->ecf", x.reshape(experts, capacity, -1), w)
        return stacked.reshape(experts * capacity, -1)

    y = _swiglu(_rows(x, source // k), kernels, product)
    y = _rows(y, target).reshape(*x.shape[:1], k, -1).astype(jnp.float32)
    return jnp.einsum("nkd,nk->nd", y, gates.reshape(-1, k))


def _swiglu(
    h: jax.Array, kernels: Kernels, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """SwiGLU of rows `h`; `product` multiplies each row with the matrix of its expert."""
    gate, up, down = kernels
    return product(nn.silu(product(h, gate)) * product(h, up), down)


def _rows(x: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of `x`, zero past the last."""
    return x.at[at].get(mode="fill", fill_value=0)
