"""QK-Clip: scale down the weights of heads whose attention logits grow too large (MuonClip).

After the optimizer's step, for every head `h` whose largest logit `S` of the forward pass is above
the threshold `tau`, with `gamma = tau / S` (Kimi K2, arXiv 2507.20534, Algorithm 1):

    MHA    W_q <- gamma^alpha W_q         W_k <- gamma^(1 - alpha) W_k
    MLA    W_q_nope <- sqrt(gamma) W_q_nope, W_k_nope <- sqrt(gamma) W_k_nope,
           W_q_rope <- gamma W_q_rope; the rotary key that all heads share is unchanged

Both multiply the logits of the head by `gamma`. `Heads` describes where the heads of a parameter
lie, `MHA` and `MLA` which of them form an attention.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_muon.matrices import paths
from optax_muon.matrices.views import Split
from optax_muon.transforms.wrappers import accumulator_dtype

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where the heads of a query or a key lie in a parameter.

    Raises:
        ValueError: The split has no such part.

    >>> Heads("q_proj/kernel", Split.equal(-1, 64, parts=4)).count       # [width, 4 x 16]
    4
    >>> qkv = Split.qkv(-1, heads=8, kv_heads=2, head_dim=16, per_head=True)
    >>> Heads("qkv/kernel", qkv, part=1).count                           # the keys of a fused axis
    2
    """

    path: str
    """Path of the parameter, as `optax_muon.label` prints it."""
    split: Split
    """How the axis of the heads is split; the heads of a part are adjacent."""
    part: int = 0
    """Which part of the split, counted from 0."""
    layers: int | None = None
    """The axis of stacked layers; None if the parameter belongs to one layer."""
    span: int = 1
    """How many axes, from the split's axis on, are split as if they were merged: 2 for a parameter
    `[width, heads, features]` of which only some features are meant."""

    def __post_init__(self) -> None:
        parts = len(self.split.sizes)
        if not 0 <= self.part < parts:
            raise ValueError(
                f"{self.path} is split into {parts} parts; part {self.part} does not exist."
            )

    @property
    def count(self) -> int:
        """Number of heads."""
        return self.split.heads[self.part]


