"""Moonlight against a naive float64 forward pass, on meshes, and its mixture, balance and routing.

`test_huggingface.py` holds it to an implementation that no one here wrote.
"""

import dataclasses
import functools
import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import chips
from closeness import assert_trees_close_to_largest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.models.abstract import on_mesh
from optax_muon.models.moe import balance, experts, grouped_matmul
from optax_muon.models.moe.experts import Experts
from optax_muon.models.moe.grouped_matmul import grouped_dot
from optax_muon.models.moonlight import (
    CONFIGS,
    Moonlight,
    MoonlightConfig,
    count,
    per_head_views,
)

CONFIG = MoonlightConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    kv_lora_rank=10,
    intermediate_size=40,
    moe_intermediate_size=16,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=2,
    context=12,
    routed_scaling_factor=1.4,
    vocab_size=50,
    rope_theta=100.0,
    query_block=5,
)
WIDE = dataclasses.replace(
    CONFIG, hidden_size=32, kv_lora_rank=16, intermediate_size=48, vocab_size=48, n_routed_experts=8
)
"""Its sizes divide over eight devices, however they are arranged."""


@functools.cache
def noisy(config):
    """Parameters with norms away from one, logits not small, and biases that matter."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        norm, fan_in = leaf.shape[-1:] == leaf.shape[1:], leaf.shape[-2:][0]
        size = (0.2, 1.0) if norm or len(leaf.shape) == 1 else (1.3 * fan_in**-0.5, 0.0)
        return jnp.asarray(size[0] * rng.standard_normal(leaf.shape) + size[1], jnp.float32)

    bias = jnp.asarray(
        0.1 * rng.standard_normal([config.num_moe_layers, config.n_routed_experts]), jnp.float32
    )
    return jax.tree.map(draw, Moonlight(config).abstract_params), bias


def tokens_of(config, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab_size, [batch, config.context]), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, bias):
    return Moonlight(config).forward(params, tokens, bias)


# ---- the naive forward pass: one sequence, one head, one position, one token at a time -----------


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def turned(config, x, position):
    """RoPE of one vector: its pairs are complex numbers that rotate."""
    half = len(x) // 2
    a, b = (x[::2], x[1::2]) if config.rope_interleave else (x[:half], x[half:])
    pairs = (a + 1j * b) * np.exp(1j * position * config.rope_theta ** (-np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag])


def naive_attention(config, p, h):
    """What is added to the stream, and the logits of each head."""
    q = h
    if config.q_lora_rank is not None:
        q = rms_norm(h @ p["q_a_proj"]["kernel"], p["q_a_norm"]["scale"], 1e-6)
    q = q @ p["q_proj" if config.q_lora_rank is None else "q_b_proj"]["kernel"]
    latent = h @ p["kv_a_proj"]["kernel"]
    shared_key = latent[:, config.kv_lora_rank :]
    kv = rms_norm(latent[:, : config.kv_lora_rank], p["kv_a_norm"]["scale"], 1e-6)
    kv = kv @ p["kv_b_proj"]["kernel"]
    outputs, all_logits = [], []
    for head in range(config.num_attention_heads):
        query = np.split(q, config.num_attention_heads, axis=1)[head]
        key, value = np.split(
            np.split(kv, config.num_attention_heads, axis=1)[head],
            [config.qk_nope_head_dim],
            axis=1,
        )
        output, logits = [], []
        for t in range(len(h)):
            scores = []
            for s in range(t + 1):
                rope = turned(config, query[t, config.qk_nope_head_dim :], t) @ turned(
                    config, shared_key[s], s
                )
                scores.append(query[t, : config.qk_nope_head_dim] @ key[s] + rope)
            scores = np.array(scores) / math.sqrt(config.qk_head_dim)
            weights = np.exp(scores)
            output.append(weights / weights.sum() @ value[: t + 1])
            logits.extend(scores)
        outputs.append(output)
        all_logits.append(logits)
    return np.concatenate(outputs, axis=1) @ p["o_proj"]["kernel"], np.array(all_logits)


def swiglu(p, h):
    gate, up, down = (p[f"{name}_proj"] for name in ("gate", "up", "down"))
    gate, up, down = (w["kernel"] if isinstance(w, dict) else w for w in (gate, up, down))
    gated = h @ gate
    return (gated / (1 + np.exp(-gated)) * (h @ up)) @ down


def naive_choice(config, scores, bias):
    ranks = scores + bias
    groups = np.split(np.arange(config.n_routed_experts), config.n_group)
    best = [np.sort(ranks[group])[-2:].sum() for group in groups]
    open_ = np.concatenate([groups[g] for g in np.argsort(best)[-config.topk_group :]])
    return open_[np.argsort(ranks[open_])[-config.num_experts_per_tok :]]


def naive_mixture(config, p, h, bias):
    """What is added to the stream, how often each expert was chosen, and the mean entropy."""
    y, load, entropies = swiglu(p["shared_experts"], h), np.zeros(config.n_routed_experts, int), []
    for t, x in enumerate(h):
        scores = 1 / (1 + np.exp(-(x @ p["router"]["kernel"])))
        chosen = naive_choice(config, scores, bias)
        gates = scores[chosen] / (scores[chosen].sum() if config.norm_topk_prob else 1)
        for expert, gate in zip(chosen, gates, strict=True):
            mine = {name: stack[expert] for name, stack in p["experts"].items()}
            y[t] += config.routed_scaling_factor * gate * swiglu(mine, x)
            load[expert] += 1
        shares = scores / scores.sum()
        entropies.append(-(shares * np.log(shares)).sum())
    return y, load, np.mean(entropies)


def naive(config, params, bias, tokens):
    """Logits and report of one sequence, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["embed"]["embedding"][tokens]
    attention_logits, loads, entropies = [], [], []
    for i in range(config.num_hidden_layers):
        dense = i < config.first_k_dense_replace
        stack, j = (
            ("dense_layers", i) if dense else ("moe_layers", i - config.first_k_dense_replace)
        )
        layer = jax.tree.map(lambda leaf, j=j: leaf[j], p[stack])
        h = rms_norm(x, layer["attn_norm"]["scale"], config.rms_norm_eps)
        y, scores = naive_attention(config, layer["attn"], h)
        attention_logits.append(scores)
        x = x + y
        h = rms_norm(x, layer["mlp_norm"]["scale"], config.rms_norm_eps)
        if dense:
            x = x + swiglu(layer["mlp"], h)
        else:
            y, load, entropy = naive_mixture(config, layer, h, np.asarray(bias[j], np.float64))
            x = x + y
            loads.append(load)
            entropies.append(entropy)
    x = rms_norm(x, p["final_norm"]["scale"], config.rms_norm_eps)
    return x @ p["lm_head"]["kernel"], np.array(attention_logits), loads, entropies


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"q_lora_rank": 9, "rope_interleave": False},
        {
            "first_k_dense_replace": 0,
            "n_routed_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
        {"n_group": 3, "topk_group": 2, "first_k_dense_replace": 2},
        {"first_k_dense_replace": 3},
    ],
)
def test_logits_and_report_are_those_of_the_naive_float64_forward_pass(change, monkeypatch):
    monkeypatch.setattr("optax_muon.models.moonlight.attention.HIGH_LOGIT", 0.5)
    config = dataclasses.replace(CONFIG, **change)
    params, bias = noisy(config)
    tokens = tokens_of(config)
    got, report = run.__wrapped__(config, params, tokens, bias)
    each = [naive(config, params, bias, row) for row in tokens]
    # float32 through three layers of logits up to 10 large: a few dozen roundings of 6e-8 each.
    np.testing.assert_allclose(got, [logits for logits, *_ in each], rtol=1e-4, atol=1e-4)
    scores = np.concatenate([scores for _, scores, *_ in each], axis=-1)
    assert scores.max() > 2, "logits large enough to tell"
    np.testing.assert_allclose(report.max_logits, scores.max(axis=-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(report.high_logits, (scores > 0.5).mean(axis=-1), rtol=1e-5)
    loads = sum(np.reshape(loads, [-1, config.n_routed_experts]) for *_, loads, _ in each)
    np.testing.assert_array_equal(report.load, loads)
    entropies = np.mean([entropies for *_, entropies in each], axis=0)
    np.testing.assert_allclose(report.entropy, entropies, rtol=1e-5)


def test_blocks_of_queries_change_nothing():
    params, bias = noisy(CONFIG)
    whole = dataclasses.replace(CONFIG, query_block=64)
    one, other = (run(c, params, tokens_of(CONFIG), bias) for c in (CONFIG, whole))
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradients_do_not_depend_on_what_is_in_memory():
    params, bias = noisy(CONFIG)

    def gradient(config):
        def score(params):
            return loss(config, params, tokens_of(CONFIG), bias)[0]

        return jax.tree.map(np.asarray, jax.jit(jax.grad(score))(params))

    other = gradient(dataclasses.replace(CONFIG, query_block=64, saved="inputs"))
    assert_trees_close_to_largest(gradient(CONFIG), other, 1e-5, rtol=1e-7)


def test_a_position_does_not_see_what_comes_after_it():
    params, bias = noisy(CONFIG)
    tokens = tokens_of(CONFIG)
    changed = tokens.at[:, 7:].set((tokens[:, 7:] + 1) % CONFIG.vocab_size)
    before, after = (np.asarray(run(CONFIG, params, t, bias)[0]) for t in (tokens, changed))
    # The tokens that share an expert's product differ, and with them the order of its sums.
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1).min() > 1e-2


def test_bfloat16_computes_nearly_the_same_from_float32_parameters():
    low = dataclasses.replace(
        CONFIG, dtype="bfloat16", num_experts_per_tok=CONFIG.n_routed_experts
    )  # no other choice
    params, bias = noisy(low)
    exact = run(dataclasses.replace(low, dtype="float32"), params, tokens_of(CONFIG), bias)[0]
    rough = run(low, params, tokens_of(CONFIG), bias)[0]
    assert rough.dtype == jnp.float32
    # eps of bfloat16 is 2**-8; a few dozen roundings in a row.
    assert jnp.sqrt(jnp.mean((rough - exact) ** 2)) < 0.06 * jnp.std(exact)


# ---- meshes --------------------------------------------------------------------------------------

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [
    pytest.param(EXPLICIT, {"fsdp": 2, "expert": 4}, id="explicit"),
    pytest.param(AUTO, {"fsdp": 2, "expert": 4}, id="auto"),
    pytest.param(EXPLICIT, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, id="four axes"),
]


def loss(config, params, tokens, bias):
    scores, report = Moonlight(config).forward(params, tokens, bias)
    return jax.nn.logsumexp(scores, axis=-1).mean(), (scores, report)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config, params, tokens, bias):
    return jax.value_and_grad(loss, argnums=1, has_aux=True)(config, params, tokens, bias)


