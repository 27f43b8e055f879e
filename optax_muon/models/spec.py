"""A model as training sees it: one small hashable object for a Llama or a Moonlight of some sizes.

The loop, the checkpoints and the commands know nothing else of a model. `model` makes the object
of a config, `model_of` of a run's `config.json`. On a mesh all of it runs under `jax.set_mesh`,
parameters lying as `shardings` says:

    whole matrices     rows over `fsdp` and `expert` together; heads and hidden units over `tensor`
    experts            over `expert`, their rows over `fsdp`
    tokens             sequences over `data`, `fsdp` and `expert`; axes that the mesh lacks left out
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.errors import UsageError
from optax_muon.models import llama, moonlight
from optax_muon.models.abstract import laid_out
from optax_muon.models.layers import BATCH, FSDP_AXES, Axes, constrain, present_axes, with_auto_axes
from optax_muon.models.llama import Llama, LlamaConfig
from optax_muon.models.moonlight.model import ForwardStats, Moonlight, MoonlightConfig

Config = LlamaConfig | MoonlightConfig
"""The sizes of a model; which of the two it is says which model."""


class Model(Protocol):
    """What training asks of a model; equal configs make equal models, so a step compiles once."""

    @property
    def config(self) -> Config:
        """The sizes."""

    @property
    def kind(self) -> str:
        """Its name for people: Llama, Moonlight."""

    def init(self, key: jax.Array) -> optax.Params:
        """Parameters before training, float32."""

    def zero_bias(self) -> jax.Array | None:
        """Router biases before training, `[moe_depth, experts]` float32; None without a router."""

    def forward(
        self, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
    ) -> tuple[jax.Array, ForwardStats | None]:
        """Logits `[b, t, vocab]` float32 of tokens `[b, t]`, and the report of a model with one."""

    def losses(
        self,
        params: optax.Params,
        tokens: jax.Array,
        targets: jax.Array,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, ForwardStats | None]:
        """Cross-entropy of targets `[b, t]` under the logits, `[b, t]` nats, and the report."""

    def shardings(self, mesh: Mesh) -> optax.Params:
        """A `NamedSharding` for every parameter."""

    @property
    def per_head_views(self) -> dict[str, optax_muon.View]:
        """Views that give Muon a matrix per head, where role alone gives it one per layer."""

    @property
    def attentions(self) -> tuple[optax_muon.MHA | optax_muon.MLA, ...]:
        """Where the heads lie, for `qk_clip`; in the order of the rows of `max_logits`."""

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: the embedding and idle experts left out."""

    @property
    def attended(self) -> int:
        """Features of the queries and of the values of all heads of all layers together."""


@dataclasses.dataclass(frozen=True)
class LlamaModel:
    """The Llama of these sizes.

    >>> model = LlamaModel(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, context=8))
    >>> logits, report = model.forward(model.init(jax.random.key(0)), jnp.zeros([1, 8], jnp.int32))
    >>> logits.shape, report, model.zero_bias()
    ((1, 8, 256), None, None)
    """

    config: LlamaConfig
    """The sizes."""
    kind = "Llama"

    def init(self, key: jax.Array) -> optax.Params:
        """See `Model`."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return self._initial(key)
        specs = jax.tree.map(lambda leaf: leaf.on(mesh).sharding.spec, self._leaves)
        return with_auto_axes(self._initial, specs)(key)

    def zero_bias(self) -> None:
        """See `Model`."""
        return None

    def forward(
        self, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """See `Model`."""
        del bias

        def apply(params: optax.Params, tokens: jax.Array) -> jax.Array:
            tokens = constrain(tokens, BATCH, None)
            return constrain(llama.logits(Llama(self.config), params, tokens), BATCH, None, None)

        return with_auto_axes(apply, P(present_axes(BATCH)))(params, tokens), None

    def losses(
        self,
        params: optax.Params,
        tokens: jax.Array,
        targets: jax.Array,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """See `Model`."""
        scores, _ = self.forward(params, tokens)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return with_auto_axes(entropy, P(present_axes(BATCH)))(scores, targets), None

    def shardings(self, mesh: Mesh) -> optax.Params:
        """See `Model`."""
        return jax.tree.map(lambda leaf: leaf.on(mesh).sharding, self._leaves)

    @property
    def per_head_views(self) -> dict[str, optax_muon.View]:
        """See `Model`."""
        heads = (
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.num_key_value_heads,
        )
        return {
            f"*/{name}/kernel": optax_muon.View(
                -2, -1, optax_muon.Split.equal(-1, count * self.config.head_dim, parts=count)
            )
            for name, count in zip(("q_proj", "k_proj", "v_proj"), heads, strict=True)
        }

    @property
    def attentions(self) -> tuple[optax_muon.MHA]:
        """See `Model`."""
        return (llama.attentions(self.config),)

    @property
    def active(self) -> int:
        """See `Model`."""
        config = self.config
        lookups = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self._leaves)) - lookups

    @property
    def attended(self) -> int:
        """See `Model`."""
        return self.config.num_hidden_layers * 2 * self.config.hidden_size

    def _initial(self, key: jax.Array) -> optax.Params:
        return Llama(self.config).init(key, jnp.zeros([1, 1], jnp.int32))["params"]

    @property
    def _leaves(self) -> Any:
        """Every parameter's shape and spec."""
        shapes = jax.eval_shape(
            with_auto_axes(self._initial, P()), jax.eval_shape(jax.random.key, 0)
        )
        return laid_out(shapes, _LLAMA_SPECS)


