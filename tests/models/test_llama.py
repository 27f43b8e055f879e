"""The Llama against a naive float64 forward pass, and the routing of its parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_muon
from optax_muon.models.llama import Llama, LlamaConfig
from optax_muon.training.presets import PRESETS

CONFIG = LlamaConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=40,
    context=12,
    vocab_size=50,
    rope_theta=100.0,
)


@functools.cache
def trained_looking(config):
    """Parameters with norms away from one, so that a norm left out would show."""
    model = Llama(config)
    params = jax.jit(model.init)(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(structure, noisy)


def logits(config, tokens):
    model, params = trained_looking(config)
    return np.asarray(jax.jit(model.forward)(params, jnp.asarray(tokens, jnp.int32))[0])


def tokens_of(config, seed=0, batch=2):
    return np.random.default_rng(seed).integers(0, config.vocab_size, [batch, config.context])


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2) + eps) * scale


def turned(x, position, theta):
    """RoPE of one head's vector: pairs (i, i + h/2) are complex numbers that rotate."""
    half = len(x) // 2
    pairs = x[:half] + 1j * x[half:]
    pairs = pairs * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([pairs.real, pairs.imag])


def naive_attention(config, p, h):
    """One sequence `[t, width]`, one query head and one position at a time."""
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    q, k, v = (h @ p[f"{name}_proj"]["kernel"] for name in "qkv")
    out = np.zeros_like(q)
    for head in range(config.num_attention_heads):
        mine = slice(head * size, (head + 1) * size)
        shared = slice(head // group * size, (head // group + 1) * size)
        for t in range(len(h)):
            query = turned(q[t, mine], t, config.rope_theta)
            scores = [query @ turned(k[s, shared], s, config.rope_theta) for s in range(t + 1)]
            weights = np.exp(np.array(scores) / np.sqrt(size))
            out[t, mine] = weights / weights.sum() @ v[: t + 1, shared]
    return out @ p["o_proj"]["kernel"]


def naive_logits(config, params, tokens):
    """The decoder for one sequence of tokens, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    norm = functools.partial(np.apply_along_axis, rms_norm, 1)
    x = p["embed"]["embedding"][tokens]
    for i in range(config.num_hidden_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        h = norm(x, scale=layer["attn_norm"]["scale"], eps=config.rms_norm_eps)
        x = x + naive_attention(config, layer["attn"], h)
        h = norm(x, scale=layer["mlp_norm"]["scale"], eps=config.rms_norm_eps)
        gate, up = (h @ layer["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up"))
        x = x + gate / (1 + np.exp(-gate)) * up @ layer["mlp"]["down_proj"]["kernel"]
    x = norm(x, scale=p["final_norm"]["scale"], eps=config.rms_norm_eps)
    return x @ (p["embed"]["embedding"].T if config.tie_word_embeddings else p["lm_head"]["kernel"])


@pytest.mark.parametrize(
    "change",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1}],
)
def test_logits_are_those_of_the_naive_float64_forward_pass(change):
    config = dataclasses.replace(CONFIG, **change)
    tokens = tokens_of(config)
    truth = np.stack([naive_logits(config, trained_looking(config)[1], row) for row in tokens])
    # float32 through three layers of logits about 5 large: a few dozen roundings of 6e-8 each.
    np.testing.assert_allclose(logits(config, tokens), truth, rtol=1e-4, atol=1e-4)


def test_a_position_does_not_see_what_comes_after_it():
    tokens = tokens_of(CONFIG)
    changed = tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % CONFIG.vocab_size
    before, after = logits(CONFIG, tokens), logits(CONFIG, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).min(axis=-1).max() > 0


def test_sequences_of_a_batch_do_not_see_each_other():
    tokens = tokens_of(CONFIG)
    alone = logits(CONFIG, tokens[:1])
    np.testing.assert_allclose(logits(CONFIG, tokens)[:1], alone, rtol=1e-5, atol=1e-5)


@jax.numpy_dtype_promotion("standard")  # jax.nn.dot_product_attention promotes bfloat16 itself
def test_bfloat16_computes_nearly_the_same_from_float32_parameters():
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = trained_looking(low)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact, rough = logits(CONFIG, tokens_of(CONFIG)), logits(low, tokens_of(CONFIG))
    assert rough.dtype == np.float32
    # eps of bfloat16 is 2**-8; ten roundings in a row of logits of deviation 1 to 10.
    assert np.sqrt(np.mean((rough - exact) ** 2)) < 0.04 * np.std(exact)


@pytest.mark.parametrize(
    "name", [name for name, row in PRESETS.items() if isinstance(row.model, LlamaConfig)]
)
@jax.numpy_dtype_promotion("standard")
def test_the_number_of_parameters_is_the_sum_over_the_written_out_layers(name):
    c = PRESETS[name].model
    tree = jax.eval_shape(Llama(c).init, jax.random.key(0))
    attention = (
        2 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    )
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    expected = 2 * c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == expected


def test_muon_takes_the_stacked_kernels_as_batches_and_nothing_else():
    params = trained_looking(CONFIG)[1]
    rows = optax_muon.label(params).rows
    table = {row.path: [(b.batch, b.rows, b.cols) for b in row.blocks] for row in rows}
    assert table == {
        "embed/embedding": [],
        "final_norm/scale": [],
        "layers/attn/k_proj/kernel": [(3, 24, 8)],
        "layers/attn/o_proj/kernel": [(3, 24, 24)],
        "layers/attn/q_proj/kernel": [(3, 24, 24)],
        "layers/attn/v_proj/kernel": [(3, 24, 8)],
        "layers/attn_norm/scale": [],
        "layers/mlp/down_proj/kernel": [(3, 40, 24)],
        "layers/mlp/gate_proj/kernel": [(3, 24, 40)],
        "layers/mlp/up_proj/kernel": [(3, 24, 40)],
        "layers/mlp_norm/scale": [],
        "lm_head/kernel": [],
    }


@pytest.mark.parametrize("change", [{"hidden_size": 20}, {"num_key_value_heads": 4}])
def test_sizes_that_do_not_divide_are_refused(change):
    with pytest.raises(ValueError, match="must be a multiple"):
        dataclasses.replace(CONFIG, **change)
