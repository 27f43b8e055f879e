"""Parameters of published models and how one would shard them, in shapes: nothing is allocated.

Llama 3 8B (arXiv 2407.21783, table 3), with a leaf per layer and with its layers stacked by scan,
and Moonlight 16B-A3B (arXiv 2502.16982, section 3.3), its 26 mixture-of-experts layers stacked.
Specs are those of MaxText's default rules: the width over `fsdp`, heads and hidden units over `tp`,
experts over `expert`, which joins `fsdp` for every other parameter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter."""

    shape: tuple[int, ...]
    """Its shape: fan in before fan out, stacks in front."""
    spec: P
    """How it is sharded."""

    def stacked(self, layers: int) -> Leaf:
        """The same parameter of so many layers, along a new leading axis."""
        return Leaf((layers, *self.shape), P(None, *self.spec))

    def on(self, mesh: Mesh, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """As an abstract array on a mesh."""
        return jax.ShapeDtypeStruct(self.shape, dtype, sharding=NamedSharding(mesh, self.spec))


def llama3_8b(*, scanned: bool) -> dict[str, Any]:
    """Llama 3 8B on a mesh of `fsdp` and `tp`."""
    width, hidden, keys, vocabulary, layers = 4096, 14336, 1024, 128256, 32
    into, out = P("fsdp", "tp"), P("tp", "fsdp")
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
        "embedding": Leaf((vocabulary, width), P("tp", "fsdp")),
        "layers": _stack(layer, layers) if scanned else {str(i): layer for i in range(layers)},
        "final_norm": Leaf((width,), P()),
        "lm_head": Leaf((width, vocabulary), into),
    }


def moonlight_16b() -> dict[str, Any]:
    """Moonlight 16B-A3B on a mesh of `expert` and `fsdp`."""
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


def _mlp(width: int, hidden: int, over: tuple[str, ...]) -> dict[str, Leaf]:
    return {
        "gate_proj": Leaf((width, hidden), P(over, None)),
        "up_proj": Leaf((width, hidden), P(over, None)),
        "down_proj": Leaf((hidden, width), P(None, over)),
    }


def _stack(tree: Any, layers: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.stacked(layers), tree)