@dataclasses.dataclass(frozen=True)
class MHA:
    """Multi-head attention, with a key head for every query head or for a group of them (GQA, MQA).

    A key that a group shares is multiplied by the largest `gamma` of its query heads to the power
    `1 - alpha`, and each query head by the rest of its `gamma`. So every head above the threshold
    is brought to it, and a group in which any head is not above it keeps its key. With one key per
    query this is Algorithm 1; the paper does not cover groups.

    Raises:
        ValueError: `alpha` is out of range, or the heads do not divide.

    >>> q = Heads("q_proj/kernel", Split.equal(-1, 64, parts=4))
    >>> k = Heads("k_proj/kernel", Split.equal(-1, 32, parts=2))
    >>> MHA(q, k).heads
    4
    """

    q: Heads | Sequence[Heads]
    """The queries; several if a head has more than one parameter, such as a bias."""
    k: Heads | Sequence[Heads]
    """The keys, likewise. Query head `i` uses key head `i // (query heads / key heads)`."""
    alpha: float = 0.5
    """The exponent of `gamma` on the query, in [0, 1]."""

    def __post_init__(self) -> None:
        queries, keys = _one_count(_several(self.q)), _one_count(_several(self.k))
        if queries % keys:
            first = _several(self.k)[0].path
            raise ValueError(
                f"{first} has {keys} key heads, which do not divide the {queries} query heads."
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be between 0 and 1.")

    @property
    def heads(self) -> int:
        """How many query heads."""
        return _several(self.q)[0].count

    @property
    def described(self) -> tuple[Heads, ...]:
        """All that the attention names."""
        return (*_several(self.q), *_several(self.k))

    def factors(self, gamma: jax.Array) -> list[tuple[Heads, jax.Array]]:
        """Factors `[layers, heads of the parameter]` for `gamma`, `[layers, heads]`."""
        layers, keys = gamma.shape[0], _several(self.k)[0].count
        grouped = gamma.reshape(layers, keys, -1)
        common = jnp.max(grouped, axis=-1)
        shared = _where_over(common, common ** (1 - self.alpha))
        own = _where_over(grouped, grouped / shared[..., None]).reshape(gamma.shape)
        factors = [own] * len(_several(self.q)) + [shared] * len(_several(self.k))
        return list(zip(self.described, factors, strict=True))


@dataclasses.dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one rotary key for all heads.

    Raises:
        ValueError: The three differ in their number of heads.

    >>> q = Split(-1, (24, 8), heads=(4, 4), groups=4)                   # [rank, 4 x (24 + 8)]
    >>> kv = Split(-1, (24, 32), heads=(4, 4), groups=4)
    >>> MLA(Heads("q_proj", q), Heads("q_proj", q, part=1), Heads("kv_b_proj", kv)).heads
    4
    """

    q_nope: Heads | Sequence[Heads]
    """The part of the queries without rotary position."""
    q_rope: Heads | Sequence[Heads]
    """The rotary part of the queries."""
    k_nope: Heads | Sequence[Heads]
    """The part of the keys without rotary position."""

    def __post_init__(self) -> None:
        _one_count(self.described)

    @property
    def heads(self) -> int:
        """How many heads."""
        return _several(self.q_nope)[0].count

    @property
    def described(self) -> tuple[Heads, ...]:
        """All that the attention names."""
        return (*_several(self.q_nope), *_several(self.k_nope), *_several(self.q_rope))

    def factors(self, gamma: jax.Array) -> list[tuple[Heads, jax.Array]]:
        """Factors `[layers, heads]` for `gamma`, `[layers, heads]`."""
        root = _where_over(gamma, jnp.sqrt(gamma))
        rotary = len(_several(self.q_rope))
        factors = [root] * (len(self.described) - rotary) + [gamma] * rotary
        return list(zip(self.described, factors, strict=True))


Attention = MHA | MLA


def qk_clip(
    attentions: Attention | Sequence[Attention], threshold: jax.typing.ArrayLike = 100.0
) -> optax.GradientTransformationExtraArgs:
    """Scale down the queries and keys of heads whose largest logit is above the threshold.

    It must be the last link of a chain, after the learning rate: it changes the updates so that
    `optax.apply_updates` returns the scaled parameters. Its `update` takes

        max_logits    `[layers, heads]`: the largest logit of every head as the softmax sees it
                      (divided by the square root of its features), over all tokens and sequences
                      of the batch, replicated on a mesh; rows in the order of `attentions`

    A head at or below the threshold keeps its update bit for bit, even if other heads of its
    parameter are clipped. So does a head whose largest logit is not finite, because a `gamma` of
    zero would disable it forever; use `optax.apply_if_finite` against steps that overflow.
    `max_logits` belongs to the parameters before the step, so a clipped head ends at the threshold
    up to the effect of the step itself.

    Every element is computed from its own parameter and update, in float32 or wider, without
    communication. Updates keep their dtype: in bfloat16 the new parameter is off by up to 2^-8 of
    the old one. Under `optax.MultiSteps` the logits of the last micro-batch count; pass the maximum
    over all micro-batches if that matters. A norm between a projection and the logits ("QK norm")
    cancels the scale; such models need no clipping. There is no state.

    Args:
        attentions: One attention, or several in the order of the rows of `max_logits`. An attention
            with stacked layers has one row per layer, any other has one row.
        threshold: The largest allowed logit; 100 is Kimi K2's (arXiv 2507.20534, Algorithm 1).

    Raises:
        ValueError: `threshold` is not positive; the attentions have different numbers of heads; (in
            `init` and `update`) a path does not exist, or heads do not fit its shape; (in
            `update`) `params` or `max_logits` are missing, or `max_logits` does not fit.

    >>> heads = Split.equal(-1, 4, parts=2)
    >>> link = qk_clip(MHA(q=Heads("q", heads), k=Heads("k", heads)))
    >>> params = {"q": jnp.ones((1, 4)), "k": jnp.ones((1, 4))}
    >>> zero, state = jax.tree.map(jnp.zeros_like, params), link.init(params)
    >>> updates, _ = link.update(zero, state, params, max_logits=jnp.array([[400.0, 99.0]]))
    >>> print(optax.apply_updates(params, updates)["q"])                 # sqrt(100 / 400), and 1
    [[0.5 0.5 1.  1. ]]
    """
    every = (attentions,) if isinstance(attentions, MHA | MLA) else tuple(attentions)
    if len({attention.heads for attention in every}) != 1:
        counts = [attention.heads for attention in every]
        raise ValueError(f"All attentions must have the same number of heads, found {counts}.")
    if isinstance(threshold, int | float) and not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be positive.")

    def init(params: optax.Params) -> optax.EmptyState:
        _layers(every, paths.named_leaves(params))
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        max_logits: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        if params is None or max_logits is None:
            lacking = "params" if params is None else "max_logits"
            raise ValueError(
                f"qk_clip needs {lacking}:"
                " call update(updates, state, params, max_logits=...) with [layers, heads]."
            )
        leaves, weights = paths.named_leaves(updates), paths.named_leaves(params)
        layers = _layers(every, weights)
        found, wanted = np.shape(max_logits), (sum(layers), every[0].heads)
        if found != wanted:
            first = every[0].described[0].path
            raise ValueError(
                f"max_logits has shape {found}, but {first} and what follows have {wanted[0]}"
                f" layers of {wanted[1]} heads; pass {wanted}."
            )
        largest = jnp.asarray(max_logits).astype(jnp.float32)
        limit = jnp.asarray(threshold, jnp.float32)
        over = jnp.isfinite(largest) & (largest > limit)
        gamma = jnp.where(over, limit / jnp.where(over, largest, limit), jnp.ones_like(largest))
        rows = jnp.split(gamma, np.cumsum(layers)[:-1].tolist())
        for attention, own in zip(every, rows, strict=True):
            for path, factors in _by_path(attention.factors(own)).items():
                factor = _laid_out(factors, np.shape(weights[path]))
                leaves[path] = _scaled(leaves[path], weights[path], factor)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves.values()), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(update: jax.Array, param: jax.Array, factor: jax.Array) -> jax.Array:
    """Return the update that leads to `factor (param + update)`, or `update` where the factor is 1.

    A factor of 1 is selected, not computed: `1 (p + u) - p` is not `u` in floating point.
    """
    dtype = accumulator_dtype(update.dtype)
    old, factor = param.astype(dtype), factor.astype(dtype)
    new = factor * (old + update.astype(dtype)) - old
    return jnp.where(factor < 1, new.astype(update.dtype), update)


def _by_path(factors: Iterable[tuple[Heads, T]]) -> dict[str, list[tuple[Heads, T]]]:
    """Group by parameter, so that each is changed in one pass."""
    found: dict[str, list[tuple[Heads, T]]] = {}
    for heads, factor in factors:
        found.setdefault(heads.path, []).append((heads, factor))
    return found


def _laid_out(factors: Sequence[tuple[Heads, jax.Array]], shape: tuple[int, ...]) -> jax.Array:
    """Broadcast factors `[layers, heads]` against a parameter; 1 for entries of no head."""
    heads = factors[0][0]
    columns = _columns([heads for heads, _ in factors])
    ones = jnp.ones_like(factors[0][1][:, :1])
    table = jnp.concatenate([ones, *(factor for _, factor in factors)], axis=1)
    spread = table[:, columns]
    first = heads.split.axis % len(shape)
    laid = [1] * len(shape)
    laid[first : first + heads.span] = shape[first : first + heads.span]
    if heads.layers is None:
        return spread.reshape(laid)
    layers = heads.layers % len(shape)
    laid[layers] = shape[layers]
    # A layer axis behind the heads is rare; the table has it in front.
    return (spread if layers < first else spread.T).reshape(laid)


def _columns(described: Sequence[Heads]) -> np.ndarray:
    """Return the column of the table for every entry of the heads' axis: 0 if it has no head."""
    columns, next_free = np.zeros(described[0].split.total, np.int32), 1
    for heads in described:
        lie = _entries(heads)
        if columns[lie].any():
            raise ValueError(
                f"{heads.path} has entries that belong to two Heads; each entry may belong to one."
            )
        columns[lie] = next_free + np.arange(heads.count, dtype=np.int32)[:, None]
        next_free += heads.count
    return columns


def _entries(heads: Heads) -> np.ndarray:
    """Return the positions of each head along its axis, `[heads, features]`."""
    split, start = heads.split, sum(heads.split.sizes[: heads.part])
    groups = np.arange(split.total).reshape(split.groups, -1)
    return groups[:, start : start + split.sizes[heads.part]].reshape(heads.count, -1)


def _layers(attentions: Sequence[Attention], leaves: dict[str, Any]) -> list[int]:
    """Check every parameter that the attentions name, and return their numbers of layers."""
    counts: list[int] = []
    taken: set[str] = set()
    for attention in attentions:
        by_path = _by_path((heads, None) for heads in attention.described)
        layers = {
            path: _layers_of([heads for heads, _ in found], leaves)
            for path, found in by_path.items()
        }
        if len(set(layers.values())) > 1:
            raise ValueError(
                "All parameters of an attention must have the same number of layers,"
                f" found {layers}."
            )
        if twice := taken & layers.keys():
            raise ValueError(f"{min(twice)} belongs to two attentions; it may belong to one.")
        taken |= layers.keys()
        counts += set(layers.values())
    return counts


def _layers_of(described: Sequence[Heads], leaves: dict[str, Any]) -> int:
    """Check all `Heads` of a parameter, and return its number of layers."""
    heads = described[0]
    if heads.path not in leaves:
        close = difflib.get_close_matches(heads.path, leaves, n=3, cutoff=0.4)
        raise ValueError(
            f"Heads({heads.path!r}) names no parameter; there are {', '.join(close or leaves)}."
        )
    shape, split = np.shape(leaves[heads.path]), heads.split
    for axis in (split.axis, *([] if heads.layers is None else [heads.layers])):
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{heads.path} of shape {shape} has no axis {axis}.")
    first = split.axis % len(shape)
    if heads.layers is not None and heads.layers % len(shape) in range(first, first + heads.span):
        raise ValueError(f"{heads.path} has layers and heads on one axis, {heads.layers}.")
    length = math.prod(shape[first : first + heads.span])
    if length != split.total:
        raise ValueError(
            f"{heads.path} of shape {shape} has {length} entries from axis {first} on (span"
            f" {heads.span}), but its split has {split.total}."
        )
    if any((h.split, h.layers, h.span) != (split, heads.layers, heads.span) for h in described):
        raise ValueError(f"{heads.path} has Heads with different splits; give them one.")
    _columns(described)
    return 1 if heads.layers is None else shape[heads.layers]


def _where_over(gamma: jax.Array, value: jax.Array) -> jax.Array:
    """Return `value` where `gamma` is below 1, else 1: `1 / 1` need not be 1 on every device."""
    return jnp.where(gamma < 1, value, jnp.ones_like(gamma))


def _several(heads: Heads | Sequence[Heads]) -> tuple[Heads, ...]:
    return (heads,) if isinstance(heads, Heads) else tuple(heads)


def _one_count(described: Sequence[Heads]) -> int:
    """Return the number of heads, which must be the same for all."""
    counts = {heads.path: heads.count for heads in described}
    if len({heads.count for heads in described}) != 1:
        raise ValueError(
            f"Parameters of one attention must have the same number of heads, found {counts}."
        )
    return described[0].count
