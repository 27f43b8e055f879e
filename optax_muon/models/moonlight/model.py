"""Moonlight in Flax: the DeepSeek-V3 decoder, latent attention and a mixture of experts.

One block on the residual stream `x`, of shape `[b, t, width]`, is

    x = x + o_proj(attention(q, k, v)),        h = attn_norm(x)
    x = x + mlp(mlp_norm(x))

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) keeps one short vector per
token, from which every head makes its keys and values, and one rotary key that all heads share:

    latent, k_rope = split(kv_a_proj(h))
    k_nope, v      = split(kv_b_proj(kv_a_norm(latent)))          per head
    q_nope, q_rope = split(q_proj(h))                             per head
    logits         = (q_nope k_nope + rope(q_rope) rope(k_rope)) / sqrt(nope_dim + rope_dim)

The first `dense_first` blocks have a plain SwiGLU for `mlp`, the others experts that all tokens go
to and experts that some tokens go to (`mixture.py`). Blocks of a kind are stacked by `nn.scan`, so
that experts are one array `[layers, experts, rows, cols]`. The sizes are those of "Muon is Scalable
for LLM Training", arXiv 2502.16982, section 3.3, and of the checkpoints published with it, which
`huggingface.py` reads and writes. The router's biases are no parameters: they come in beside the
tokens and `balance.update_bias` moves them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.errors import UsageError
from optax_muon.matrices.paths import named_leaves
from optax_muon.models.abstract import Tree, laid_out
from optax_muon.models.cross_entropy import cross_entropy
from optax_muon.models.layers import (
    BATCH,
    FSDP_AXES,
    Axes,
    Embed,
    Linear,
    RMSNorm,
    Rotations,
    SwiGLU,
    constrain,
    deinterleave,
    present_axes,
    rotate,
    rotations,
    with_auto_axes,
)
from optax_muon.models.moe.experts import Experts, Router

LATENT_EPS = 1e-6
"""Of the norms of latents, whatever `eps` is: the published code never passes it on to them."""

HIGH_LOGIT = 100.0
"""Attention logits above it are counted (arXiv 2502.16982, section 3.3, figure 7)."""


@dataclasses.dataclass(frozen=True)
class MoonlightConfig:
    """The sizes of a Moonlight.

    Attributes:
        hidden_size: features of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: attention heads.
        qk_nope_head_dim: features of a head's query and key without position.
        qk_rope_head_dim: features of a head's query and of the shared key that turn with position; even.
        v_head_dim: features of a head's value.
        kv_lora_rank: features of the latent that keys and values are made of.
        intermediate_size: features inside a dense block's SwiGLU.
        moe_intermediate_size: features inside an expert.
        n_routed_experts: experts that some tokens go to.
        num_experts_per_tok: how many of them a token goes to.
        n_shared_experts: experts that all tokens go to, made as one of `shared` times the features.
        context: tokens of one sequence.
        q_lora_rank: features of the latent that queries are made of; None makes them of the input.
        first_k_dense_replace: blocks at the beginning without experts.
        n_group: parts of the experts; a token goes to experts of `groups_chosen` of them only.
        topk_group: see `groups`.
        routed_scaling_factor: factor of the gates; `balance.gate_scaling(experts, chosen)` is the paper's.
        norm_topk_prob: whether a token's gates are divided by their sum.
        vocab_size: number of tokens; 256 when they are bytes.
        rope_theta: longest wavelength of the rotary positions, divided by 2 pi, in tokens.
        rope_interleave: whether rotary pairs are neighbours, as in all published checkpoints, or half
            a head apart, as in Llama.
        rms_norm_eps: added to the mean square under the root of RMSNorm, but for latents.
        capacity: tokens that an expert takes, in multiples of its fair share; None drops none.
        query_block: queries whose logits are in memory at once, forward and backward.
        dtype: of the matrix products; parameters, residual stream, norms, router and logits are
            float32.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    context: int
    q_lora_rank: int | None = None
    first_k_dense_replace: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    vocab_size: int = 256
    rope_theta: float = 10_000.0
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-5
    capacity: float | None = None
    query_block: int = 1024
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for fits, need in (
            (
                self.qk_rope_head_dim % 2 == 0,
                f"qk_rope_head_dim {self.qk_rope_head_dim} must be even",
            ),
            (
                0 <= self.first_k_dense_replace <= self.num_hidden_layers,
                f"first_k_dense_replace {self.first_k_dense_replace} must be between 0 and num_hidden_layers, {self.num_hidden_layers}",
            ),
            (
                self.n_shared_experts >= 1,
                f"n_shared_experts is {self.n_shared_experts}, it must be at least 1",
            ),
            (
                self.capacity is None or self.capacity > 0,
                f"capacity is {self.capacity}, it must be positive or absent",
            ),
            (
                self.n_group == 1
                or (
                    self.n_routed_experts % self.n_group == 0
                    and self.n_routed_experts >= 2 * self.n_group
                ),
                f"n_routed_experts {self.n_routed_experts} must divide into groups of two or more, n_group is "
                f"{self.n_group}",
            ),
            (
                1 <= self.topk_group <= self.n_group,
                f"topk_group {self.topk_group} must be between 1 and n_group, {self.n_group}",
            ),
            (
                1
                <= self.num_experts_per_tok
                <= self.n_routed_experts // self.n_group * self.topk_group,
                f"num_experts_per_tok is {self.num_experts_per_tok}, it must be at least 1 and at most the experts of "
                f"{self.topk_group} of {self.n_group} groups, "
                f"{self.n_routed_experts // self.n_group * self.topk_group}",
            ),
        ):
            if not fits:
                raise UsageError(need)

    @property
    def qk_head_dim(self) -> int:
        """Features of a head's query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Blocks with experts."""
        return self.num_hidden_layers - self.first_k_dense_replace


