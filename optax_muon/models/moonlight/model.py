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
    WHOLE,
    Axes,
    Embed,
    Linear,
    RMSNorm,
    Rotations,
    SwiGLU,
    automatic,
    deinterleave,
    place,
    rotate,
    rotations,
    there,
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
        width: features of the residual stream.
        depth: number of blocks.
        heads: attention heads.
        nope_dim: features of a head's query and key without position.
        rope_dim: features of a head's query and of the shared key that turn with position; even.
        v_dim: features of a head's value.
        kv_rank: features of the latent that keys and values are made of.
        mlp: features inside a dense block's SwiGLU.
        expert_mlp: features inside an expert.
        experts: experts that some tokens go to.
        chosen: how many of them a token goes to.
        shared: experts that all tokens go to, made as one of `shared` times the features.
        context: tokens of one sequence.
        q_rank: features of the latent that queries are made of; None makes them of the input.
        dense_first: blocks at the beginning without experts.
        groups: parts of the experts; a token goes to experts of `groups_chosen` of them only.
        groups_chosen: see `groups`.
        gate_scale: factor of the gates; `balance.gate_scaling(experts, chosen)` is the paper's.
        renormalise: whether a token's gates are divided by their sum.
        vocab: number of tokens; 256 when they are bytes.
        theta: longest wavelength of the rotary positions, divided by 2 pi, in tokens.
        interleaved: whether rotary pairs are neighbours, as in all published checkpoints, or half
            a head apart, as in Llama.
        eps: added to the mean square under the root of RMSNorm, but for latents.
        capacity: tokens that an expert takes, in multiples of its fair share; None drops none.
        query_block: queries whose logits are in memory at once, forward and backward.
        dtype: of the matrix products; parameters, residual stream, norms, router and logits are
            float32.
    """

    width: int
    depth: int
    heads: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    kv_rank: int
    mlp: int
    expert_mlp: int
    experts: int
    chosen: int
    shared: int
    context: int
    q_rank: int | None = None
    dense_first: int = 1
    groups: int = 1
    groups_chosen: int = 1
    gate_scale: float = 1.0
    renormalise: bool = True
    vocab: int = 256
    theta: float = 10_000.0
    interleaved: bool = True
    eps: float = 1e-5
    capacity: float | None = None
    query_block: int = 1024
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for fits, need in (
            (self.rope_dim % 2 == 0, f"rope_dim {self.rope_dim} must be even"),
            (
                0 <= self.dense_first <= self.depth,
                f"dense_first {self.dense_first} must be between 0 and depth, {self.depth}",
            ),
            (self.shared >= 1, f"shared is {self.shared}, it must be at least 1"),
            (
                self.capacity is None or self.capacity > 0,
                f"capacity is {self.capacity}, it must be positive or absent",
            ),
            (
                self.groups == 1
                or (self.experts % self.groups == 0 and self.experts >= 2 * self.groups),
                f"experts {self.experts} must divide into groups of two or more, groups is "
                f"{self.groups}",
            ),
            (
                1 <= self.groups_chosen <= self.groups,
                f"groups_chosen {self.groups_chosen} must be between 1 and groups, {self.groups}",
            ),
            (
                1 <= self.chosen <= self.experts // self.groups * self.groups_chosen,
                f"chosen is {self.chosen}, it must be at least 1 and at most the experts of "
                f"{self.groups_chosen} of {self.groups} groups, "
                f"{self.experts // self.groups * self.groups_chosen}",
            ),
        ):
            if not fits:
                raise UsageError(need)

    @property
    def qk_dim(self) -> int:
        """Features of a head's query."""
        return self.nope_dim + self.rope_dim

    @property
    def moe_depth(self) -> int:
        """Blocks with experts."""
        return self.depth - self.dense_first


