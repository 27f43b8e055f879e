"""The Llama decoder in Flax: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One block on the residual stream `x`, of shape `[b, t, hidden_size]`, is

    x = x + o_proj(attention(rope(q_proj(h)), rope(k_proj(h)), v_proj(h))),  h = attn_norm(x)
    x = x + down_proj(silu(gate_proj(h)) * up_proj(h)),                      h = mlp_norm(x)

(Touvron et al., LLaMA, arXiv 2302.13971, section 2.2; rotary positions: Su et al., arXiv
2104.09864, section 3.4.2; grouped queries: Ainslie et al., arXiv 2305.13245, section 2.2). No
layer has a bias. `nn.scan` stacks the blocks, so a hidden kernel is one array
`[num_hidden_layers, in, out]`, which Muon takes as a batch of matrices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.models import abstract
from optax_muon.models.layers import Linear, RMSNorm, Rotations, SwiGLU, rotate, rotations
from optax_muon.models.mesh import BATCH, FSDP_AXES, constrain, present_axes, with_auto_axes
from optax_muon.models.sizes import size_refusals
from optax_muon.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama, under their names in Hugging Face's `LlamaConfig`.

    `context` has no such name: `max_position_embeddings` bounds what a checkpoint was trained for,
    this is the length of the sequences at hand.
    """

    hidden_size: int
    """Features of the residual stream."""
    num_hidden_layers: int
    """Decoder blocks."""
    num_attention_heads: int
    """Query heads; each has `hidden_size / num_attention_heads` features, an even number."""
    num_key_value_heads: int
    """Key and value heads, a divisor of `num_attention_heads`; fewer is grouped-query attention."""
    intermediate_size: int
    """Features inside the SwiGLU; `8 / 3 * hidden_size` costs as much as a two-matrix MLP of four
    times the width."""
    context: int
    """Tokens of one training sequence."""
    vocab_size: int = 256
    """Number of tokens; 256 when they are bytes."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths: the longest is `2 pi rope_theta` tokens."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square under the root of RMSNorm."""
    tie_word_embeddings: bool = False
    """Whether the embedding is also the output layer."""
    dtype: str = "float32"
    """Dtype of the matrix products; parameters, residual stream, norms and logits are float32."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none, and sizes that do not divide."""
        for refusal in size_refusals(self):
            raise ValueError(refusal)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads) or heads % kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_attention_heads, "
                f"and num_attention_heads {heads} of num_key_value_heads {kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_attention_heads


CONFIGS = {
    "llama3-1b": LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        context=8192,
        vocab_size=128256,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
    "llama3-8b": LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        context=8192,
        vocab_size=128256,
        rope_theta=500_000.0,
        dtype="bfloat16",
    ),
}
"""Llama 3.2 1B and Llama 3 8B (arXiv 2407.21783, table 3), without the 1B's scaling of rotary
positions."""

SPECS: abstract.Specs = {
    "embedding": ("tensor", FSDP_AXES),
    "o_proj/kernel": ("tensor", FSDP_AXES),
    "down_proj/kernel": ("tensor", FSDP_AXES),
    "kernel": (FSDP_AXES, "tensor"),
    "scale": (None,),
}
"""Mesh axes of every parameter, by the end of its path."""