CONFIGS = {
    "moonlight-tiny": MoonlightConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=32,
        kv_lora_rank=48,
        intermediate_size=344,
        moe_intermediate_size=88,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        context=128,
        routed_scaling_factor=1.409,
    ),
    "moonlight-small": MoonlightConfig(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=32,
        kv_lora_rank=96,
        intermediate_size=688,
        moe_intermediate_size=176,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        context=256,
        routed_scaling_factor=1.991,
    ),
    "moonlight-16b-a3b": MoonlightConfig(
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        kv_lora_rank=512,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        context=8192,
        routed_scaling_factor=2.446,
        vocab_size=163840,
        rope_theta=50_000.0,
        dtype="bfloat16",
    ),
}
"""The sizes by name: the paper's, and small ones that train on a CPU in minutes and in hours."""


class ForwardStats(NamedTuple):
    """What a forward pass says of itself; costs nothing where it is not used."""

    max_logits: jax.Array
    """Largest attention logit of each head, `[depth, heads]` float32."""
    high_logits: jax.Array
    """Share of each head's logits above `HIGH_LOGIT`, of those not masked, `[depth, heads]`."""
    load: jax.Array
    """How often each expert was chosen, `[moe_depth, experts]` int32."""
    entropy: jax.Array
    """Mean entropy of the router's scores, as shares, in nats, `[moe_depth]`."""


class Moonlight(nn.Module):
    """Logits of the next token at every position, and a report.

    Args:
        config: the sizes.

    Called with tokens `[b, t]` (int32) and router biases `[moe_depth, experts]` it returns float32
    logits `[b, t, vocab]` and a `ForwardStats`; position `i` sees tokens `0 .. i`. With targets,
    `[b, t]`
    int32, it returns their cross-entropy, `[b, t]` in nats, instead of logits. On a mesh call it
    through `forward` and `losses`.

    >>> model = Moonlight(CONFIGS["moonlight-tiny"])
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> shapes["moe_layers"]["experts"]["gate_proj"].shape
    (3, 8, 128, 88)
    """

    config: MoonlightConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, bias: jax.Array, targets: jax.Array | None = None
    ) -> tuple[jax.Array, ForwardStats]:
        """Logits of tokens, or losses of targets."""
        config = self.config
        x = Embed(config.vocab_size, config.hidden_size, config.dtype, name="embed")(tokens)
        x = constrain(x.astype(jnp.float32), BATCH, None, None)
        angles = rotations(
            config.qk_rope_head_dim, config.rope_theta, tokens.shape[1], config.dtype
        )
        heads, routing = [], _no_routing(config)
        if config.first_k_dense_replace:
            stack = _stack(DenseBlock, config.first_k_dense_replace)
            x, dense = stack(config, name="dense_layers")(x, angles)
            heads.append(dense)
        if config.num_moe_layers:
            stack = _stack(MixtureBlock, config.num_moe_layers, 0)
            x, (mixed, routing) = stack(config, name="moe_layers")(x, angles, bias)
            heads.append(mixed)
        x = RMSNorm(config.rms_norm_eps, name="final_norm")(x)
        y = Head(config.vocab_size, config.dtype, name="lm_head")(x, targets)
        largest, high = map(jnp.concatenate, zip(*heads, strict=True))
        return y, ForwardStats(largest, high, *routing)