CONFIGS = {
    "moonlight-tiny": MoonlightConfig(
        width=128,
        depth=4,
        heads=4,
        nope_dim=24,
        rope_dim=8,
        v_dim=32,
        kv_rank=48,
        mlp=344,
        expert_mlp=88,
        experts=8,
        chosen=2,
        shared=1,
        context=128,
        gate_scale=1.409,
    ),
    "moonlight-small": MoonlightConfig(
        width=256,
        depth=6,
        heads=8,
        nope_dim=24,
        rope_dim=8,
        v_dim=32,
        kv_rank=96,
        mlp=688,
        expert_mlp=176,
        experts=16,
        chosen=4,
        shared=1,
        context=256,
        gate_scale=1.991,
    ),
    "moonlight-16b-a3b": MoonlightConfig(
        width=2048,
        depth=27,
        heads=16,
        nope_dim=128,
        rope_dim=64,
        v_dim=128,
        kv_rank=512,
        mlp=11264,
        expert_mlp=1408,
        experts=64,
        chosen=6,
        shared=2,
        context=8192,
        gate_scale=2.446,
        vocab=163840,
        theta=50_000.0,
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
        x = Embed(config.vocab, config.width, config.dtype, name="embed")(tokens)
        x = place(x.astype(jnp.float32), BATCH, None, None)
        angles = rotations(config.rope_dim, config.theta, tokens.shape[1], config.dtype)
        heads, routing = [], _no_routing(config)
        if config.dense_first:
            stack = _stack(DenseBlock, config.dense_first)
            x, dense = stack(config, name="dense_layers")(x, angles)
            heads.append(dense)
        if config.moe_depth:
            stack = _stack(MixtureBlock, config.moe_depth, 0)
            x, (mixed, routing) = stack(config, name="moe_layers")(x, angles, bias)
            heads.append(mixed)
        x = RMSNorm(config.eps, name="final_norm")(x)
        y = Head(config.vocab, config.dtype, name="lm_head")(x, targets)
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

    return automatic(placed, specs)(key)


def zero_bias(config: MoonlightConfig) -> jax.Array:
    """Router biases before training, `[moe_depth, experts]`."""
    return jnp.zeros([config.moe_depth, config.experts], jnp.float32)


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
    over = P(there(BATCH), None, there("tensor"))
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
    return _applied(model, params, bias, P(there(BATCH)), tokens, targets)


def logits(
    model: Moonlight, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """The logits of `forward` alone."""
    return forward(model, params, tokens, bias)[0]


class Head(nn.Module):
    """Logits of features, or the losses that they make.

    Args:
        vocab: number of tokens.
        dtype: of the product.
    """

    vocab: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        """Logits `[b, t, vocab]` of `x`, `[b, t, width]`; losses `[b, t]` of targets `[b, t]`."""
        normal = nn.initializers.lecun_normal()
        kernel = self.param("kernel", normal, (x.shape[-1], self.vocab)).astype(self.dtype)
        x = x.astype(self.dtype)
        if targets is not None:
            return cross_entropy(x, kernel, targets)
        y = x @ place(kernel, None, "tensor")
        return place(y.astype(jnp.float32), BATCH, None, "tensor")


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
        h = RMSNorm(config.eps, name="mlp_norm")(x)
        y = SwiGLU(config.mlp, config.dtype, name="mlp")(h)
        return place(x + y.astype(x.dtype), BATCH, None, None), heads


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
        h = RMSNorm(config.eps, name="mlp_norm")(x)
        routing = _router(config)(h, bias)
        experts = Experts(
            config.experts, config.expert_mlp, config.dtype, config.capacity, name="experts"
        )
        shared = SwiGLU(config.shared * config.expert_mlp, config.dtype, name="shared_experts")
        y = experts(h, routing.chosen, routing.gates) + shared(h)
        x = place(x + y.astype(x.dtype), BATCH, None, None)
        return x, (heads, (routing.load, routing.entropy))


class LatentAttention(nn.Module):
    """Causal multi-head latent attention."""

    config: MoonlightConfig

    @nn.compact
    def __call__(self, x: jax.Array, angles: Rotations) -> tuple[jax.Array, Heads]:
        """Attend over `x`, `[b, t, width]`."""
        config, (b, t, _) = self.config, x.shape
        h = x
        if config.q_rank is not None:
            h = self._linear("q_a_proj", config.q_rank)(x)
            h = RMSNorm(LATENT_EPS, name="q_a_norm")(h)
        to_heads = "q_proj" if config.q_rank is None else "q_b_proj"
        q = self._to_heads(to_heads, config.qk_dim)(h).reshape(b, t, config.heads, -1)
        q_nope, q_rope = jnp.split(q, [config.nope_dim], axis=-1)
        latent = self._linear("kv_a_proj", config.kv_rank + config.rope_dim)(x)
        latent, k_rope = jnp.split(latent, [config.kv_rank], axis=-1)
        latent = RMSNorm(LATENT_EPS, name="kv_a_norm")(latent)
        kv = self._to_heads("kv_b_proj", config.nope_dim + config.v_dim)(latent)
        k_nope, v = jnp.split(kv.reshape(b, t, config.heads, -1), [config.nope_dim], axis=-1)
        q_rope, k_rope = self._turn(q_rope, angles), self._turn(k_rope[:, :, None], angles)
        k_rope = jnp.broadcast_to(k_rope, (b, t, config.heads, config.rope_dim))
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)
        y, heads = attention(q, k, v, config.query_block)
        output = Linear(config.width, config.dtype, rows="tensor", name="o_proj")
        return output(y.reshape(b, t, -1)), heads

    def _linear(self, name: str, features: int) -> Linear:
        return Linear(features, self.config.dtype, name=name)

    def _to_heads(self, name: str, features: int) -> Linear:
        """A matrix that makes so many features for each head."""
        return Linear(self.config.heads * features, self.config.dtype, cols="tensor", name=name)

    def _turn(self, x: jax.Array, angles: Rotations) -> jax.Array:
        return rotate(deinterleave(x) if self.config.interleaved else x, angles)


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
    return Counts(total, total - routed + routed * config.chosen // config.experts)


def per_head_views(config: MoonlightConfig) -> dict[str, optax_muon.View]:
    """Views that give Muon a matrix per head: its query, and apart its key and its value.

    For `muon(..., views=per_head_views(config))` and `label`; what they leave out is decided by
    role. A head's rotary and other query features are one matrix.

    >>> views = per_head_views(CONFIGS["moonlight-tiny"])
    >>> views["*/kv_b_proj/kernel"].bind((3, 48, 224)).blocks
    (Block(batch=12, rows=48, cols=24), Block(batch=12, rows=48, cols=32))
    """
    heads = config.heads
    q = optax_muon.Split.equal(-1, heads * config.qk_dim, parts=heads)
    kv = optax_muon.Split(-1, (config.nope_dim, config.v_dim), (heads, heads), groups=heads)
    to_heads = "q_proj" if config.q_rank is None else "q_b_proj"
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
    heads = config.heads
    q = optax_muon.Split(-1, (config.nope_dim, config.rope_dim), (heads, heads), groups=heads)
    kv = optax_muon.Split(-1, (config.nope_dim, config.v_dim), (heads, heads), groups=heads)
    to_heads = "q_proj" if config.q_rank is None else "q_b_proj"

    def stack(name: str) -> optax_muon.MLA:
        queries, keys = f"{name}/attn/{to_heads}/kernel", f"{name}/attn/kv_b_proj/kernel"
        return optax_muon.MLA(
            q_nope=optax_muon.Heads(queries, q, layers=0),
            q_rope=optax_muon.Heads(queries, q, part=1, layers=0),
            k_nope=optax_muon.Heads(keys, kv, layers=0),
        )

    depths = {"dense_layers": config.dense_first, "moe_layers": config.moe_depth}
    return tuple(stack(name) for name, depth in depths.items() if depth)


# ---- where parameters lie ------------------------------------------------------------------------

_INTO_HEADS, _OUT_OF_HEADS = (WHOLE, "tensor"), ("tensor", WHOLE)
_SPECS: dict[str, tuple[Axes, ...]] = {
    "embedding": ("tensor", WHOLE),
    "experts/gate_proj": ("expert", "fsdp", "tensor"),
    "experts/up_proj": ("expert", "fsdp", "tensor"),
    "experts/down_proj": ("expert", "tensor", "fsdp"),
    "o_proj/kernel": _OUT_OF_HEADS,
    "down_proj/kernel": _OUT_OF_HEADS,
    "q_a_proj/kernel": (WHOLE, None),
    "kv_a_proj/kernel": (WHOLE, None),
    "router/kernel": (WHOLE, None),
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
    shapes = jax.eval_shape(automatic(initial, P()), jax.eval_shape(jax.random.key, 0))
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
        inputs, *targets = (place(each, BATCH, None) for each in tokens)
        return cast(
            tuple[jax.Array, ForwardStats], model.apply({"params": params}, inputs, bias, *targets)
        )

    return automatic(apply, (over, P()))(params, bias, *tokens)


def _attended(config: MoonlightConfig, x: jax.Array, angles: Rotations) -> tuple[jax.Array, Heads]:
    """The residual stream after attention; called inside a block, whose children these become."""
    h = RMSNorm(config.eps, name="attn_norm")(x)
    y, heads = LatentAttention(config, name="attn")(h, angles)
    return place(x + y.astype(x.dtype), BATCH, None, None), heads


def _router(config: MoonlightConfig) -> Router:
    return Router(
        config.experts,
        config.chosen,
        config.groups,
        config.groups_chosen,
        config.renormalise,
        config.gate_scale,
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
    rows = math.prod(mesh.shape[axis] for axis in there(BATCH) or ())
    return model.init(key, jnp.zeros([rows, 1], jnp.int32), zero_bias(model.config))["params"]


def _no_routing(config: MoonlightConfig) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros([0, config.experts], jnp.int32), jnp.zeros([0], jnp.float32)
