"""The trees of parameters that updates are measured on: dicts of shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_muon.models import abstract as shapes

Tree = dict[str, Any]


LLAMA = {"width": 512, "hidden": 1408, "keys": 512, "vocabulary": 8192, "layers": 8}
GROUPED = {"width": 1024, "hidden": 4096, "keys": 256, "vocabulary": 8192, "layers": 2}
EXPERTS = {"width": 256, "hidden": 128, "experts": 64, "layers": 6, "vocabulary": 8192}
VISION = {"width": 384, "blocks": 6, "stages": (64, 128, 256, 512), "classes": 1000}
TREES: dict[str, Callable[[], Tree]] = {
    "a Llama unrolled": lambda: _llama(**LLAMA, scanned=False),
    "b Llama scanned": lambda: _llama(**LLAMA, scanned=True),
    "c Llama grouped": lambda: _llama(**GROUPED, scanned=False),
    "d mixture of experts": lambda: _mixture(**EXPERTS),
    "e vision": lambda: _vision(**VISION),
}
"""Makers of trees of shapes."""
TOYS: dict[str, Callable[[], Tree]] = {
    "toy": lambda: (
        _llama(16, hidden=24, keys=8, vocabulary=32, layers=2, scanned=True)
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
    sizes = {"width": 64, "hidden": 176, "keys": 64, "vocabulary": 64}
    layer = _llama(**sizes, layers=layers, scanned=scanned)["layers"]
    if scanned:
        return {"layers": _matrices(layer)}
    return {"layers": {name: _matrices(each) for name, each in layer.items()}}


def _matrices(layer: Tree) -> Tree:
    return {name: shape for name, shape in layer.items() if name.endswith("_proj")}


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def _llama(
    width: int, *, hidden: int, keys: int, vocabulary: int, layers: int, scanned: bool
) -> Tree:
    tree = shapes.llama(
        width, hidden=hidden, keys=keys, vocabulary=vocabulary, layers=layers, scanned=scanned
    )
    return jax.tree.map(lambda leaf: leaf.shape, tree) | {"lm_head": (width, vocabulary)}


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
