"""Names of tensors: which tensor of a checkpoint is which part of which parameter.

A checkpoint stores one tensor per layer, expert and matrix, `[out, in]`; a run stores stacked
leaves, `[in, out]`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import optax_muon
from optax_muon.models.moonlight import Moonlight, MoonlightConfig

BIAS = "router_bias"
"""Path of the router's biases among a run's leaves."""

EMBEDDING = "embed/embedding"
"""Path of the embedding, the only matrix that checkpoints and runs store alike."""

MULTI_TOKEN = "eh_proj.weight"
"""The tensor that only a layer of multi-token prediction has (arXiv 2412.19437, section 2.2)."""

DERIVED = ".rotary_emb.inv_freq"
"""End of the names of tensors that are computed from the config; some checkpoints hold them."""


class Fused(NamedTuple):
    """A part of a tensor that stacks the experts of a layer, gates above the rows of `up_proj`."""

    name: str
    """Name of the whole: `model.layers.3.mlp.experts.gate_up_proj`."""
    shape: tuple[int, int]
    """Its shape without the axis of the experts, `[out, in]`."""
    part: tuple[int, slice]
    """The expert, and its rows."""


_FUSED = {"gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2)} | {
    "down_proj": ("down_proj", 0, 1)
}
"""The stack of an expert's matrix, its place in it, and how many matrices lie there."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and the part of the parameters that it is."""

    name: str
    """Its name: `model.layers.3.mlp.experts.7.up_proj.weight`."""
    shape: tuple[int, ...]
    """Its shape."""
    path: str
    """The leaf that it is part of: `moe_layers/experts/up_proj`."""
    index: tuple[int, ...]
    """Its position along the leaf's stacked axes: `(2, 7)`."""

    @property
    def fused(self) -> Fused | None:
        """Where transformers 5 keeps an expert's matrix; None of what is no expert's."""
        layer, _, rest = self.name.partition(".experts.")
        if not rest:
            return None
        expert, matrix, _ = rest.split(".")
        rows = self.shape[0]
        stack, first, parts = _FUSED[matrix]
        return Fused(
            f"{layer}.experts.{stack}",
            (parts * rows, self.shape[1]),
            (int(expert), slice(first * rows, (first + 1) * rows)),
        )

    def transposed(self, array: np.ndarray) -> np.ndarray:
        """From `[out, in]` to `[in, out]` or back; embeddings and vectors stay as they are."""
        return array if self.path == EMBEDDING else array.T


_MODEL = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
_LAYER = {
    "attn_norm/scale": "input_layernorm.weight",
    "attn/q_proj/kernel": "self_attn.q_proj.weight",
    "attn/q_a_proj/kernel": "self_attn.q_a_proj.weight",
    "attn/q_a_norm/scale": "self_attn.q_a_layernorm.weight",
    "attn/q_b_proj/kernel": "self_attn.q_b_proj.weight",
    "attn/kv_a_proj/kernel": "self_attn.kv_a_proj_with_mqa.weight",
    "attn/kv_a_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attn/kv_b_proj/kernel": "self_attn.kv_b_proj.weight",
    "attn/o_proj/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate_proj/kernel": "mlp.gate_proj.weight",
    "mlp/up_proj/kernel": "mlp.up_proj.weight",
    "mlp/down_proj/kernel": "mlp.down_proj.weight",
    "router/kernel": "mlp.gate.weight",
    BIAS: "mlp.gate.e_score_correction_bias",
    "experts/gate_proj": "mlp.experts.{}.gate_proj.weight",
    "experts/up_proj": "mlp.experts.{}.up_proj.weight",
    "experts/down_proj": "mlp.experts.{}.down_proj.weight",
    "shared_experts/gate_proj/kernel": "mlp.shared_experts.gate_proj.weight",
    "shared_experts/up_proj/kernel": "mlp.shared_experts.up_proj.weight",
    "shared_experts/down_proj/kernel": "mlp.shared_experts.down_proj.weight",
}
"""Names by path; the braces are the number of the layer or expert."""


def leaf_shapes(config: MoonlightConfig) -> dict[str, tuple[int, ...]]:
    """The leaves of a run by path, in the order of its file: parameters, then the biases."""
    params = optax_muon.named_leaves(Moonlight(config).abstract_params)
    shapes = {path: param.shape for path, param in params.items()}
    if config.num_moe_layers:
        shapes[BIAS] = (config.num_moe_layers, config.n_routed_experts)
    return shapes


def tensors(config: MoonlightConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of this size.

    >>> from optax_muon.models.moonlight import CONFIGS
    >>> table = {tensor.name: tensor for tensor in tensors(CONFIGS["moonlight-16b-a3b"])}
    >>> table["model.layers.3.mlp.experts.7.up_proj.weight"]
    Tensor(name='model.layers.3.mlp.experts.7.up_proj.weight', shape=(1408, 2048),
           path='moe_layers/experts/up_proj', index=(2, 7))
    """
    for path, shape in leaf_shapes(config).items():
        stack, _, rest = path.partition("/")
        if path in _MODEL:
            name, first, stacked = _MODEL[path], 0, 0
        else:
            name = f"model.layers.{{}}.{_LAYER[rest or path]}"
            first = 0 if stack == "dense_layers" else config.first_k_dense_replace
            stacked = name.count("{}")
        own = shape[stacked:]
        for index in itertools.product(*map(range, shape[:stacked])):
            numbers = (first + index[0], *index[1:]) if index else ()
            stored = own if path == EMBEDDING else own[::-1]
            yield Tensor(name.format(*numbers), stored, path, index)


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is of; None if it is of none.

    >>> layer_of("model.layers.3.mlp.gate.weight"), layer_of("lm_head.weight")
    (3, None)
    """
    words = name.split(".")
    is_layer = words[:2] == ["model", "layers"] and words[2:3] and words[2].isdecimal()
    return int(words[2]) if is_layer else None


def by_layer(tensor: Tensor) -> tuple[int, str]:
    """Sort key: the embedding, the layers in order, the rest."""
    layer = layer_of(tensor.name)
    if layer is not None:
        return layer, tensor.name
    return (-1 if tensor.path == EMBEDDING else 2**31), tensor.name
