"""The models of the experiments: Llamas and mixtures of experts, by width and depth alone."""

from __future__ import annotations

from optax_muon.models.llama import LlamaConfig
from optax_muon.models.moe import gate_scaling
from optax_muon.models.moonlight import MoonlightConfig

HEAD_DIM = 16
"""Features of a head, at every width."""


def llama(hidden_size: int, layers: int, context: int = 128) -> LlamaConfig:
    """A Llama with heads of 16 features and an MLP of 8/3 the width."""
    return LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        intermediate_size=round(hidden_size / 6) * 16,
        context=context,
    )


def mixture(hidden_size: int, layers: int, context: int = 128) -> MoonlightConfig:
    """A Moonlight with 8 experts, 2 of them for a token, and one shared; the first block is dense.

    It has a head of 16 features for 16 of the width, and at least two: half of a query's and of a
    key's features are rotated.
    """
    experts, chosen = 8, 2
    return MoonlightConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden_size // HEAD_DIM),
        qk_nope_head_dim=HEAD_DIM // 2,
        qk_rope_head_dim=HEAD_DIM // 2,
        v_head_dim=HEAD_DIM,
        kv_lora_rank=max(16, hidden_size // 2),
        intermediate_size=round(hidden_size / 6) * 16,
        moe_intermediate_size=round(hidden_size / 12) * 8,
        n_routed_experts=experts,
        num_experts_per_tok=chosen,
        n_shared_experts=1,
        routed_scaling_factor=round(gate_scaling(experts, chosen), 3),
        context=context,
    )


MODELS = {
    f"{width} x {layers}": llama(width, layers)
    for width, layers in ((16, 2), (32, 2), (48, 2), (64, 3), (80, 3), (128, 3))
}
"""The ladder of sizes, by width and depth."""
LARGE = {
    f"{width} x {layers}": llama(width, layers, context=256)
    for width, layers in ((64, 3), (96, 4), (128, 5), (192, 6), (288, 8))
}
"""The ladder for an accelerator, up to 8 million parameters: two epochs of the text at the end."""
MIXTURES = {
    f"{width} x {layers}": mixture(width, layers)
    for width, layers in ((16, 2), (24, 2), (32, 2), (48, 2), (64, 3))
}
"""The ladder of mixtures of experts, by width and depth."""
TOY = {"16 x 1": llama(16, 1, context=32), "32 x 1": llama(32, 1, context=32)}
"""Two sizes that train in seconds, for tests."""
TOY_MIXTURES = {"16 x 2": mixture(16, 2, context=32)}
"""The same of mixtures."""
