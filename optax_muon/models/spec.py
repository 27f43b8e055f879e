"""What a model offers to training, and the registry of models.

The training loop, the checkpoints and the commands know a model through `Model` alone: a small
hashable object made of a config. A new model is one class that satisfies `Model` and one
`ModelSpec` passed to `register`. On a mesh all of it runs under `jax.set_mesh`, parameters sharded
as `shardings` says:

    matrices    rows over `fsdp` and `expert` together; heads and hidden features over `tensor`
    experts     over `expert`, their rows over `fsdp`
    tokens      sequences over `data`, `fsdp` and `expert`; axes that the mesh lacks are dropped
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import optax
from jax.sharding import Mesh

import optax_muon
from optax_muon.models.abstract import Tree


class Config(Protocol):
    """The sizes of a model: a frozen dataclass with at least these fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def hidden_size(self) -> int:
        """Features of the residual stream."""

    @property
    def num_hidden_layers(self) -> int:
        """Decoder blocks."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def context(self) -> int:
        """Tokens of one training sequence."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens; 256 when they are bytes."""

    @property
    def dtype(self) -> str:
        """Dtype of the matrix products."""


class ForwardStats(NamedTuple):
    """Statistics of a forward pass; XLA removes those that are not used."""

    max_logits: jax.Array
    """Largest attention logit of each head, `[num_hidden_layers, num_attention_heads]` float32."""
    high_logits: jax.Array
    """Share of each head's unmasked logits above `moonlight.HIGH_LOGIT`, the same shape."""
    load: jax.Array
    """Number of tokens routed to each expert, `[num_moe_layers, n_routed_experts]` int32."""
    entropy: jax.Array
    """Mean entropy of the router's normalized scores, in nats, `[num_moe_layers]` float32."""


class Model(Protocol):
    """A model as training sees it; models of equal configs are equal, so a step compiles once."""

    @property
    def config(self) -> Any:
        """The sizes, a `Config`."""

    @property
    def kind(self) -> str:
        """Its name in reports: Llama, Moonlight."""

    @property
    def has_router(self) -> bool:
        """Whether tokens are routed to experts, and `zero_bias` is an array of their biases."""

    @property
    def reports_logits(self) -> bool:
        """Whether its `ForwardStats` hold attention logits, as `optax_muon.qk_clip` needs them."""

    @property
    def huggingface_type(self) -> str | None:
        """`model_type` of the Hugging Face checkpoints it can be stored as; None without any."""

    def init(self, key: jax.Array) -> optax.Params:
        """Initial parameters, float32."""

    def zero_bias(self) -> jax.Array | None:
        """Initial router biases, `[num_moe_layers, n_routed_experts]` float32, or None."""

    def forward(
        self, params: optax.Params, tokens: jax.Array, bias: jax.Array | None = None
    ) -> tuple[jax.Array, ForwardStats | None]:
        """Logits `[b, t, vocab_size]` float32 of tokens `[b, t]`, and the statistics, if any."""

    def losses(
        self,
        params: optax.Params,
        tokens: jax.Array,
        targets: jax.Array,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, ForwardStats | None]:
        """Cross-entropy of targets `[b, t]` under the logits, `[b, t]` nats, and the statistics."""

    def metrics(self, stats: Any) -> dict[str, jax.Array]:
        """The metrics that a training log records, from the statistics; empty if there are none."""

    @property
    def abstract_params(self) -> Tree:
        """Shape and mesh axes of every parameter."""

    def shardings(self, mesh: Mesh) -> optax.Params:
        """A `NamedSharding` for every parameter."""

    @property
    def per_head_views(self) -> dict[str, optax_muon.View]:
        """Views that give Muon one matrix per head, where the default is one per layer."""

    @property
    def attentions(self) -> tuple[optax_muon.MHA | optax_muon.MLA, ...]:
        """Where the heads are, for `qk_clip`, in the order of the rows of `max_logits`."""

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied by: not the embedding, nor experts not chosen."""

    @property
    def attended(self) -> int:
        """Features of the queries and of the values of all heads of all layers together."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A row of the registry: one kind of model."""

    name: str
    """Its key in `REGISTRY`."""
    config: type[Any]
    """Its config, a frozen dataclass that satisfies `Config`."""
    build: Callable[[Any], Model]
    """Makes the model of a config."""
    configs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Published and small sizes by name; names are unique in the whole registry."""
    of_width: Callable[[int], Any] | None = None
    """Makes a small config of this hidden size, a multiple of 8, for a ladder of sizes; tokens are
    bytes. None if there is none."""


REGISTRY: dict[str, ModelSpec] = {}
"""The models by name."""


def register(row: ModelSpec) -> None:
    """Add a kind of model.

    Raises:
        ValueError: Its name or one of its configs' names is taken.
    """
    taken = {row.name} & REGISTRY.keys() or row.configs.keys() & named_configs().keys()
    if taken:
        raise ValueError(f"{', '.join(sorted(taken))} is registered already; choose another name")
    REGISTRY[row.name] = row


def named_configs() -> dict[str, Any]:
    """Every registered size by name.

    >>> named_configs()["llama3-8b"].hidden_size
    4096
    """
    return {name: config for row in REGISTRY.values() for name, config in row.configs.items()}


def model(config: Config) -> Model:
    """The model of a config.

    Raises:
        TypeError: The config belongs to no registered model.

    >>> model(named_configs()["moonlight-tiny"]).kind
    'Moonlight'
    """
    for row in REGISTRY.values():
        if type(config) is row.config:
            return row.build(config)
    accepted = ", ".join(row.config.__name__ for row in REGISTRY.values())
    raise TypeError(
        f"{type(config).__name__} is not the config of a model; accepted are {accepted}"
    )


def model_of(config: Mapping[str, Any]) -> Model:
    """The model of a `config.json`.

    Args:
        config: `{"model": sizes}` of a training run or of a folder made by `import-hf`.

    Raises:
        ValueError: The sizes are those of no registered model.

    >>> sizes = dataclasses.asdict(named_configs()["moonlight-tiny"])
    >>> model_of({"model": sizes, "huggingface": {}}).kind
    'Moonlight'
    """
    sizes = config.get("model")
    for row in REGISTRY.values():
        fields = dataclasses.fields(row.config)
        # A field that was added since has a default.
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        names = {field.name for field in fields}
        if isinstance(sizes, Mapping) and needed <= sizes.keys() <= names:
            return row.build(row.config(**sizes))
    kinds = ", ".join(REGISTRY)
    raise ValueError(f"the sizes in the config are those of none of these models: {kinds}")
