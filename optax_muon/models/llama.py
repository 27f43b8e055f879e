"""The Llama decoder in Flax: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One block on the residual stream `x`, of shape `[b, t, width]`, is

    x = x + o_proj(attention(rope(q_proj(h)), rope(k_proj(h)), v_proj(h))),  h = attn_norm(x)
    x = x + down_proj(silu(gate_proj(h)) * up_proj(h)),                      h = mlp_norm(x)

(Touvron et al., LLaMA, arXiv 2302.13971, section 2.2; rotary positions: Su et al., arXiv
2104.09864, section 3.4.2; grouped queries: Ainslie et al., arXiv 2305.13245, section 2.2). No
layer has a bias. `nn.scan` stacks the blocks, so a hidden kernel is one array `[depth, in, out]`,
which Muon takes as a batch of `depth` matrices. The text it reads, its
sizes and the loop that trains it are in `training/`.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_muon
from optax_muon.errors import UsageError
from optax_muon.models.layers import Linear, RMSNorm, Rotations, SwiGLU, rotate, rotations


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama.

    Attributes:
        hidden_size: features of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads; each has `width / heads` features, an even number.
        num_key_value_heads: key and value heads, a divisor of `heads`; fewer is grouped-query attention.
        intermediate_size: features inside the SwiGLU; `8 / 3 * width` makes it as large as a plain MLP of four
            times the width.
        context: tokens of one sequence.
        vocab_size: number of tokens; 256 when they are bytes.
        rope_theta: longest wavelength of the rotary positions, divided by 2 pi, in tokens.
        rms_norm_eps: added to the mean square under the root of RMSNorm.
        tie_word_embeddings: True uses the embedding as the output layer too.
        dtype: of the matrix products; parameters, residual stream, norms and logits are float32.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    context: int
    vocab_size: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide."""
        if (
            self.hidden_size % (2 * self.num_attention_heads)
            or self.num_attention_heads % self.num_key_value_heads
        ):
            raise UsageError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_attention_heads, "
                f"{self.num_attention_heads}, and that of num_key_value_heads, "
                f"{self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_attention_heads


class Llama(nn.Module):
    """Logits of the next token at every position.

    Args:
        config: the sizes.

    Called with tokens `[b, t]` (int32, `t <= config.context`) it returns float32 logits
    `[b, t, vocab]`; position `i` sees tokens `0 .. i`.

    >>> import jax, jax.numpy as jnp
    >>> model = Llama(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, context=8))
    >>> tokens = jnp.zeros([1, 8], jnp.int32)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> params["layers"]["attn"]["q_proj"]["kernel"].shape
    (2, 16, 16)
    >>> model.apply({"params": params}, tokens).shape
    (1, 8, 256)
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits `[b, t, vocab]` of tokens `[b, t]`."""
        config = self.config
        embed = nn.Embed(config.vocab_size, config.hidden_size, name="embed")
        angles = rotations(config.head_dim, config.rope_theta, tokens.shape[1], config.dtype)
        x, _ = _stack(config)(config, name="layers")(embed(tokens), angles)
        x = RMSNorm(config.rms_norm_eps, name="final_norm")(x)
        head = (
            embed.attend
            if config.tie_word_embeddings
            else Linear(config.vocab_size, config.dtype, name="lm_head")
        )
        return head(x).astype(jnp.float32)


def logits(model: Llama, params: optax.Params, tokens: jax.Array) -> jax.Array:
    """Logits `[b, t, vocab]` of `model` with `params`."""
    return cast(jax.Array, model.apply({"params": params}, tokens))


def attentions(config: LlamaConfig) -> optax_muon.MHA:
    """Where the heads lie, for `optax_muon.qk_clip`: it takes largest logits `[depth, heads]`.

    >>> attentions(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, context=8)).q.path
    'layers/attn/q_proj/kernel'
    """

    def heads(name: str, count: int) -> optax_muon.Heads:
        split = optax_muon.Split.equal(-1, count * config.head_dim, parts=count)
        return optax_muon.Heads(f"layers/attn/{name}/kernel", split, layers=0)

    return optax_muon.MHA(
        q=heads("q_proj", config.num_attention_heads), k=heads("k_proj", config.num_key_value_heads)
    )


class Block(nn.Module):
    """One decoder layer, in the form `nn.scan` asks for: `(x, rotations) -> (x, None)`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, rotations: Rotations) -> tuple[jax.Array, None]:
        """Add attention, then the MLP, to the residual stream."""
        config = self.config
        y = Attention(config, name="attn")(
            RMSNorm(config.rms_norm_eps, name="attn_norm")(x), rotations
        )
        x = x + y.astype(x.dtype)
        y = SwiGLU(config.intermediate_size, config.dtype, name="mlp")(
            RMSNorm(config.rms_norm_eps, name="mlp_norm")(x)
        )
        return x + y.astype(x.dtype), None


class Attention(nn.Module):
    """Causal self-attention; `heads / kv_heads` query heads share one key and one value head."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, rotations: Rotations) -> jax.Array:
        """Attend over `x`, `[b, t, width]`."""
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
    """`depth` blocks over one leading parameter axis.

    Recomputing a block in the backward pass costs nothing here: without it, writing and reading
    each layer's stacked activations takes longer (203 against 154 ms a step of 2048 tokens, width
    128, depth 4, on two CPU cores; unrolled layers: 173 ms and a compile time that grows).
    """
    return nn.scan(
        nn.remat(Block, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_hidden_layers,
    )
