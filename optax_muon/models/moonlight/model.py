"""Moonlight in Flax: the DeepSeek-V3 decoder, latent attention and a mixture of experts.

One block on the residual stream `x`, of shape `[b, t, hidden_size]`, is

    x = x + o_proj(attention(q, k, v)),        h = attn_norm(x)
    x = x + mlp(mlp_norm(x))

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) keeps one short vector per
token, from which every head makes its keys and values, and one rotary key that all heads share:

    latent, k_rope = split(kv_a_proj(h))
    k_nope, v      = split(kv_b_proj(kv_a_norm(latent)))          per head
    q_nope, q_rope = split(q_proj(h))                             per head
    logits         = (q_nope k_nope + rope(q_rope) rope(k_rope)) / sqrt(qk_head_dim)

The first `first_k_dense_replace` blocks have a plain SwiGLU for `mlp`, the others shared experts,
which all tokens go to, and routed ones (`moe/`). `nn.scan` stacks the blocks of each kind, so the
experts are one array `[layers, experts, rows, cols]`. The sizes are those of "Muon is Scalable for
LLM Training", arXiv 2502.16982, section 3.3, and of the checkpoints published with it, which
`models/huggingface/` reads and writes. The router's biases are not parameters: they are passed in
beside the tokens, and `balance.update_bias` updates them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.models import abstract
from optax_muon.models.mesh import BATCH, batch_shards, constrain, present_axes, with_auto_axes
from optax_muon.models.moe import imbalance
from optax_muon.models.moonlight import muon
from optax_muon.models.moonlight.config import CONFIGS, MoonlightConfig, of_width
from optax_muon.models.moonlight.decoder import MoonlightDecoder
from optax_muon.models.spec import ForwardStats, ModelSpec


@dataclasses.dataclass(frozen=True)
class Moonlight:
    """The Moonlight of these sizes; satisfies `Model`.

    >>> model = Moonlight(CONFIGS["moonlight-tiny"])
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0))
    >>> shapes["moe_layers"]["experts"]["gate_proj"].shape
    (3, 8, 128, 88)
    >>> model.zero_bias().shape
    (3, 8)
    """

    config: MoonlightConfig
    """The sizes."""

    kind: ClassVar[str] = "Moonlight"
    reports_logits: ClassVar[bool] = True
    huggingface_type: ClassVar[str | None] = "deepseek_v3"

    @property
    def has_router(self) -> bool:
        """Whether any block has experts."""
        return self.config.num_moe_layers > 0

    def init(self, key: jax.Array) -> optax.Params:
        """Initial parameters, float32; on the ambient mesh, if any, as `shardings` says."""
        return abstract.initialize(self._initial, muon.SPECS, key)

    def zero_bias(self) -> jax.Array:
        """Initial router biases, `[num_moe_layers, n_routed_experts]` float32."""
        return jnp.zeros([self.config.num_moe_layers, self.config.n_routed_experts], jnp.float32)

    def forward(
        self, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
    ) -> tuple[jax.Array, ForwardStats]:
        """Logits and statistics, on any mesh.

        Args:
            params: The parameters; on a mesh as `shardings` lays them out.
            tokens: `[b, t]` int32; on a mesh, `b` is a multiple of the devices along `BATCH`.
            bias: The router's, `[num_moe_layers, n_routed_experts]` float32; zero if absent.

        Returns:
            Logits `[b, t, vocab_size]` float32, on a mesh sharded over `BATCH` and `tensor`, and
            the statistics, replicated.

        Raises:
            ValueError: The parameters are on a mesh and there is no ambient one.
        """
        out = P(present_axes(BATCH), None, present_axes("tensor"))
        return self._apply(params, bias, out, tokens)

    def losses(
        self,
        params: optax.Params,
        tokens: jax.Array,
        targets: jax.Array,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, ForwardStats]:
        """Cross-entropy of the targets under the logits of `forward`, and the statistics.

        The logits are never in memory all at once (`cross_entropy.py`), and are not rounded to the
        dtype of the products.

        Args:
            params: As for `forward`.
            tokens: As for `forward`.
            targets: The token after each token, `[b, t]` int32.
            bias: As for `forward`.

        Returns:
            Losses `[b, t]` in nats, float32, on a mesh sharded over `BATCH`, and the statistics.

        Raises:
            ValueError: As `forward`.
        """
        return self._apply(params, bias, P(present_axes(BATCH)), tokens, targets)

    def metrics(self, stats: ForwardStats) -> dict[str, jax.Array]:
        """The metrics that a training log records, from the statistics.

        Returns:
            `max_logit` of all heads; `max_logits` of each layer; the mean of `high_logits`; with a
            router the `imbalance` of the worst layer and the mean `router_entropy`.
        """
        attention = {
            "max_logit": stats.max_logits.max(),
            "max_logits": stats.max_logits.max(axis=1),
            "high_logits": stats.high_logits.mean(),
        }
        if not self.has_router:
            return attention
        return attention | {
            "imbalance": imbalance(stats.load).max(),
            "router_entropy": stats.entropy.mean(),
        }

    @property
    def abstract_params(self) -> abstract.Tree:
        """Shape and mesh axes of every parameter.

        >>> tree = Moonlight(CONFIGS["moonlight-tiny"]).abstract_params
        >>> tree["moe_layers"]["experts"]["down_proj"]
        AbstractParam(shape=(3, 8, 88, 128), spec=P...(None, 'expert', 'tensor', 'fsdp'))
        """
        return abstract.derive(self._initial, muon.SPECS)

    def shardings(self, mesh: Mesh) -> optax.Params:
        """A `NamedSharding` for every parameter; axes that the mesh lacks are dropped."""
        return abstract.shardings(self.abstract_params, mesh)

    @property
    def per_head_views(self) -> dict[str, optax_muon.View]:
        """Views that give Muon three matrices per head: its query, its key and its value."""
        return muon.per_head_views(self.config)

    @property
    def attentions(self) -> tuple[optax_muon.MLA, ...]:
        """Where the heads are, for `qk_clip`."""
        return muon.attentions(self.config)

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied by: not the embedding, nor experts not chosen."""
        return count(self.config).active + self.config.vocab_size * self.config.hidden_size

    @property
    def attended(self) -> int:
        """Features of the queries and of the values of all heads of all layers together."""
        config = self.config
        heads = config.num_hidden_layers * config.num_attention_heads
        return heads * (config.qk_head_dim + config.v_head_dim)

    def _initial(self, key: jax.Array) -> optax.Params:
        """Parameters, wherever they are placed; traced with one sequence per device."""
        tokens = jnp.zeros([batch_shards(), 1], jnp.int32)
        return MoonlightDecoder(self.config).init(key, tokens, self.zero_bias())["params"]

    def _apply(
        self, params: optax.Params, bias: jax.Array | None, out: P, *tokens: jax.Array
    ) -> tuple[jax.Array, ForwardStats]:
        """The decoder on any mesh; what it returns besides the statistics is sharded as `out`."""
        mesh = jax.typeof(jax.tree.leaves(params)[0]).sharding.mesh
        if mesh.size > 1 and jax.sharding.get_abstract_mesh().empty:
            raise ValueError(
                f"parameters are on a mesh of {mesh.axis_names}; use jax.set_mesh(mesh)"
            )

        def apply(
            params: optax.Params, bias: jax.Array, *tokens: jax.Array
        ) -> tuple[jax.Array, ForwardStats]:
            inputs, *targets = (constrain(each, BATCH, None) for each in tokens)
            decoder = MoonlightDecoder(self.config)
            return cast(
                tuple[jax.Array, ForwardStats],
                decoder.apply({"params": params}, inputs, bias, *targets),
            )

        bias = self.zero_bias() if bias is None else bias
        return with_auto_axes(apply, (out, P()))(params, bias, *tokens)


SPEC = ModelSpec("moonlight", MoonlightConfig, Moonlight, CONFIGS, of_width)
"""The row of the registry."""


class Counts(NamedTuple):
    """Parameters of a model without embedding and head, as the paper counts them."""

    total: int
    """All of them."""
    active: int
    """Those that one token uses: of the routed experts, `num_experts_per_tok`."""


def count(config: MoonlightConfig) -> Counts:
    """Count parameters from shapes alone.

    >>> total, active = count(CONFIGS["moonlight-16b-a3b"])
    >>> f"{total / 1e9:.2f} {active / 1e9:.2f}"
    '15.29 2.24'
    """
    params = optax_muon.named_leaves(Moonlight(config).abstract_params)
    sizes = {path: math.prod(param.shape) for path, param in params.items()}
    total = sum(sizes.values()) - sizes["embed/embedding"] - sizes["lm_head/kernel"]
    routed = sum(size for path, size in sizes.items() if "/experts/" in path)
    chosen = routed * config.num_experts_per_tok // config.n_routed_experts
    return Counts(total, total - routed + chosen)
