"""The sizes of Moonlight, under the names of Hugging Face's `DeepseekV3Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from optax_muon.models.sizes import size_refusals

SAVED = {"inputs": (), "attention": ("attention",), "rows": ("attention", "rows")}
"""What a block keeps for its backward pass beside its input, for `MoonlightConfig.saved`: names
that `jax.checkpoint` knows, of the outputs of the heads and of the rows that experts receive."""


@dataclasses.dataclass(frozen=True)
class MoonlightConfig:
    """The sizes of a Moonlight.

    Fields have their names in Hugging Face's `DeepseekV3Config`, but for `context`, `capacity`,
    `query_block` and `saved`. `context` is not `max_position_embeddings`: that bounds what a
    checkpoint was trained for, this is the length of the sequences at hand.
    """

    hidden_size: int
    """Features of the residual stream."""
    num_hidden_layers: int
    """Decoder blocks."""
    num_attention_heads: int
    """Attention heads."""
    qk_nope_head_dim: int
    """Features of a head's query and key that carry no position."""
    qk_rope_head_dim: int
    """Features of a head's query, and of the key that all heads share, that are rotated by
    position; even."""
    v_head_dim: int
    """Features of a head's value."""
    kv_lora_rank: int
    """Features of the latent vector that keys and values are made of."""
    intermediate_size: int
    """Features inside a dense block's SwiGLU."""
    moe_intermediate_size: int
    """Features inside an expert's SwiGLU."""
    n_routed_experts: int
    """Experts that the router chooses from."""
    num_experts_per_tok: int
    """Routed experts of each token."""
    n_shared_experts: int
    """Experts that all tokens go to, stored as one of `n_shared_experts` times the features."""
    context: int
    """Tokens of one training sequence."""
    q_lora_rank: int | None = None
    """Features of the latent vector that queries are made of; None projects the input directly."""
    first_k_dense_replace: int = 1
    """Blocks at the start that have a dense MLP instead of experts."""
    n_group: int = 1
    """Groups of experts; a token's experts are all in `topk_group` of them."""
    topk_group: int = 1
    """Groups that a token's experts may be in."""
    routed_scaling_factor: float = 1.0
    """Factor of the gates; the paper's is `balance.gate_scaling`."""
    norm_topk_prob: bool = True
    """Whether a token's gates are divided by their sum."""
    vocab_size: int = 256
    """Number of tokens; 256 when they are bytes."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths: the longest is `2 pi rope_theta` tokens."""
    rope_interleave: bool = True
    """Whether rotary pairs are adjacent, as in all published checkpoints, or half a head apart,
    as in Llama."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square under the root of RMSNorm, except for the norms of latents."""
    capacity: float | None = None
    """Tokens that an expert accepts, as a multiple of an even share; None drops no token."""
    query_block: int = 1024
    """Queries whose logits are in memory at once, forward and backward."""
    saved: str = "attention"
    """What a block saves for its backward pass beside its input, a key of `SAVED`. For a token of
    Moonlight `attention` takes 4 KiB per block, and `rows` another 22 KiB with 16 devices along
    `expert`, whose rows are then not sent a second time."""
    dtype: str = "float32"
    """Dtype of the matrix products; parameters, residual stream, norms, router and logits are
    float32."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for refusal in self._refusals():
            raise ValueError(refusal)

    @property
    def qk_head_dim(self) -> int:
        """Features of a head's query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Blocks with experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def queries(self) -> str:
        """Name of the projection that makes the heads' queries."""
        return "q_proj" if self.q_lora_rank is None else "q_b_proj"

    def _refusals(self) -> Iterator[str]:
        yield from size_refusals(self, {"first_k_dense_replace": 0, "qk_nope_head_dim": 0})
        if self.qk_rope_head_dim % 2:
            yield f"qk_rope_head_dim {self.qk_rope_head_dim} must be even"
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            yield (
                f"first_k_dense_replace {self.first_k_dense_replace} must be between 0 and "
                f"num_hidden_layers, {self.num_hidden_layers}"
            )
        if self.n_shared_experts < 1:
            yield f"n_shared_experts is {self.n_shared_experts}; it must be at least 1"
        if self.capacity is not None and self.capacity <= 0:
            yield f"capacity is {self.capacity}; it must be positive or None"
        if self.saved not in SAVED:
            yield f"saved is {self.saved!r}; it must be one of {', '.join(SAVED)}"
        yield from self._group_refusals()

    def _group_refusals(self) -> Iterator[str]:
        experts, groups, chosen = self.n_routed_experts, self.n_group, self.topk_group
        if groups > 1 and (experts % groups or experts < 2 * groups):
            yield (
                f"n_routed_experts {experts} must divide into groups of two or more, n_group is "
                f"{groups}"
            )
        if not 1 <= chosen <= groups:
            yield f"topk_group {chosen} must be between 1 and n_group, {groups}"
        most = experts // groups * chosen
        if not 1 <= self.num_experts_per_tok <= most:
            yield (
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be at least 1 and at "
                f"most the experts of {chosen} of {groups} groups, {most}"
            )


CONFIGS = {
    "moonlight-tiny": MoonlightConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=32,
        kv_lora_rank=48,
        intermediate_size=344,
        moe_intermediate_size=88,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        context=128,
        routed_scaling_factor=1.409,
    ),
    "moonlight-small": MoonlightConfig(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=32,
        kv_lora_rank=96,
        intermediate_size=688,
        moe_intermediate_size=176,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        context=256,
        routed_scaling_factor=1.991,
    ),
    "moonlight-16b-a3b": MoonlightConfig(
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        kv_lora_rank=512,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        context=8192,
        routed_scaling_factor=2.446,
        vocab_size=163840,
        rope_theta=50_000.0,
        dtype="bfloat16",
    ),
}
"""The paper's sizes (arXiv 2502.16982, section 3.3), and two that train on a CPU in minutes and in
hours."""


def of_width(hidden_size: int) -> MoonlightConfig:
    """A small Moonlight: 8 experts, 2 of them for a token, and one shared; a layer for 32 features.

    >>> of_width(64).num_hidden_layers
    2
    """
    return MoonlightConfig(
        hidden_size=hidden_size,
        num_hidden_layers=max(2, hidden_size // 32),
        num_attention_heads=max(1, hidden_size // 32),
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=32,
        kv_lora_rank=max(16, hidden_size * 3 // 8),
        intermediate_size=round(hidden_size / 3) * 8,
        moe_intermediate_size=round(hidden_size / 12) * 8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        context=128,
        routed_scaling_factor=CONFIGS["moonlight-tiny"].routed_scaling_factor,
    )
