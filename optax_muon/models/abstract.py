"""Parameter trees of published models, and how one shards them: shapes only, nothing is allocated.

Llama 3 8B (arXiv 2407.21783, table 3) and Llama 3.2 1B, all layers stacked by scan or a leaf per
layer, and Moonlight 16B-A3B (arXiv 2502.16982, section 3.3) with its 26 mixture-of-experts layers
stacked. The width lies over `fsdp`, heads and hidden units over `tensor`; experts lie over `expert`,
which joins `fsdp` for every other parameter. `optax-muon plan` (`commands/plan.py`) plans for them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from optax_muon.matrices.paths import path_name


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: its shape and its spec."""

    shape: tuple[int, ...]
    """Its shape."""
    spec: P
    """Mesh axes that each of its axes is cut over."""

    @property
    def over(self) -> tuple[tuple[str, ...], ...]:
        """The mesh axes of every entry of the spec, as tuples."""
        entries = (() if e is None else (e,) if isinstance(e, str) else e for e in self.spec)
        return tuple(tuple(entry) for entry in entries)

    def stacked(self, layers: int) -> Leaf:
        """The same parameter of so many layers, along a new leading axis."""
        return Leaf((layers, *self.shape), P(None, *self.spec))

    def on(self, mesh: Mesh | AbstractMesh, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        """As an abstract array on a mesh; axes that the mesh lacks are left out of the spec.

        >>> mesh = AbstractMesh((8,), ("fsdp",))
        >>> Leaf((64, 256), P("fsdp", "tensor")).on(mesh).sharding.shard_shape((64, 256))
        (8, 256)
        """
        present_axes = (
            tuple(name for name in over if name in mesh.axis_names) for over in self.over
        )
        spec = P(*(over or None for over in present_axes))
        return jax.ShapeDtypeStruct(self.shape, dtype, sharding=NamedSharding(mesh, spec))


Tree = dict[str, Any]
"""Nested dicts of `Leaf`."""


def laid_out(shapes: Any, specs: Mapping[str, tuple[Any, ...]]) -> Tree:
    """Every parameter's shape and spec.

    Args:
        shapes: a tree of `ShapeDtypeStruct`s.
        specs: mesh axes of a parameter's last axes, by the end of its path; the first that fits
            decides. Axes in front, of stacked layers, are whole.

    >>> shapes = {"layers": {"up": jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)}}
    >>> laid_out(shapes, {"up": ("fsdp", None)})["layers"]["up"].spec
    P...(None, 'fsdp', None)
    """

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> Leaf:
        name = path_name(path)
        own = next(axes for end, axes in specs.items() if name.endswith(end))
        return Leaf(shape.shape, P(*[None] * (len(shape.shape) - len(own)), *own))

    tree: Tree = jax.tree.map_with_path(leaf, shapes)
    return tree


def leaves_on(tree: Tree, mesh: Mesh | AbstractMesh, dtype: DTypeLike = jnp.float32) -> Any:
    """The tree as abstract arrays on a mesh."""
    return jax.tree.map(lambda leaf: leaf.on(mesh, dtype), tree)


def axes(tree: Tree) -> tuple[str, ...]:
    """The mesh axes that the specs of a tree name, in alphabetical order.

    >>> axes(moonlight_16b())
    ('expert', 'fsdp')
    """
    entries = (over for leaf in jax.tree.leaves(tree) for over in leaf.over)
    return tuple(sorted({name for over in entries for name in over}))


def llama3_8b(*, scanned: bool) -> Tree:
    """Llama 3 8B, for a mesh of `fsdp` and `tensor`."""
    width, vocabulary = 4096, 128256
    tree = llama(width, hidden=14336, keys=1024, vocabulary=vocabulary, layers=32, scanned=scanned)
    return {**tree, "lm_head": Leaf((width, vocabulary), P("fsdp", "tensor"))}


def llama3_1b(*, scanned: bool) -> Tree:
    """Llama 3.2 1B, for a mesh of `fsdp` and `tensor`; its embedding is its head."""
    return llama(2048, hidden=8192, keys=512, vocabulary=128256, layers=16, scanned=scanned)


def moonlight_16b() -> Tree:
    """Moonlight 16B-A3B, for a mesh of `expert` and `fsdp`."""
    width, vocabulary, layers = 2048, 163840, 27
    whole = ("fsdp", "expert")
    attention = {
        "attention_norm": Leaf((width,), P()),
        "q_proj": Leaf((width, 16 * (128 + 64)), P(whole, None)),
        "kv_a_proj": Leaf((width, 512 + 64), P(whole, None)),
        "kv_a_norm": Leaf((512,), P()),
        "kv_b_proj": Leaf((512, 16 * (128 + 128)), P(whole, None)),
        "o_proj": Leaf((16 * 128, width), P(None, whole)),
        "mlp_norm": Leaf((width,), P()),
    }
    routed = {
        "gate_proj": Leaf((64, width, 1408), P("expert", "fsdp", None)),
        "up_proj": Leaf((64, width, 1408), P("expert", "fsdp", None)),
        "down_proj": Leaf((64, 1408, width), P("expert", None, "fsdp")),
    }
    router = {"kernel": Leaf((width, 64), P(whole, None)), "bias": Leaf((64,), P())}
    mixture = {"router": router, "experts": routed, "shared_experts": _mlp(width, 2 * 1408, whole)}
    return {
        "embedding": Leaf((vocabulary, width), P(None, whole)),
        "dense_layer": {**attention, "mlp": _mlp(width, 11264, whole)},
        "moe_layers": _stack({**attention, **mixture}, layers - 1),
        "final_norm": Leaf((width,), P()),
        "lm_head": Leaf((width, vocabulary), P(whole, None)),
    }


MODELS: dict[str, Callable[[], Tree]] = {
    "llama3-1b": functools.partial(llama3_1b, scanned=True),
    "llama3-8b": functools.partial(llama3_8b, scanned=True),
    "llama3-8b-unrolled": functools.partial(llama3_8b, scanned=False),
    "moonlight-16b-a3b": moonlight_16b,
}
"""The trees by the names that the command line knows them by."""


def llama(
    width: int, *, hidden: int, keys: int, vocabulary: int, layers: int, scanned: bool
) -> Tree:
    """A Llama whose embedding is its head, for a mesh of `fsdp` and `tensor`.

    Args:
        width: features of the residual stream.
        hidden: features inside the MLP.
        keys: features of all keys of a token, and of all values.
        vocabulary: rows of the embedding.
        layers: how many.
        scanned: whether layers are stacked, or a subtree each.
    """
    into, out = P("fsdp", "tensor"), P("tensor", "fsdp")
    layer = {
        "attention_norm": Leaf((width,), P()),
        "q_proj": Leaf((width, width), into),
        "k_proj": Leaf((width, keys), into),
        "v_proj": Leaf((width, keys), into),
        "o_proj": Leaf((width, width), out),
        "mlp_norm": Leaf((width,), P()),
        "gate_proj": Leaf((width, hidden), into),
        "up_proj": Leaf((width, hidden), into),
        "down_proj": Leaf((hidden, width), out),
    }
    return {
        "embedding": Leaf((vocabulary, width), P("tensor", "fsdp")),
        "layers": _stack(layer, layers) if scanned else {str(i): layer for i in range(layers)},
        "final_norm": Leaf((width,), P()),
    }


def _mlp(width: int, hidden: int, over: tuple[str, ...]) -> Tree:
    return {
        "gate_proj": Leaf((width, hidden), P(over, None)),
        "up_proj": Leaf((width, hidden), P(over, None)),
        "down_proj": Leaf((hidden, width), P(None, over)),
    }


def _stack(tree: Tree, layers: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.stacked(layers), tree)
