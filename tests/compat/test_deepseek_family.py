"""The DeepSeek-V3 family at its real sizes: what Muon is given, and what `import-hf` refuses."""

import math

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("flax")

from optax_muon import label
from optax_muon.models import Moonlight
from optax_muon.models.huggingface.config import from_huggingface

COMMON = {
    "model_type": "deepseek_v3", "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "kv_lora_rank": 512, "norm_topk_prob": True,
}  # fmt: skip
LARGE = {
    "hidden_size": 7168, "num_hidden_layers": 61, "q_lora_rank": 1536, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
# What the published config.json say.
CONFIGS = {
    "Moonlight-16B-A3B": COMMON | {
        "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "q_lora_rank": None, "intermediate_size": 11264, "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.446, "vocab_size": 163840, "rope_theta": 50000.0,
        "max_position_embeddings": 8192,
    },
    "DeepSeek-V3": COMMON | LARGE | {
        "num_attention_heads": 128, "n_routed_experts": 256, "first_k_dense_replace": 3,
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "vocab_size": 129280,
        "rope_theta": 10000, "max_position_embeddings": 163840, "num_nextn_predict_layers": 1,
    },
    "Kimi-K2": COMMON | LARGE | {
        "num_attention_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "vocab_size": 163840,
        "rope_theta": 50000.0, "max_position_embeddings": 131072,
    },
}  # fmt: skip
# The weights are quantized and the contexts were stretched: neither is Moonlight's.
PUBLISHED = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
}


def matrices(config):
    """The matrices that Muon should be given, by the last name of their module: rows x columns."""
    c, heads = config, config["num_attention_heads"]
    latent = c["q_lora_rank"]
    head = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    shared = c["n_shared_experts"] * c["moe_intermediate_size"]
    found = {
        "kv_a_proj": (c["hidden_size"], c["kv_lora_rank"] + c["qk_rope_head_dim"]),
        "kv_b_proj": (c["kv_lora_rank"], heads * (c["qk_nope_head_dim"] + c["v_head_dim"])),
        "o_proj": (heads * c["v_head_dim"], c["hidden_size"]),
        "router": (c["hidden_size"], c["n_routed_experts"]),
        **{f"mlp/{n}": (c["hidden_size"], c["intermediate_size"]) for n in ("gate", "up")},
        **{f"experts/{n}": (c["hidden_size"], c["moe_intermediate_size"]) for n in ("gate", "up")},
        **{f"shared/{n}": (c["hidden_size"], shared) for n in ("gate", "up")},
        "mlp/down": (c["intermediate_size"], c["hidden_size"]),
        "experts/down": (c["moe_intermediate_size"], c["hidden_size"]),
        "shared/down": (shared, c["hidden_size"]),
    }
    if latent is None:
        return found | {"q_proj": (c["hidden_size"], heads * head)}
    return found | {"q_a_proj": (c["hidden_size"], latent), "q_b_proj": (latent, heads * head)}


def name_of(path):
    """`experts/gate` for `moe_layers/experts/gate_proj` and `mlp/experts/0/gate_proj/weight`."""
    parts = path.replace("shared_experts", "shared").replace("_with_mqa", "").split("/")
    if "router" in parts or parts[-2] == "gate":
        return "router"
    projection = next(part for part in reversed(parts) if part.endswith("_proj"))
    group = next((part for part in ("shared", "experts") if part in parts), "mlp")
    kind = projection.removesuffix("_proj")
    return f"{group}/{kind}" if kind in ("gate", "up", "down") else projection


def given(params):
    """Rows x columns of every matrix that `label` gives Muon, by `name_of`; and the other paths."""
    rows = label(params).rows
    found = {}
    for row in rows:
        if row.view is not None:
            (block,) = row.view.bind(row.shape).blocks
            assert found.setdefault(name_of(row.path), (block.rows, block.cols)) == (
                block.rows, block.cols,
            )  # fmt: skip
    return found, [row.path for row in rows if row.view is None]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_of_a_config_gives_muon_its_matrices(name):
    config = from_huggingface(CONFIGS[name])
    params = jax.eval_shape(Moonlight(config).init, jax.random.key(0))
    found, others = given(params)
    assert found == matrices(CONFIGS[name])
    assert all(
        path.endswith(("scale", "bias", "embedding")) or "lm_head" in path for path in others
    )


def tensors(config):
    """The first layer of experts of a checkpoint, with four of them: torch's `[out, in]`."""
    dense, moe = "model.layers.0.mlp", "model.layers.1.mlp"
    found = matrices(config)
    for name, (rows, cols) in found.items():
        group, _, kind = name.rpartition("/")
        folders = {
            "mlp": [dense],
            "shared": [f"{moe}.shared_experts"],
            "experts": [f"{moe}.experts.{i}" for i in range(4)],
            "": [f"model.layers.{i}.self_attn" for i in range(2)],
        }[group]
        if name == "router":
            yield f"{moe}.gate.weight", (cols, rows)
            continue
        own = {"kv_a_proj": "kv_a_proj_with_mqa"}.get(
            kind, kind if "_proj" in kind else f"{kind}_proj"
        )
        for folder in folders:
            yield f"{folder}.{own}.weight", (cols, rows)
    for i in range(2):
        yield f"model.layers.{i}.input_layernorm.weight", (config["hidden_size"],)
        yield f"model.layers.{i}.self_attn.kv_a_layernorm.weight", (config["kv_lora_rank"],)
    yield f"{moe}.gate.e_score_correction_bias", (config["n_routed_experts"],)
    yield "model.norm.weight", (config["hidden_size"],)
    yield "model.embed_tokens.weight", (config["vocab_size"], config["hidden_size"])
    yield "lm_head.weight", (config["vocab_size"], config["hidden_size"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_of_a_checkpoint_give_muon_the_same_matrices(name):
    tree = {}
    for path, shape in tensors(CONFIGS[name]):
        *above, last = path.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    found, others = given(tree)
    assert found == matrices(CONFIGS[name])
    assert len(others) == 8


def test_what_is_not_moonlights_is_named_in_one_sentence():
    kimi = CONFIGS["Kimi-K2"] | PUBLISHED | {"model_type": "kimi_k2"}
    with pytest.raises(ValueError) as error:
        from_huggingface(kimi)
    message = str(error.value)
    assert message.startswith("config.json does not describe a Moonlight: ")
    assert "model_type is 'kimi_k2', but must be 'deepseek_v3'" in message
    assert "'quant_method': 'fp8'" in message and "but must be None" in message
    assert "rope_type is 'yarn', but must be 'default'" in message
    assert "\n" not in message


def test_the_sizes_are_those_that_were_published():
    """Parameters in billions, as the model cards say: 15.96, 671 and 1026."""
    totals = {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(
            jax.eval_shape(Moonlight(from_huggingface(config)).init, jax.random.key(0))
        )) / 1e9
        for name, config in CONFIGS.items()
    }  # fmt: skip
    assert totals == pytest.approx(
        {"Moonlight-16B-A3B": 15.96, "DeepSeek-V3": 671, "Kimi-K2": 1026}, rel=2e-3
    )
