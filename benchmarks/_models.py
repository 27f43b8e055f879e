"""The models of the experiments: Llamas that differ in width and depth alone."""

from __future__ import annotations

from optax_muon.models.llama import LlamaConfig

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


MODELS = {
    f"{width} x {layers}": llama(width, layers)
    for width, layers in ((16, 2), (32, 2), (48, 2), (64, 3), (96, 3), (128, 3))
}
"""The ladder of sizes, by width and depth."""
LARGE = {
    f"{width} x {layers}": llama(width, layers, context=256)
    for width, layers in ((64, 3), (96, 4), (128, 5), (192, 6), (288, 8))
}
"""The ladder for an accelerator, up to 8 million parameters: two epochs of the text at the end."""
TOY = {"16 x 1": llama(16, 1, context=32), "32 x 1": llama(32, 1, context=32)}
"""Two sizes that train in seconds, for tests."""
