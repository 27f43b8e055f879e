"""The trees of parameters that updates are measured on: dicts of shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_muon.models import Llama, LlamaConfig
from optax_muon.models.abstract import unstacked

Tree = dict[str, Any]


def _sizes(hidden_size: int, kv_heads: int, intermediate_size: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate_size,
        context=1024,
        vocab_size=8192,
    )


LLAMA = _sizes(512, kv_heads=8, intermediate_size=1408, layers=8)
GROUPED = _sizes(1024, kv_heads=4, intermediate_size=4096, layers=2)
EXPERTS = {"width": 256, "hidden": 128, "experts": 64, "layers": 6, "vocabulary": 8192}
VISION = {"width": 384, "blocks": 6, "stages": (64, 128, 256, 512), "classes": 1000}
TREES: dict[str, Callable[[], Tree]] = {
    "a Llama unrolled": lambda: _llama(LLAMA, scanned=False),
    "b Llama scanned": lambda: _llama(LLAMA, scanned=True),
    "c Llama grouped": lambda: _llama(GROUPED, scanned=False),
    "d mixture of experts": lambda: _mixture(**EXPERTS),
    "e vision": lambda: _vision(**VISION),
}
"""Makers of trees of shapes."""
TOYS: dict[str, Callable[[], Tree]] = {
    "toy": lambda: (
        _llama(LlamaConfig(16, 2, 2, 1, 24, context=8, vocab_size=32), scanned=True)
        | _vision(16, blocks=0, stages=(8,), classes=4)
    )
}
"""A tree that takes no time."""


def abstract(tree: Tree) -> Tree:
    """The tree of shapes as abstract arrays, float32."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=_is_shape
    )


def normal(tree: Tree, seed: int) -> Tree:
    """The tree of shapes as arrays of standard normal numbers, float32."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(draw.standard_normal(shape, np.float32)), tree, is_leaf=_is_shape
    )


def matrices_of_llama(layers: int, *, scanned: bool) -> Tree:
    """The matrices of a Llama of width 64 alone, 7 to a layer: nearly nothing to compute."""
    blocks = _llama(LlamaConfig(64, layers, 4, 4, 176, context=8), scanned=scanned)["layers"]
    if scanned:
        return {"layers": _matrices(blocks)}
    return {"layers": {name: _matrices(each) for name, each in blocks.items()}}


def _matrices(layer: Tree) -> Tree:
    return {name: layer[name] for name in ("attn", "mlp")}


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def _llama(config: LlamaConfig, *, scanned: bool) -> Tree:
    """The shapes of a Llama, its layers stacked or a subtree each."""
    params = Llama(config).abstract_params
    params = params if scanned else unstacked(params, "layers")
    return jax.tree.map(lambda param: param.shape, params)


def _mixture(width: int, *, hidden: int, experts: int, layers: int, vocabulary: int) -> Tree:
    """Layers stacked, as are the experts of each."""
    return {
        "embedding": (vocabulary, width),
        "moe_layers": {
            "attention_norm": (layers, width),
            **{f"{name}_proj": (layers, width, width) for name in "qkvo"},
            "mlp_norm": (layers, width),
            "router": {"kernel": (layers, width, experts), "bias": (layers, experts)},
            "experts": {
                "gate_proj": (layers, experts, width, hidden),
                "up_proj": (layers, experts, width, hidden),
                "down_proj": (layers, experts, hidden, width),
            },
        },
        "final_norm": (width,),
        "lm_head": (width, vocabulary),
    }


def _vision(width: int, *, blocks: int, stages: tuple[int, ...], classes: int) -> Tree:
    """A convolutional network, kernels [height, width, in, out], in front of a ViT's blocks."""
    inputs = (3, *stages[:-1])
    block = {
        "norm1": {"scale": (width,), "bias": (width,)},
        "attn": {
            **{name: _dense(width, width) for name in ("query", "key", "value", "out")},
        },
        "norm2": {"scale": (width,), "bias": (width,)},
        "mlp": {"fc1": _dense(width, 4 * width), "fc2": _dense(4 * width, width)},
    }
    return {
        "convolutions": {
            f"stage{index}": {
                "conv1": {"kernel": (3, 3, before, after)},
                "norm1": {"scale": (after,), "bias": (after,)},
                "conv2": {"kernel": (3, 3, after, after)},
                "norm2": {"scale": (after,), "bias": (after,)},
            }
            for index, (before, after) in enumerate(zip(inputs, stages, strict=True))
        },
        "patch_embed": {"kernel": (2, 2, stages[-1], width), "bias": (width,)},
        "pos_embed": (1, 196, width),
        "blocks": {str(index): block for index in range(blocks)},
        "head": _dense(width, classes),
    }


def _dense(fan_in: int, fan_out: int) -> Tree:
    return {"kernel": (fan_in, fan_out), "bias": (fan_out,)}