def on(mesh, config, params, bias):
    """Parameters, tokens and biases on a mesh."""
    batch = tuple(axis for axis in ("data", "fsdp", "expert") if axis in mesh.axis_names)
    spread = NamedSharding(mesh, P(batch, None))
    tokens = jax.device_put(tokens_of(config, batch=8), spread)
    return (
        jax.device_put(params, Moonlight(config).shardings(mesh)),
        tokens,
        jax.device_put(bias, NamedSharding(mesh, P())),
    )


@functools.cache
def alone(config):
    params, bias = noisy(config)
    return jax.tree.map(
        np.asarray, loss_and_grads(config, params, tokens_of(config, batch=8), bias)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), MESHES)
def test_a_mesh_gives_the_logits_and_gradients_of_one_device(kind, sizes):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    given = on(mesh, WIDE, *noisy(WIDE))
    with jax.set_mesh(mesh):
        (_, (scores, report)), grads = jax.block_until_ready(loss_and_grads(WIDE, *given))
    (_, (true_scores, true_report)), true_grads = alone(WIDE)
    scale = np.abs(true_scores).max()
    np.testing.assert_allclose(scores, true_scores, atol=2e-6 * scale)  # sums of other order
    np.testing.assert_array_equal(report.load, true_report.load)
    np.testing.assert_allclose(report.max_logits, true_report.max_logits, rtol=1e-5)
    assert_trees_close_to_largest(grads, true_grads, 1e-5, rtol=1e-7)
    if kind is EXPLICIT:
        types = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (given[0], grads))
        assert types[0] == types[1], "gradients lie as their parameters"


