"""QK-Clip: heads whose attention logits grow too large have their weights scaled back (MuonClip).

After the optimizer's step, for every head `h` whose largest logit `S` of the forward pass is above
the threshold `tau`, with `gamma = tau / S` (Kimi K2, arXiv 2507.20534, Algorithm 1):

    MHA    W_q <- gamma^alpha W_q         W_k <- gamma^(1 - alpha) W_k
    MLA    W_q_nope <- sqrt(gamma) W_q_nope, W_k_nope <- sqrt(gamma) W_k_nope,
           W_q_rope <- gamma W_q_rope, the rotary key that all heads share stays

Both multiply the head's logits by `gamma`. Where heads lie in the parameters is said by `Heads`,
which of them make an attention by `MHA` and `MLA`.
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

    Args:
      path: the parameter's path, as `optax_muon.label` shows it.
      split: how the axis of the heads is cut; a part's heads lie side by side.
      part: which part of the split, from 0.
      layers: the axis that counts layers, where they are stacked; None is one layer.
      span: how many axes, the split's first, are cut as if merged: 2 for a parameter
        `[width, heads, features]` of which only some features are meant.

    Raises:
      ValueError: the split has no such part.

    >>> Heads("q_proj/kernel", Split.equal(-1, 64, parts=4)).count       # [width, 4 x 16]
    4
    >>> qkv = Split.qkv(-1, heads=8, kv_heads=2, head_dim=16, per_head=True)
    >>> Heads("qkv/kernel", qkv, part=1).count                           # the keys of a fused axis
    2
    """

    path: str
    split: Split
    part: int = 0
    layers: int | None = None
    span: int = 1

    def __post_init__(self) -> None:
        parts = len(self.split.sizes)
        if not 0 <= self.part < parts:
            raise ValueError(f"{self.path} is split into {parts} parts; part {self.part} is none.")

    @property
    def count(self) -> int:
        """How many heads."""
        return self.split.heads[self.part]