@dataclasses.dataclass(frozen=True)
class MoonlightModel:
    """The Moonlight of these sizes.

    >>> model = MoonlightModel(moonlight.CONFIGS["moonlight-tiny"])
    >>> model.zero_bias().shape
    (3, 8)
    """

    config: MoonlightConfig
    """The sizes."""
    kind = "Moonlight"

    def init(self, key: jax.Array) -> optax.Params:
        """See `Model`."""
        return moonlight.init(Moonlight(self.config), key)

    def zero_bias(self) -> jax.Array:
        """See `Model`."""
        return moonlight.zero_bias(self.config)

    def forward(
        self, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
    ) -> tuple[jax.Array, ForwardStats]:
        """See `Model`."""
        return moonlight.forward(Moonlight(self.config), params, tokens, bias)

    def losses(
        self,
        params: optax.Params,
        tokens: jax.Array,
        targets: jax.Array,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, ForwardStats]:
        """See `Model`."""
        return moonlight.losses(Moonlight(self.config), params, tokens, targets, bias)

    def shardings(self, mesh: Mesh) -> optax.Params:
        """See `Model`."""
        return moonlight.shardings(self.config, mesh)

    @property
    def per_head_views(self) -> dict[str, optax_muon.View]:
        """See `Model`."""
        return moonlight.per_head_views(self.config)

    @property
    def attentions(self) -> tuple[optax_muon.MLA, ...]:
        """See `Model`."""
        return moonlight.attentions(self.config)

    @property
    def active(self) -> int:
        """See `Model`."""
        head = self.config.vocab_size * self.config.hidden_size
        return moonlight.count(self.config).active + head

    @property
    def attended(self) -> int:
        """See `Model`."""
        config = self.config
        return (
            config.num_hidden_layers
            * config.num_attention_heads
            * (config.qk_head_dim + config.v_head_dim)
        )


def model(config: Config) -> Model:
    """The model of these sizes.

    >>> model(moonlight.CONFIGS["moonlight-tiny"]).kind
    'Moonlight'
    """
    if isinstance(config, LlamaConfig):
        return LlamaModel(config)
    return MoonlightModel(config)


def model_of(config: Mapping[str, Any]) -> Model:
    """The model of a run's `config.json`.

    Args:
        config: `{"setup": {"model": sizes}}` of a training run, or `{"model": sizes}` of a folder
            that `import-hf` has made.

    Raises:
        UsageError: when the sizes are no model's.

    >>> sizes = dataclasses.asdict(moonlight.CONFIGS["moonlight-tiny"])
    >>> model_of({"setup": {"model": sizes}}) == model_of({"model": sizes, "huggingface": {}})
    True
    """
    sizes = config.get("setup", config).get("model")
    for kind in (LlamaConfig, MoonlightConfig):
        names = {field.name for field in dataclasses.fields(kind)}
        if isinstance(sizes, Mapping) and sizes.keys() == names:
            return model(kind(**sizes))
    raise UsageError("the config holds the sizes of neither a Llama nor a Moonlight")


_LLAMA_SPECS: dict[str, tuple[Axes, ...]] = {
    "embedding": ("tensor", FSDP_AXES),
    "o_proj/kernel": ("tensor", FSDP_AXES),
    "down_proj/kernel": ("tensor", FSDP_AXES),
    "kernel": (FSDP_AXES, "tensor"),
    "scale": (None,),
}
"""Mesh axes of a parameter's own axes, by the end of its path; the first that fits decides."""