@functools.partial(jax.jit, static_argnums=0)
def sent_to_experts(layer, params, x, chosen, gates):
    """The mixture and, for one cotangent, its gradients."""

    def apply(params, x, gates):
        return layer.apply({"params": params}, x, chosen, gates)

    y, pull = jax.vjp(apply, params, x, gates)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))


@pytest.mark.parametrize("choice", ["even", "one device", "two experts"])
def test_rows_sent_to_experts_give_the_sums_and_gradients_of_one_device(choice):
    """Also where most or all rows go to one device, in further rounds: none is dropped."""
    rng = np.random.default_rng(0)
    ranks = rng.random([8, 64, 8]) - (np.arange(8) // 2 != 1) * (choice == "one device")
    ranks = ranks + (np.arange(8) % 5 == 0) * 0.8 * (choice == "two experts")
    chosen = jnp.asarray(np.argsort(-ranks, axis=-1)[..., :2], jnp.int32)
    shapes = {"gate_proj": [8, 16, 12], "up_proj": [8, 16, 12], "down_proj": [8, 12, 16]}
    x, gates, *kernels = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ([8, 64, 16], [8, 64, 2], *shapes.values())
    )
    params = dict(zip(shapes, kernels, strict=True))
    first = experts.rows_of_pair(64, 2, 8, 2)
    most = max(((chosen // 2) == device).any(axis=-1).sum(axis=1).max() for device in range(4))
    assert (most > first) == (choice != "even"), "further rounds"
    layer = Experts(8, 12, "float32")
    alone = sent_to_experts(layer, params, x, chosen, gates)
    with jax.set_mesh(jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AUTO, AUTO))):
        sent = jax.block_until_ready(sent_to_experts(layer, params, x, chosen, gates))
    # Sums of up to 512 tokens in another order.
    assert_trees_close_to_largest(sent, jax.tree.map(np.asarray, alone), 2e-6, rtol=1e-7)


def test_a_mesh_that_is_not_ambient_is_asked_for():
    given = on(jax.make_mesh((8,), ("fsdp",)), WIDE, *noisy(WIDE))
    with pytest.raises(ValueError, match=r"are on a mesh of \('fsdp',\); use jax.set_mesh\(mesh\)"):
        Moonlight(WIDE).forward(*given)


@functools.partial(jax.jit, static_argnums=0)
def initial(config):
    return Moonlight(config).init(jax.random.key(3))


@functools.cache
def initial_alone(config):
    return jax.tree.map(np.asarray, initial(config))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_initial_parameters_are_the_same_on_every_mesh_and_lie_as_said(kind):
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(kind, kind))
    config = dataclasses.replace(WIDE, first_k_dense_replace=0)
    with jax.set_mesh(mesh):
        there = jax.block_until_ready(initial(config))
    # The same draws, scaled elsewhere.
    chex.assert_trees_all_close(there, initial_alone(config), rtol=1e-6, atol=1e-7)
    for leaf, sharding in zip(
        jax.tree.leaves(there), jax.tree.leaves(Moonlight(config).shardings(mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_every_matrix_of_the_published_model_is_cut_over_fsdp_and_experts():
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"))
    specs = jax.tree.leaves(Moonlight(CONFIGS["moonlight-16b-a3b"]).shardings(mesh))
    shapes = [
        leaf.shape
        for leaf in jax.tree.leaves(Moonlight(CONFIGS["moonlight-16b-a3b"]).abstract_params)
    ]
    for shape, sharding in zip(shapes, specs, strict=True):
        local = math.prod(sharding.shard_shape(shape))
        assert local * 8 == math.prod(shape) or math.prod(shape) <= 27 * 2048


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_tpu_multiplies_ragged_groups_and_sends_rows_to_their_experts():
    mesh = chips("v5e:2x4", {"fsdp": 2, "expert": 4})
    config = dataclasses.replace(
        WIDE, hidden_size=256, moe_intermediate_size=128, context=512, dtype="bfloat16"
    )
    params = on_mesh(Moonlight(config).abstract_params, mesh)
    over = NamedSharding(mesh, P(mesh.axis_names))
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=over)
    with jax.set_mesh(mesh):
        bias = jax.ShapeDtypeStruct((2, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
        text = loss_and_grads.lower(config, params, tokens, bias).compile().as_text()
    assert "ragged" in text
    rows = experts.rows_of_pair(512, 2, 8, 2)
    assert rows < 0.6 * 512
    assert re.search(rf"bf16\[(4,{rows}|{4 * rows}),256\]\S* all-to-all", text)
    assert not re.search(r"bf16\[4,512,256\]\S* all-gather", text)


# ---- mixture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [grouped_dot, grouped_matmul._ragged, grouped_matmul._blocked])
@pytest.mark.parametrize(
    ("n", "sizes"), [(200, [0, 130, 1, 0, 50]), (4, [1, 0, 2]), (128, [128, 0]), (5, [0, 0, 0])]
)
def test_a_grouped_product_is_the_loop_over_groups(product, n, sizes):
    rng = np.random.default_rng(0)
    shapes = [n, 6], [len(sizes), 6, 3], [n, 3]
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    bounds = np.cumsum([0, *sizes])
    groups = [slice(*bounds[i : i + 2]) for i in range(len(sizes))]
    y, dx, dw = (np.zeros(shape) for shape in (dy.shape, x.shape, w.shape))
    for i, rows in enumerate(groups):
        y[rows], dx[rows], dw[i] = x[rows] @ w[i], dy[rows] @ w[i].T, x[rows].T @ dy[rows]

    @jax.jit
    def both_ways(x, w, sizes, dy):
        y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        return y, *pull(dy)

    got = both_ways(x, w, jnp.array(sizes, jnp.int32), dy)
    # Sums of up to 130 products.
    chex.assert_trees_all_close(got, (y, dx, dw), rtol=1e-7, atol=2e-5)


def mixture(capacity, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal([2, 8, 6]), jnp.float32)
    chosen = jnp.asarray(np.argsort(rng.random([2, 8, 5]), axis=-1)[..., :2], jnp.int32)
    gates = jnp.asarray(rng.random([2, 8, 2]), jnp.float32)
    shapes = {"gate_proj": [5, 6, 4], "up_proj": [5, 6, 4], "down_proj": [5, 4, 6]}
    params = {
        k: jnp.asarray(rng.standard_normal(shape), jnp.float32) for k, shape in shapes.items()
    }
    apply = jax.jit(Experts(5, 4, "float32", capacity).apply)
    return params, x, chosen, gates, apply({"params": params}, x, chosen, gates)


@pytest.mark.parametrize(("capacity", "slots"), [(None, 32), (5.0, 32), (1.0, 7), (0.5, 4)])
def test_experts_take_as_many_tokens_as_they_may_the_first_ones_first(capacity, slots):
    params, x, chosen, gates, y = mixture(capacity)
    taken, truth = np.zeros(5, int), np.zeros([16, 6])
    tokens = zip(x.reshape(16, 6), chosen.reshape(16, 2), gates.reshape(16, 2), strict=True)
    for t, (token, own, weights) in enumerate(tokens):
        for expert, gate in zip(own, weights, strict=True):
            if taken[expert] < slots:
                mine = {name: np.asarray(stack[expert]) for name, stack in params.items()}
                truth[t] += gate * swiglu(mine, np.asarray(token))
            taken[expert] += 1
    assert (taken.max() > slots) == (capacity in (1.0, 0.5)), "some are dropped, or none"
    np.testing.assert_allclose(np.reshape(y, [16, 6]), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 5, 32])
def test_blocks_of_rows_change_nothing_forward_or_backward(block, monkeypatch):
    params, x, chosen, gates, y = mixture(None)
    pull_of = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)

    def gradients(apply):
        return jax.jit(lambda *given: jax.vjp(apply, *given)[1](pull_of))(params, x, gates)

    def naive(params, x, gates):
        """Every expert on every token, in the gates' places."""
        hidden = nn.silu(jnp.einsum("btd,edf->betf", x, params["gate_proj"]))
        hidden *= jnp.einsum("btd,edf->betf", x, params["up_proj"])
        each = jnp.einsum("betf,efd->betd", hidden, params["down_proj"])
        return jnp.einsum("betd,btke,btk->btd", each, jax.nn.one_hot(chosen, 5), gates)

    monkeypatch.setattr("optax_muon.models.moe.experts.BLOCK", block)
    layer = Experts(5, 4, "float32")

    def blocked(params, x, gates):
        return layer.apply({"params": params}, x, chosen, gates)

    np.testing.assert_allclose(jax.jit(blocked)(params, x, gates), y, rtol=1e-6, atol=1e-6)
    # Sums of up to 16 tokens.
    assert_trees_close_to_largest(gradients(blocked), gradients(naive), 2e-6, rtol=1e-7)


def test_a_device_holds_a_block_of_rows_and_not_all_that_could_come():
    tokens, width, k = 4096, 64, 6
    layer = Experts(8, 64, "float32")
    arrays = ((1, tokens, width), (1, tokens, k), (1, tokens, k))
    kinds = (jnp.float32, jnp.int32, jnp.float32)
    x, chosen, gates = map(jax.ShapeDtypeStruct, arrays, kinds)
    params = jax.eval_shape(layer.init, jax.random.key(0), x, chosen, gates)

    def temporary(block, monkeypatch):
        monkeypatch.setattr("optax_muon.models.moe.experts.BLOCK", block)
        loss = jax.grad(lambda p, *given: layer.apply(p, *given).sum())
        program = jax.jit(loss).lower(params, x, chosen, gates).compile()
        return program.memory_analysis().temp_size_in_bytes

    with pytest.MonkeyPatch.context() as patch:
        blocks, whole = temporary(1024, patch), temporary(tokens * k, patch)
    assert blocks < whole / 4


def test_a_bias_chooses_and_does_nothing_else():
    (params, _), zero = noisy(CONFIG), Moonlight(CONFIG).zero_bias()
    tokens = tokens_of(CONFIG)
    plain = run(CONFIG, params, tokens, zero)
    same = run(CONFIG, params, tokens, zero + 3)
    np.testing.assert_array_equal(plain[0], same[0])
    pushed = run(CONFIG, params, tokens, zero.at[:, 4].set(10.0))[1]
    assert (pushed.load[:, 4] == tokens.size).all()
    slope = jax.grad(lambda bias: run(CONFIG, params, tokens, bias)[0].sum())(
        Moonlight(CONFIG).zero_bias()
    )
    assert not slope.any()


# ---- balance -------------------------------------------------------------------------------------


def test_the_biases_move_by_the_papers_rule():
    load = np.random.default_rng(0).integers(0, 9, [3, 7])
    bias = np.random.default_rng(1).standard_normal([3, 7])
    signs = np.sign(load.mean(axis=1, keepdims=True) - load)
    truth = bias + 1e-3 * (signs - signs.mean(axis=1, keepdims=True))
    got = jax.jit(balance.update_bias)(jnp.float32(bias), jnp.int32(load), 1e-3)
    np.testing.assert_allclose(got, truth, atol=1e-6)
    np.testing.assert_allclose(got.mean(axis=1), bias.mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(
        balance.update_bias(jnp.float32(bias), jnp.int32(load), 0.0), np.float32(bias)
    )


def test_the_biases_balance_a_router_that_prefers_some_experts():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal([2048, 8]) + np.linspace(-1, 1, 8)
    scores, bias = 1 / (1 + np.exp(-logits)), jnp.zeros(8)
    step = jax.jit(balance.update_bias)
    loads = []
    for _ in range(150):
        chosen = np.argsort(scores + np.asarray(bias), axis=1)[:, -2:]
        loads.append(np.bincount(chosen.ravel(), minlength=8))
        bias = step(bias, loads[-1], 5e-3)
    assert balance.imbalance(jnp.asarray(loads[0])) > 1
    assert balance.imbalance(jnp.asarray(loads[-1])) < 0.1


def test_the_gate_scale_is_the_papers_and_each_configurations_own():
    assert round(balance.gate_scaling(64, 6), 3) == 2.446
    again = balance.gate_scaling(64, 6, seed=1)
    assert abs(again - balance.gate_scaling(64, 6)) < 1e-4  # ten times the standard error
    assert balance.gate_scaling(1, 1) == 1
    for config in CONFIGS.values():
        assert config.routed_scaling_factor == round(
            balance.gate_scaling(config.n_routed_experts, config.num_experts_per_tok), 3
        )


# ---- reports, counts, routing, errors ------------------------------------------------------------


def test_a_report_costs_nothing_where_it_is_not_asked_for():
    params, bias = noisy(CONFIG)
    model, tokens = Moonlight(CONFIG), tokens_of(CONFIG)
    alone = jax.jit(lambda p, t, b: model.forward(p, t, b)[0]).lower(params, tokens, bias).compile()
    both = jax.jit(lambda p, t, b: model.forward(p, t, b)).lower(params, tokens, bias).compile()
    assert alone.cost_analysis()["flops"] < both.cost_analysis()["flops"]
    # Stacks of a report's rows, which the loop over layers would carry: loads, and heads' maxima.
    for stack in ("s32[2,6]", "f32[2,4]", "f32[1,4]"):
        assert stack in both.as_text()
        assert stack not in alone.as_text()


def test_the_published_model_has_the_papers_parameters():
    total, active = count(CONFIGS["moonlight-16b-a3b"])
    assert (round(total / 1e7), round(active / 1e7)) == (1529, 224)
    c = CONFIGS["moonlight-16b-a3b"]
    attention = 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048
    matrices = 27 * attention + 26 * (66 * 3 * 2048 * 1408) + 3 * 2048 * 11264 + 26 * 2048 * 64
    norms = 27 * (2 * 2048 + 512) + 2048
    assert total == matrices + norms
    assert total - active == 26 * (c.n_routed_experts - c.num_experts_per_tok) * 3 * 2048 * 1408


def test_muon_takes_every_expert_and_projection_as_a_matrix_and_nothing_else():
    config = dataclasses.replace(CONFIG, q_lora_rank=9)
    rows = optax_muon.label(noisy(config)[0]).rows
    table = {row.path: [(b.batch, b.rows, b.cols) for b in row.blocks] for row in rows}
    attention = {
        "attn/kv_a_norm/scale": [],
        "attn/kv_a_proj/kernel": [(24, 14)],
        "attn/kv_b_proj/kernel": [(10, 44)],
        "attn/o_proj/kernel": [(20, 24)],
        "attn/q_a_norm/scale": [],
        "attn/q_a_proj/kernel": [(24, 9)],
        "attn/q_b_proj/kernel": [(9, 40)],
        "attn_norm/scale": [],
        "mlp_norm/scale": [],
    }
    into, out = [(24, 40)], [(40, 24)]
    dense = {"mlp/gate_proj/kernel": into, "mlp/up_proj/kernel": into, "mlp/down_proj/kernel": out}
    mixed = {
        "router/kernel": [(24, 6)],
        "shared_experts/gate_proj/kernel": [(24, 32)],
        "shared_experts/up_proj/kernel": [(24, 32)],
        "shared_experts/down_proj/kernel": [(32, 24)],
    }
    experts = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    stacks = (("dense_layers", 1, {**attention, **dense}), ("moe_layers", 2, attention | mixed))
    assert table == {
        "embed/embedding": [],
        "final_norm/scale": [],
        "lm_head/kernel": [],
        **{f"moe_layers/experts/{name}": [(12, *shape)] for name, shape in experts.items()},
        **{
            f"{stack}/{path}": [(layers, *shape) for shape in shapes]
            for stack, layers, part in stacks
            for path, shapes in part.items()
        },
    }


@pytest.mark.parametrize("q_rank", [None, 9])
def test_views_per_head_are_the_slices_that_the_heads_use(q_rank):
    config = dataclasses.replace(CONFIG, q_lora_rank=q_rank)
    params = noisy(config)[0]
    views = per_head_views(config)
    q, kv = ("q_proj" if q_rank is None else "q_b_proj"), "kv_b_proj"
    attention = params["moe_layers"]["attn"]
    for name, dims in ((q, (10,)), (kv, (6, 5))):
        kernel = attention[name]["kernel"]
        bound = views[f"*/{name}/kernel"].bind(kernel.shape)
        heads = np.asarray(kernel).reshape(*kernel.shape[:2], 4, -1)
        parts = np.split(heads, np.cumsum(dims)[:-1], axis=-1)
        for got, part in zip(bound.to_matrices(kernel), parts, strict=True):
            np.testing.assert_array_equal(
                got, np.moveaxis(part, 2, 0).reshape(8, kernel.shape[1], -1)
            )
    labelled = {row.path: row.blocks for row in optax_muon.label(params, views).rows}
    assert [block.batch for block in labelled["dense_layers/attn/kv_b_proj/kernel"]] == [4, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim 3 must be even"),
        (
            {"first_k_dense_replace": 4},
            "first_k_dense_replace 4 must be between 0 and num_hidden_layers, 3",
        ),
        ({"n_shared_experts": 0}, "n_shared_experts is 0"),
        ({"capacity": 0.0}, "capacity is 0.0; it must be positive or None"),
        ({"saved": "all"}, "saved is 'all'; it must be one of inputs, attention, rows"),
        ({"n_group": 4}, "n_routed_experts 6 must divide into groups of two or more, n_group is 4"),
        ({"n_group": 3, "topk_group": 4}, "topk_group 4 must be between 1 and n_group, 3"),
        ({"n_group": 3, "num_experts_per_tok": 3}, "at most the experts of 1 of 3 groups, 2"),
        ({"num_experts_per_tok": 7}, "at most the experts of 1 of 1 groups, 6"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
