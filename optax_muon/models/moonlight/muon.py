"""How Muon and QK-Clip see Moonlight's heads, and how its parameters are sharded."""

from __future__ import annotations

import optax_muon
from optax_muon.models.abstract import Specs
from optax_muon.models.mesh import FSDP_AXES
from optax_muon.models.moonlight.config import MoonlightConfig

SPECS: Specs = {
    "embedding": ("tensor", FSDP_AXES),
    "experts/gate_proj": ("expert", "fsdp", "tensor"),
    "experts/up_proj": ("expert", "fsdp", "tensor"),
    "experts/down_proj": ("expert", "tensor", "fsdp"),
    "o_proj/kernel": ("tensor", FSDP_AXES),
    "down_proj/kernel": ("tensor", FSDP_AXES),
    "q_a_proj/kernel": (FSDP_AXES, None),
    "kv_a_proj/kernel": (FSDP_AXES, None),
    "router/kernel": (FSDP_AXES, None),
    "kernel": (FSDP_AXES, "tensor"),
    "scale": (None,),
}
"""Mesh axes of every parameter, by the end of its path."""


def per_head_views(config: MoonlightConfig) -> dict[str, optax_muon.View]:
    """Views that give Muon three matrices per head: its query, its key and its value.

    For `muon(..., views=per_head_views(config))` and `label`; the role rules decide every other
    parameter. The rotary and the other features of a head's query are one matrix.

    >>> from optax_muon.models.moonlight.config import CONFIGS
    >>> views = per_head_views(CONFIGS["moonlight-tiny"])
    >>> views["*/kv_b_proj/kernel"].bind((3, 48, 224)).blocks
    (Block(batch=12, rows=48, cols=24), Block(batch=12, rows=48, cols=32))
    """
    heads = config.num_attention_heads
    q = optax_muon.Split.equal(-1, heads * config.qk_head_dim, parts=heads)
    return {
        f"*/{config.queries}/kernel": optax_muon.View(-2, -1, q),
        "*/kv_b_proj/kernel": optax_muon.View(-2, -1, _keys_and_values(config)),
    }


def attentions(config: MoonlightConfig) -> tuple[optax_muon.MLA, ...]:
    """Where the heads are, for `qk_clip`, which takes `ForwardStats.max_logits` as it is.

    >>> from optax_muon.models.moonlight.config import CONFIGS
    >>> tx = optax_muon.qk_clip(attentions(CONFIGS["moonlight-tiny"]))
    >>> [clipped.q_rope.path for clipped in attentions(CONFIGS["moonlight-tiny"])]
    ['dense_layers/attn/q_proj/kernel', 'moe_layers/attn/q_proj/kernel']
    """
    heads, kv = config.num_attention_heads, _keys_and_values(config)
    sizes = (config.qk_nope_head_dim, config.qk_rope_head_dim)
    q = optax_muon.Split(-1, sizes, (heads, heads), groups=heads)

    def stack(name: str) -> optax_muon.MLA:
        queries, keys = f"{name}/attn/{config.queries}/kernel", f"{name}/attn/kv_b_proj/kernel"
        return optax_muon.MLA(
            q_nope=optax_muon.Heads(queries, q, layers=0),
            q_rope=optax_muon.Heads(queries, q, part=1, layers=0),
            k_nope=optax_muon.Heads(keys, kv, layers=0),
        )

    lengths = {"dense_layers": config.first_k_dense_replace, "moe_layers": config.num_moe_layers}
    return tuple(stack(name) for name, length in lengths.items() if length)


def _keys_and_values(config: MoonlightConfig) -> optax_muon.Split:
    """The columns of `kv_b_proj`: for each head its key, then its value."""
    heads, sizes = config.num_attention_heads, (config.qk_nope_head_dim, config.v_head_dim)
    return optax_muon.Split(-1, sizes, (heads, heads), groups=heads)