@dataclasses.dataclass(frozen=True)
class MHA:
    """Multi-head attention, with a key head for every query head or for a group of them (GQA, MQA).

    A key that a group shares takes the part of `gamma` that all its query heads have in common, the
    largest `gamma` to the power `1 - alpha`, and each query what is left. So every head above the
    threshold comes to it, and a group with a head that is not above keeps its key. With a key for
    every query this is Algorithm 1; for groups the paper says nothing.

    Args:
      q: the queries; several where a head has more parameters than one, such as a bias.
      k: the keys, likewise. Query head `i` meets key head `i // (query heads / key heads)`.
      alpha: how much of `gamma` the query takes, in [0, 1].

    Raises:
      ValueError: `alpha` is out of range, or the heads do not divide.

    >>> q = Heads("q_proj/kernel", Split.equal(-1, 64, parts=4))
    >>> k = Heads("k_proj/kernel", Split.equal(-1, 32, parts=2))
    >>> MHA(q, k).heads
    4
    """

    q: Heads | Sequence[Heads]
    k: Heads | Sequence[Heads]
    alpha: float = 0.5

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
        """What to multiply with, `[layers, heads of it]`, for `gamma`, `[layers, heads]`."""
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

    Args:
      q_nope: the queries without position.
      q_rope: the rotary queries.
      k_nope: the keys without position.

    Raises:
      ValueError: the three differ in their number of heads.

    >>> q = Split(-1, (24, 8), heads=(4, 4), groups=4)                   # [rank, 4 x (24 + 8)]
    >>> kv = Split(-1, (24, 32), heads=(4, 4), groups=4)
    >>> MLA(Heads("q_proj", q), Heads("q_proj", q, part=1), Heads("kv_b_proj", kv)).heads
    4
    """

    q_nope: Heads | Sequence[Heads]
    q_rope: Heads | Sequence[Heads]
    k_nope: Heads | Sequence[Heads]

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
        """What to multiply with, `[layers, heads]`, for `gamma`, `[layers, heads]`."""
        root = _where_over(gamma, jnp.sqrt(gamma))
        rotary = len(_several(self.q_rope))
        factors = [root] * (len(self.described) - rotary) + [gamma] * rotary
        return list(zip(self.described, factors, strict=True))


Attention = MHA | MLA


def qk_clip(
    attentions: Attention | Sequence[Attention], threshold: jax.typing.ArrayLike = 100.0
) -> optax.GradientTransformationExtraArgs:
    """Scale back the queries and keys of heads whose largest logit is above the threshold.

    The last link of a chain, after the learning rate: it changes the updates such that
    `optax.apply_updates` gives the scaled parameters. Its `update` takes

        max_logits    `[layers, heads]`: the largest logit of every head, as the softmax sees it
                      (divided by the root of its features), over all tokens and sequences of the
                      batch, on a mesh in copies; rows in the order of `attentions`

    A head at or below the threshold keeps its update bit for bit, beside clipped heads too, and so
    does one whose largest logit is not finite: a `gamma` of zero would end it for good. (Use
    `optax.apply_if_finite` against steps that overflow.) `max_logits` is of the parameters before
    the step, so after it a clipped head is at the threshold up to what the step itself does.

    Every element is computed from its own parameter and update, in float32 or wider; nothing moves
    between devices. Updates keep their dtype: one in bfloat16 leaves the new parameter off by up to
    2^-8 of the old. Under `optax.MultiSteps` the logits of the last micro-batch decide: hand in the
    maximum over all of them where that matters. Norms between a projection and the logits ("QK
    norm") take the scale back out; such models need no clipping. Memory: no state.

    Args:
      attentions: one attention, or several in the order of the rows of `max_logits`. One whose
        layers are stacked has as many rows, any other has one.
      threshold: the largest logit allowed; 100 is the paper's.

    Raises:
      ValueError: `threshold` is not positive; the attentions differ in heads; (in `init` and
        `update`) a path does not exist, or heads do not fit its shape; (in `update`) `params` or
        `max_logits` are missing, or `max_logits` does not fit.

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
        raise ValueError(f"Attentions must have one number of heads between them, found {counts}.")
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
    """The update that makes `factor (param + update)` of the parameter, where the factor is not 1.

    Selected, not computed: `1 (p + u) - p` is not `u` in floating point.
    """
    dtype = accumulator_dtype(update.dtype)
    old, factor = param.astype(dtype), factor.astype(dtype)
    new = factor * (old + update.astype(dtype)) - old
    return jnp.where(factor < 1, new.astype(update.dtype), update)


def _by_path(factors: Iterable[tuple[Heads, T]]) -> dict[str, list[tuple[Heads, T]]]:
    """Together what lies in one parameter, so that one pass changes it."""
    found: dict[str, list[tuple[Heads, T]]] = {}
    for heads, factor in factors:
        found.setdefault(heads.path, []).append((heads, factor))
    return found


def _laid_out(factors: Sequence[tuple[Heads, jax.Array]], shape: tuple[int, ...]) -> jax.Array:
    """Factors `[layers, heads]` as they broadcast against a parameter; 1 where no head lies."""
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
    # A stack behind its heads is rare; the table has its layers in front.
    return (spread if layers < first else spread.T).reshape(laid)


def _columns(described: Sequence[Heads]) -> np.ndarray:
    """For every entry of the heads' axis its column of the table: 0 for none, then head by head."""
    columns, next_free = np.zeros(described[0].split.total, np.int32), 1
    for heads in described:
        lie = _entries(heads)
        if columns[lie].any():
            raise ValueError(f"{heads.path} has entries that two Heads claim; each may have one.")
        columns[lie] = next_free + np.arange(heads.count, dtype=np.int32)[:, None]
        next_free += heads.count
    return columns


def _entries(heads: Heads) -> np.ndarray:
    """Where along its axis each head lies, `[heads, features]`."""
    split, start = heads.split, sum(heads.split.sizes[: heads.part])
    groups = np.arange(split.total).reshape(split.groups, -1)
    return groups[:, start : start + split.sizes[heads.part]].reshape(heads.count, -1)


def _layers(attentions: Sequence[Attention], leaves: dict[str, Any]) -> list[int]:
    """How many layers each attention has, after checking every parameter that it names."""
    counts: list[int] = []
    taken: set[str] = set()
    for attention in attentions:
        by_path = _by_path((heads, None) for heads in attention.described)
        layers = {
            path: _layers_of([heads for heads, _ in found], leaves)
            for path, found in by_path.items()
        }
        if len(set(layers.values())) > 1:
            raise ValueError(f"An attention has one number of layers, found {layers}.")
        if twice := taken & layers.keys():
            raise ValueError(f"{min(twice)} belongs to two attentions; it may belong to one.")
        taken |= layers.keys()
        counts += set(layers.values())
    return counts


def _layers_of(described: Sequence[Heads], leaves: dict[str, Any]) -> int:
    """How many layers a parameter stacks, after checking all that is said of it."""
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
    """The value where `gamma` clips, else 1: a quotient `1 / 1` need not be 1 on every device."""
    return jnp.where(gamma < 1, value, jnp.ones_like(gamma))


def _several(heads: Heads | Sequence[Heads]) -> tuple[Heads, ...]:
    return (heads,) if isinstance(heads, Heads) else tuple(heads)


def _one_count(described: Sequence[Heads]) -> int:
    """The number of heads of all of them."""
    counts = {heads.path: heads.count for heads in described}
    if len({heads.count for heads in described}) != 1:
        raise ValueError(f"Parameters of one attention must have as many heads, found {counts}.")
    return described[0].count
