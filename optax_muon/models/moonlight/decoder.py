"""The Flax modules of Moonlight; `model.py` has the equations."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from optax_muon.models.cross_entropy import cross_entropy
from optax_muon.models.layers import Embed, RMSNorm, Rotations, SwiGLU, rotations
from optax_muon.models.mesh import BATCH, constrain
from optax_muon.models.moe import Experts, Router
from optax_muon.models.moonlight.attention import HeadStats, LatentAttention
from optax_muon.models.moonlight.config import SAVED, MoonlightConfig
from optax_muon.models.spec import ForwardStats


class MoonlightDecoder(nn.Module):
    """The Flax module; on a mesh call it through `Moonlight.forward` and `Moonlight.losses`.

    Called with tokens `[b, t]` (int32) and router biases `[num_moe_layers, n_routed_experts]` it
    returns float32 logits `[b, t, vocab_size]` and a `ForwardStats`; position `i` sees tokens
    `0 .. i`. With targets, `[b, t]` int32, it returns their cross-entropy, `[b, t]` in nats,
    instead of logits.
    """

    config: MoonlightConfig
    """The sizes."""

    @nn.compact
    def __call__(
        self, tokens: jax.Array, bias: jax.Array, targets: jax.Array | None = None
    ) -> tuple[jax.Array, ForwardStats]:
        """Logits of tokens, or losses of targets."""
        config = self.config
        x = Embed(config.vocab_size, config.hidden_size, config.dtype, name="embed")(tokens)
        x = constrain(x.astype(jnp.float32), BATCH, None, None)
        dim, theta = config.qk_rope_head_dim, config.rope_theta
        angles = rotations(dim, theta, tokens.shape[1], config.dtype)
        heads, routing = [], _no_routing(config)
        if config.first_k_dense_replace:
            stack = _stack(DenseBlock, config.saved, config.first_k_dense_replace)
            x, dense = stack(config, name="dense_layers")(x, angles)
            heads.append(dense)
        if config.num_moe_layers:
            stack = _stack(MoeBlock, config.saved, config.num_moe_layers, 0)
            x, (moe, routing) = stack(config, name="moe_layers")(x, angles, bias)
            heads.append(moe)
        x = RMSNorm(config.rms_norm_eps, name="final_norm")(x)
        y = Head(config.vocab_size, config.dtype, name="lm_head")(x, targets)
        largest, high = map(jnp.concatenate, zip(*heads, strict=True))
        return y, ForwardStats(largest, high, *routing)


class Head(nn.Module):
    """Logits of features, or the losses of targets under them."""

    vocab_size: int
    """Number of tokens."""
    dtype: str
    """Dtype of the product."""

    @nn.compact
    def __call__(self, x: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        """Logits `[b, t, vocab_size]` of `x`, `[b, t, hidden_size]`; losses `[b, t]` of targets."""
        normal = nn.initializers.lecun_normal()
        kernel = self.param("kernel", normal, (x.shape[-1], self.vocab_size)).astype(self.dtype)
        x = x.astype(self.dtype)
        if targets is not None:
            return cross_entropy(x, kernel, targets)
        y = x @ constrain(kernel, None, "tensor")
        return constrain(y.astype(jnp.float32), BATCH, None, "tensor")


class DenseBlock(nn.Module):
    """A block without experts, in the form `nn.scan` asks for: `(x, angles) -> (x, heads)`."""

    config: MoonlightConfig
    """The sizes."""

    @nn.compact
    def __call__(self, x: jax.Array, angles: Rotations) -> tuple[jax.Array, HeadStats]:
        """Add attention, then the MLP, to the residual stream."""
        config = self.config
        x, heads = _add_attention(config, x, angles)
        h = RMSNorm(config.rms_norm_eps, name="mlp_norm")(x)
        y = SwiGLU(config.intermediate_size, config.dtype, name="mlp")(h)
        return constrain(x + y.astype(x.dtype), BATCH, None, None), heads


class MoeBlock(nn.Module):
    """A block with experts: `(x, angles, bias) -> (x, (heads, (load, entropy)))`."""

    config: MoonlightConfig
    """The sizes."""

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Rotations, bias: jax.Array
    ) -> tuple[jax.Array, tuple[HeadStats, tuple[jax.Array, jax.Array]]]:
        """Add attention, then the experts, to the residual stream."""
        config, hidden = self.config, self.config.moe_intermediate_size
        x, heads = _add_attention(config, x, angles)
        h = RMSNorm(config.rms_norm_eps, name="mlp_norm")(x)
        routing = _router(config)(h, bias)
        experts = Experts(
            config.n_routed_experts, hidden, config.dtype, config.capacity, name="experts"
        )
        shared = SwiGLU(config.n_shared_experts * hidden, config.dtype, name="shared_experts")
        y = experts(h, routing.chosen, routing.gates) + shared(h)
        x = constrain(x + y.astype(x.dtype), BATCH, None, None)
        return x, (heads, (routing.load, routing.entropy))


def _add_attention(
    config: MoonlightConfig, x: jax.Array, angles: Rotations
) -> tuple[jax.Array, HeadStats]:
    """The residual stream after attention; the modules become children of the calling block."""
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


def _stack(block: type[nn.Module], saved: str, length: int, *in_axes: int) -> type[nn.Module]:
    """Blocks stacked along one leading parameter axis, each recomputed in the backward pass.

    The block's arguments after `x` and the angles are stacked too, along `in_axes`. `saved`, a key
    of `SAVED`, is what is not recomputed.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED[saved])
    return nn.scan(
        nn.remat(block, prevent_cse=False, policy=policy),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, *in_axes),
        length=length,
    )


def _no_routing(config: MoonlightConfig) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros([0, config.n_routed_experts], jnp.int32), jnp.zeros([0], jnp.float32)