def init(model: Moonlight, key: jax.Array) -> optax.Params:
    """Parameters before training; on the ambient mesh, if there is one, as `shardings` says."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _initial(model, key)
    specs = jax.tree.map(lambda leaf: leaf.on(mesh).sharding.spec, leaves(model.config))

    def placed(key: jax.Array) -> optax.Params:
        return jax.lax.with_sharding_constraint(_initial(model, key), specs)

    return with_auto_axes(placed, specs)(key)


def zero_bias(config: MoonlightConfig) -> jax.Array:
    """Router biases before training, `[moe_depth, experts]`."""
    return jnp.zeros([config.num_moe_layers, config.n_routed_experts], jnp.float32)


def forward(
    model: Moonlight, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, ForwardStats]:
    """Logits `[b, t, vocab]` and the report, on any mesh.

    Args:
        model: the Moonlight.
        params: its parameters; on a mesh as `shardings` lays them out.
        tokens: `[b, t]` int32; on a mesh, `b` is a multiple of the devices along `BATCH`.
        bias: of the router, `[moe_depth, experts]` float32; zero if absent.

    Returns:
        Logits and report. On a mesh the logits lie over `BATCH` and `tensor`, the report in copies.

    Raises:
        UsageError: when the parameters lie on a mesh and there is no ambient one.
    """
    over = P(present_axes(BATCH), None, present_axes("tensor"))
    return _applied(model, params, bias, over, tokens)


def losses(
    model: Moonlight,
    params: optax.Params,
    tokens: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, ForwardStats]:
    """Cross-entropy of the targets under the logits of `forward`, and the report.

    The logits are never in memory all at once (`losses.py`), and are not rounded to the dtype of
    the products.

    Args:
        model: the Moonlight.
        params: as of `forward`.
        tokens: as of `forward`.
        targets: what comes after each token, `[b, t]` int32.
        bias: as of `forward`.

    Returns:
        Losses `[b, t]` in nats, float32, and report. On a mesh the losses lie over `BATCH`.

    Raises:
        UsageError: as `forward`.
    """
    return _applied(model, params, bias, P(present_axes(BATCH)), tokens, targets)


def logits(
    model: Moonlight, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """The logits of `forward` alone."""
    return forward(model, params, tokens, bias)[0]


class Head(nn.Module):
    """Logits of features, or the losses that they make.

    Args:
        vocab_size: number of tokens.
        dtype: of the product.
    """

    vocab_size: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        """Logits `[b, t, vocab]` of `x`, `[b, t, width]`; losses `[b, t]` of targets `[b, t]`."""
        normal = nn.initializers.lecun_normal()
        kernel = self.param("kernel", normal, (x.shape[-1], self.vocab_size)).astype(self.dtype)
        x = x.astype(self.dtype)
        if targets is not None:
            return cross_entropy(x, kernel, targets)
        y = x @ constrain(kernel, None, "tensor")
        return constrain(y.astype(jnp.float32), BATCH, None, "tensor")


Heads = tuple[jax.Array, jax.Array]
"""A block's `ForwardStats.max_logits` and `ForwardStats.high_logits`, `[heads]` each."""


class DenseBlock(nn.Module):
    """A layer without experts, in the form `nn.scan` asks for: `(x, angles) -> (x, heads)`."""

    config: MoonlightConfig

    @nn.compact
    def __call__(self, x: jax.Array, angles: Rotations) -> tuple[jax.Array, Heads]:
        """Add attention, then the MLP, to the residual stream."""
        config = self.config
        x, heads = _attended(config, x, angles)
        h = RMSNorm(config.rms_norm_eps, name="mlp_norm")(x)
        y = SwiGLU(config.intermediate_size, config.dtype, name="mlp")(h)
        return constrain(x + y.astype(x.dtype), BATCH, None, None), heads