@dataclasses.dataclass(frozen=True)
class Llama:
    """The Llama of these sizes; satisfies `Model`.

    >>> model = Llama(LlamaConfig(16, 2, 2, num_key_value_heads=1, intermediate_size=32, context=8))
    >>> params = model.init(jax.random.key(0))
    >>> params["layers"]["attn"]["q_proj"]["kernel"].shape
    (2, 16, 16)
    >>> logits, stats = model.forward(params, jnp.zeros([1, 8], jnp.int32))
    >>> logits.shape, stats, model.zero_bias()
    ((1, 8, 256), None, None)
    """

    config: LlamaConfig
    """The sizes."""

    kind: ClassVar[str] = "Llama"
    has_router: ClassVar[bool] = False
    reports_logits: ClassVar[bool] = False
    huggingface_type: ClassVar[str | None] = None

    def init(self, key: jax.Array) -> optax.Params:
        """Initial parameters, float32; on the ambient mesh, if any, as `shardings` says."""
        return abstract.initialize(self._initial, SPECS, key)

    def zero_bias(self) -> None:
        """A Llama has no router."""
        return None

    def forward(
        self, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """Logits `[b, t, vocab_size]` float32 of tokens `[b, t]`, on any mesh."""
        del bias

        def apply(params: optax.Params, tokens: jax.Array) -> jax.Array:
            tokens = constrain(tokens, BATCH, None)
            logits = LlamaDecoder(self.config).apply({"params": params}, tokens)
            return constrain(cast(jax.Array, logits), BATCH, None, None)

        return with_auto_axes(apply, P(present_axes(BATCH)))(params, tokens), None

    def losses(
        self,
        params: optax.Params,
        tokens: jax.Array,
        targets: jax.Array,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Cross-entropy of targets `[b, t]` under the logits, `[b, t]` nats, float32."""
        logits, _ = self.forward(params, tokens, bias)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return with_auto_axes(entropy, P(present_axes(BATCH)))(logits, targets), None

    def metrics(self, stats: None) -> dict[str, jax.Array]:
        """Empty: a Llama has no statistics."""
        del stats
        return {}

    @property
    def abstract_params(self) -> abstract.Tree:
        """Shape and mesh axes of every parameter."""
        return abstract.derive(self._initial, SPECS)

    def shardings(self, mesh: Mesh) -> optax.Params:
        """A `NamedSharding` for every parameter; axes that the mesh lacks are dropped."""
        return abstract.shardings(self.abstract_params, mesh)

    @property
    def per_head_views(self) -> dict[str, optax_muon.View]:
        """Views that give Muon one matrix for each query, key and value head."""
        query, key = self.config.num_attention_heads, self.config.num_key_value_heads
        heads = {"q_proj": query, "k_proj": key, "v_proj": key}
        return {
            f"*/{name}/kernel": optax_muon.View(
                -2, -1, optax_muon.Split.equal(-1, count * self.config.head_dim, parts=count)
            )
            for name, count in heads.items()
        }

    @property
    def attentions(self) -> tuple[optax_muon.MHA]:
        """Where the heads are, for `qk_clip`."""
        return (attentions(self.config),)

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied by: all but an embedding that is only looked up."""
        config = self.config
        lookups = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return sum(math.prod(p.shape) for p in jax.tree.leaves(self.abstract_params)) - lookups

    @property
    def attended(self) -> int:
        """Features of the queries and of the values of all heads of all layers together."""
        return self.config.num_hidden_layers * 2 * self.config.hidden_size

    def _initial(self, key: jax.Array) -> optax.Params:
        return LlamaDecoder(self.config).init(key, jnp.zeros([1, 1], jnp.int32))["params"]


def of_width(hidden_size: int) -> LlamaConfig:
    """A small Llama: heads of 8 or 16 features, an MLP of 8/3 the width, a layer for 32 features.

    >>> Llama(of_width(64)).active
    113984
    """
    heads = hidden_size // (8 if hidden_size % 16 else 16)
    return LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=max(2, hidden_size // 32),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=round(hidden_size / 3) * 8,
        context=128,
    )


SPEC = ModelSpec("llama", LlamaConfig, Llama, CONFIGS, of_width)
"""The row of the registry."""


def attentions(config: LlamaConfig) -> optax_muon.MHA:
    """Where the heads are, for `optax_muon.qk_clip`.

    >>> attentions(CONFIGS["llama3-1b"]).q.path
    'layers/attn/q_proj/kernel'
    """

    def heads(name: str, count: int) -> optax_muon.Heads:
        split = optax_muon.Split.equal(-1, count * config.head_dim, parts=count)
        return optax_muon.Heads(f"layers/attn/{name}/kernel", split, layers=0)

    return optax_muon.MHA(
        q=heads("q_proj", config.num_attention_heads), k=heads("k_proj", config.num_key_value_heads)
    )


class LlamaDecoder(nn.Module):
    """The Flax module: float32 logits `[b, t, vocab_size]` of tokens `[b, t]`, int32.

    Position `i` sees tokens `0 .. i`; `t` may be at most `config.context`.
    """

    config: LlamaConfig
    """The sizes."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of tokens."""
        config = self.config
        embed = nn.Embed(config.vocab_size, config.hidden_size, name="embed")
        angles = rotations(config.head_dim, config.rope_theta, tokens.shape[1], config.dtype)
        x, _ = _stack(config)(config, name="layers")(embed(tokens), angles)
        x = RMSNorm(config.rms_norm_eps, name="final_norm")(x)
        if config.tie_word_embeddings:
            return embed.attend(x).astype(jnp.float32)
        return Linear(config.vocab_size, config.dtype, name="lm_head")(x).astype(jnp.float32)


class LlamaBlock(nn.Module):
    """One decoder block, in the form `nn.scan` asks for: `(x, rotations) -> (x, None)`."""

    config: LlamaConfig
    """The sizes."""

    @nn.compact
    def __call__(self, x: jax.Array, rotations: Rotations) -> tuple[jax.Array, None]:
        """Add attention, then the MLP, to the residual stream."""
        config = self.config
        h = RMSNorm(config.rms_norm_eps, name="attn_norm")(x)
        x = x + Attention(config, name="attn")(h, rotations).astype(x.dtype)
        h = RMSNorm(config.rms_norm_eps, name="mlp_norm")(x)
        y = SwiGLU(config.intermediate_size, config.dtype, name="mlp")(h)
        return x + y.astype(x.dtype), None


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    config: LlamaConfig
    """The sizes."""

    @nn.compact
    def __call__(self, x: jax.Array, rotations: Rotations) -> jax.Array:
        """Attend over `x`, `[b, t, hidden_size]`."""
        config = self.config

        def project(name: str, heads: int) -> jax.Array:
            y = Linear(heads * config.head_dim, config.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], heads, config.head_dim)

        q = rotate(project("q_proj", config.num_attention_heads), rotations)
        k = rotate(project("k_proj", config.num_key_value_heads), rotations)
        v = project("v_proj", config.num_key_value_heads)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        output = Linear(config.hidden_size, config.dtype, name="o_proj")
        return output(y.reshape(x.shape[0], x.shape[1], -1))


def _stack(config: LlamaConfig) -> type[nn.Module]:
    """The blocks, stacked along one leading parameter axis and recomputed in the backward pass.

    Recomputing is no slower on CPU: storing each block's activations takes longer (203 against
    154 ms a step of 2048 tokens, hidden_size 128, 4 layers, two cores).
    """
    return nn.scan(
        nn.remat(LlamaBlock, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_hidden_layers,
    )