class MixtureBlock(nn.Module):
    """A layer with experts: `(x, angles, bias) -> (x, (heads, (load, entropy)))`."""

    config: MoonlightConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Rotations, bias: jax.Array
    ) -> tuple[jax.Array, tuple[Heads, tuple[jax.Array, jax.Array]]]:
        """Add attention, then the experts, to the residual stream."""
        config = self.config
        x, heads = _attended(config, x, angles)
        h = RMSNorm(config.rms_norm_eps, name="mlp_norm")(x)
        routing = _router(config)(h, bias)
        experts = Experts(
            config.n_routed_experts,
            config.moe_intermediate_size,
            config.dtype,
            config.capacity,
            name="experts",
        )
        shared = SwiGLU(
            config.n_shared_experts * config.moe_intermediate_size,
            config.dtype,
            name="shared_experts",
        )
        y = experts(h, routing.chosen, routing.gates) + shared(h)
        x = constrain(x + y.astype(x.dtype), BATCH, None, None)
        return x, (heads, (routing.load, routing.entropy))


class LatentAttention(nn.Module):
    """Causal multi-head latent attention."""

    config: MoonlightConfig

    @nn.compact
    def __call__(self, x: jax.Array, angles: Rotations) -> tuple[jax.Array, Heads]:
        """Attend over `x`, `[b, t, width]`."""
        config, (b, t, _) = self.config, x.shape
        h = x
        if config.q_lora_rank is not None:
            h = self._linear("q_a_proj", config.q_lora_rank)(x)
            h = RMSNorm(LATENT_EPS, name="q_a_norm")(h)
        to_heads = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        q = self._to_heads(to_heads, config.qk_head_dim)(h).reshape(
            b, t, config.num_attention_heads, -1
        )
        q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        latent = self._linear("kv_a_proj", config.kv_lora_rank + config.qk_rope_head_dim)(x)
        latent, k_rope = jnp.split(latent, [config.kv_lora_rank], axis=-1)
        latent = RMSNorm(LATENT_EPS, name="kv_a_norm")(latent)
        kv = self._to_heads("kv_b_proj", config.qk_nope_head_dim + config.v_head_dim)(latent)
        k_nope, v = jnp.split(
            kv.reshape(b, t, config.num_attention_heads, -1), [config.qk_nope_head_dim], axis=-1
        )
        q_rope, k_rope = self._turn(q_rope, angles), self._turn(k_rope[:, :, None], angles)
        k_rope = jnp.broadcast_to(
            k_rope, (b, t, config.num_attention_heads, config.qk_rope_head_dim)
        )
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)
        y, heads = attention(q, k, v, config.query_block)
        output = Linear(config.hidden_size, config.dtype, rows="tensor", name="o_proj")
        return output(y.reshape(b, t, -1)), heads

    def _linear(self, name: str, features: int) -> Linear:
        return Linear(features, self.config.dtype, name=name)

    def _to_heads(self, name: str, features: int) -> Linear:
        """A matrix that makes so many features for each head."""
        return Linear(
            self.config.num_attention_heads * features, self.config.dtype, cols="tensor", name=name
        )

    def _turn(self, x: jax.Array, angles: Rotations) -> jax.Array:
        return rotate(deinterleave(x) if self.config.rope_interleave else x, angles)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, query_block: int
) -> tuple[jax.Array, Heads]:
    """Causal attention, and what its logits were.

    Args:
        q: queries, `[b, t, heads, d]`.
        k: keys, `[b, t, heads, d]`.
        v: values, `[b, t, heads, e]`.
        query_block: queries whose logits, `[query_block, b, heads, t]` in float32, are in memory at
            once; the backward pass makes them again.

    Returns:
        `[b, t, heads, e]`, and of each head the largest logit and the share above `HIGH_LOGIT`.
    """
    positions = jnp.arange(q.shape[1])

    @jax.checkpoint
    def attend(query: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One position, all sequences and heads."""
        one, position = query
        logits = jnp.einsum("bhd,bshd->bhs", one, k, preferred_element_type=jnp.float32)
        seen = (positions <= position)[None, None]
        logits = jnp.where(seen, logits * (q.shape[-1] ** -0.5), -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        seen_logits = jax.lax.stop_gradient(logits)
        high = (seen_logits > HIGH_LOGIT).astype(jnp.float32)
        y = jnp.einsum("bhs,bshe->bhe", weights, v)
        return y, seen_logits.max(axis=2), high.sum(axis=2)

    queries = (q.swapaxes(0, 1), positions)
    y, largest, high = jax.lax.map(attend, queries, batch_size=query_block)
    pairs = q.shape[0] * q.shape[1] * (q.shape[1] + 1) / 2
    # Over sequences, and so over devices, once and not for every block.
    return y.swapaxes(0, 1), (largest.max(axis=(0, 1)), high.sum(axis=(0, 1)) / pairs)


class Counts(NamedTuple):
    """Parameters of a model, embedding and head left out, as the paper counts."""

    total: int
    """All of them."""
    active: int
    """Those that one token meets: of the experts that some tokens go to, `chosen`."""


def count(config: MoonlightConfig) -> Counts:
    """Count parameters from shapes alone.

    >>> total, active = count(CONFIGS["moonlight-16b-a3b"])
    >>> f"{total / 1e9:.2f} {active / 1e9:.2f}"
    '15.29 2.24'
    """
    sizes = {path: math.prod(leaf.shape) for path, leaf in named_leaves(leaves(config)).items()}
    total = sum(sizes.values()) - sizes["embed/embedding"] - sizes["lm_head/kernel"]
    routed = sum(size for path, size in sizes.items() if "/experts/" in path)
    return Counts(
        total, total - routed + routed * config.num_experts_per_tok // config.n_routed_experts
    )


def per_head_views(config: MoonlightConfig) -> dict[str, optax_muon.View]:
    """Views that give Muon a matrix per head: its query, and apart its key and its value.

    For `muon(..., views=per_head_views(config))` and `label`; what they leave out is decided by
    role. A head's rotary and other query features are one matrix.

    >>> views = per_head_views(CONFIGS["moonlight-tiny"])
    >>> views["*/kv_b_proj/kernel"].on((3, 48, 224)).blocks
    (Block(batch=12, rows=48, cols=24), Block(batch=12, rows=48, cols=32))
    """
    heads = config.num_attention_heads
    q = optax_muon.Split.equal(-1, heads * config.qk_head_dim, parts=heads)
    kv = optax_muon.Split(
        -1, (config.qk_nope_head_dim, config.v_head_dim), (heads, heads), groups=heads
    )
    to_heads = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    return {
        f"*/{to_heads}/kernel": optax_muon.View(-2, -1, q),
        "*/kv_b_proj/kernel": optax_muon.View(-2, -1, kv),
    }


def attentions(config: MoonlightConfig) -> tuple[optax_muon.MLA, ...]:
    """Where the heads lie, for `qk_clip`: it takes `ForwardStats.max_logits` as it is.

    >>> tx = optax_muon.qk_clip(attentions(CONFIGS["moonlight-tiny"]))
    >>> [clipped.q_rope.path for clipped in attentions(CONFIGS["moonlight-tiny"])]
    ['dense_layers/attn/q_proj/kernel', 'moe_layers/attn/q_proj/kernel']
    """
    heads = config.num_attention_heads
    q = optax_muon.Split(
        -1, (config.qk_nope_head_dim, config.qk_rope_head_dim), (heads, heads), groups=heads
    )
    kv = optax_muon.Split(
        -1, (config.qk_nope_head_dim, config.v_head_dim), (heads, heads), groups=heads
    )
    to_heads = "q_proj" if config.q_lora_rank is None else "q_b_proj"

    def stack(name: str) -> optax_muon.MLA:
        queries, keys = f"{name}/attn/{to_heads}/kernel", f"{name}/attn/kv_b_proj/kernel"
        return optax_muon.MLA(
            q_nope=optax_muon.Heads(queries, q, layers=0),
            q_rope=optax_muon.Heads(queries, q, part=1, layers=0),
            k_nope=optax_muon.Heads(keys, kv, layers=0),
        )

    depths = {"dense_layers": config.first_k_dense_replace, "moe_layers": config.num_moe_layers}
    return tuple(stack(name) for name, depth in depths.items() if depth)


# ---- where parameters lie ------------------------------------------------------------------------

_INTO_HEADS, _OUT_OF_HEADS = (FSDP_AXES, "tensor"), ("tensor", FSDP_AXES)
_SPECS: dict[str, tuple[Axes, ...]] = {
    "embedding": ("tensor", FSDP_AXES),
    "experts/gate_proj": ("expert", "fsdp", "tensor"),
    "experts/up_proj": ("expert", "fsdp", "tensor"),
    "experts/down_proj": ("expert", "tensor", "fsdp"),
    "o_proj/kernel": _OUT_OF_HEADS,
    "down_proj/kernel": _OUT_OF_HEADS,
    "q_a_proj/kernel": (FSDP_AXES, None),
    "kv_a_proj/kernel": (FSDP_AXES, None),
    "router/kernel": (FSDP_AXES, None),
    "kernel": _INTO_HEADS,
    "scale": (None,),
}
"""Mesh axes of a parameter's own axes, by the end of its path; the first that fits decides."""


def leaves(config: MoonlightConfig) -> Tree:
    """Every parameter's shape and spec: `shapes.leaves_on(leaves(config), mesh)` are arrays of it.

    Experts lie over `expert` and `fsdp`, everything else over both together; heads and hidden units
    over `tensor`; norms in copies.

    >>> leaves(CONFIGS["moonlight-tiny"])["moe_layers"]["experts"]["down_proj"]
    Leaf(shape=(3, 8, 88, 128), spec=P...(None, 'expert', 'tensor', 'fsdp'))
    """
    initial = functools.partial(_initial, Moonlight(config))
    # No key is made: the ambient mesh may be of no computer.
    shapes = jax.eval_shape(with_auto_axes(initial, P()), jax.eval_shape(jax.random.key, 0))
    return laid_out(shapes, _SPECS)


def shardings(config: MoonlightConfig, mesh: Mesh) -> optax.Params:
    """A `NamedSharding` for every parameter; mesh axes that the mesh lacks are left out.

    Args:
        config: the sizes.
        mesh: with any of the axes `data`, `fsdp`, `expert` and `tensor`.
    """
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf.on(mesh).sharding.spec), leaves(config)
    )


# ---- parts ---------------------------------------------------------------------------------------


def _applied(
    model: Moonlight, params: optax.Params, bias: jax.Array | None, over: P, *tokens: jax.Array
) -> tuple[jax.Array, ForwardStats]:
    """The model on any mesh, what it returns besides the report lying over `over`."""
    given = jax.typeof(jax.tree.leaves(params)[0]).sharding.mesh
    if given.size > 1 and jax.sharding.get_abstract_mesh().empty:
        raise UsageError(f"parameters lie on a mesh of {given.axis_names}; use jax.set_mesh(mesh)")
    if bias is None:
        bias = zero_bias(model.config)

    def apply(
        params: optax.Params, bias: jax.Array, *tokens: jax.Array
    ) -> tuple[jax.Array, ForwardStats]:
        inputs, *targets = (constrain(each, BATCH, None) for each in tokens)
        return cast(
            tuple[jax.Array, ForwardStats], model.apply({"params": params}, inputs, bias, *targets)
        )

    return with_auto_axes(apply, (over, P()))(params, bias, *tokens)


def _attended(config: MoonlightConfig, x: jax.Array, angles: Rotations) -> tuple[jax.Array, Heads]:
    """The residual stream after attention; called inside a block, whose children these become."""
    h = RMSNorm(config.rms_norm_eps, name="attn_norm")(x)
    y, heads = LatentAttention(config, name="attn")(h, angles)
    return constrain(x + y.astype(x.dtype), BATCH, None, None), heads


def _router(config: MoonlightConfig) -> Router:
    return Router(
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
        name="router",
    )


def _stack(block: type[nn.Module], length: int, *in_axes: int) -> type[nn.Module]:
    """`length` blocks over one leading parameter axis, each made again in the backward pass.

    The block's arguments after `x` and the angles are stacked too, along `in_axes`.
    """
    return nn.scan(
        nn.remat(block, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, *in_axes),
        length=length,
    )


def _initial(model: Moonlight, key: jax.Array) -> optax.Params:
    """Parameters, wherever they come to lie; made with a sequence on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = math.prod(mesh.shape[axis] for axis in present_axes(BATCH) or ())
    return model.init(key, jnp.zeros([rows, 1], jnp.int32), zero_bias(model.config))["params"]


def _no_routing(config: MoonlightConfig) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros([0, config.n_routed_experts], jnp.int32), jnp.zeros([0], jnp.float32)
