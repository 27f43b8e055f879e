"""QK-Clip against naive float64 attention: clipped heads at the threshold, others as they were."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import MHA, MLA, Heads, Split, View, muon, qk_clip
from optax_muon.hlo import collectives
from optax_muon.models import llama, moonlight

LAYERS, WIDTH, DIM, TOKENS = 2, 12, 4, 9


def kernel(name, heads, dim=DIM, layers=0):
    return Heads(f"{name}/kernel", Split.equal(-1, heads * dim, parts=heads), layers=layers)


def gaussian(**shapes):
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }


INPUTS = np.random.default_rng(1).normal(size=(LAYERS, TOKENS, WIDTH))


def naive_logits(params, heads, kv_heads, x=INPUTS):
    """The largest logit of every head, `[layers, heads]`, one pair of tokens at a time."""
    largest = np.full((len(x), heads), -np.inf)
    q_all, k_all = (np.asarray(params[name]["kernel"], np.float64) for name in "qk")
    for layer in range(len(x)):
        for head in range(heads):
            group = head // (heads // kv_heads)
            q = x[layer] @ q_all[layer][:, head * DIM : (head + 1) * DIM]
            k = x[layer] @ k_all[layer][:, group * DIM : (group + 1) * DIM]
            for t in range(TOKENS):
                for s in range(t + 1):
                    largest[layer, head] = max(largest[layer, head], q[t] @ k[s] / DIM**0.5)
    return largest


def step(link, params, updates=None, **extra):
    """The parameters after one jitted step of the link alone; nothing else moves them."""
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates

    @jax.jit
    def run(params, updates, extra):
        changed, _ = link.update(updates, link.init(params), params, **extra)
        return optax.apply_updates(params, changed)

    return run(params, updates, extra)


def between(values):
    """A threshold that about half of the values exceed, none of them nearly."""
    low, high = np.sort(np.ravel(values))[np.size(values) // 2 - 1 :][:2]
    return float((low + high) / 2)


# ---- logits after the step -----------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_heads_over_the_threshold_come_to_it_and_the_others_stay(heads, kv_heads, alpha):
    params = gaussian(q=(LAYERS, WIDTH, heads * DIM), k=(LAYERS, WIDTH, kv_heads * DIM))
    before = naive_logits(params, heads, kv_heads)
    threshold = between(before)
    link = qk_clip(MHA(kernel("q", heads), kernel("k", kv_heads), alpha), threshold)
    new = step(link, params, max_logits=jnp.asarray(before, jnp.float32))
    after, over = naive_logits(new, heads, kv_heads), before > threshold
    # Two float32 factors, each product rounded: a few times 6e-8.
    np.testing.assert_allclose(after[over], threshold, rtol=2e-6)
    np.testing.assert_array_equal(after[~over], before[~over], "bit for bit, in float64")
    assert over.any() and not over.all()
    for name, count in (("q", heads), ("k", kv_heads)):
        was, now = (
            np.asarray(tree[name]["kernel"]).reshape(LAYERS, WIDTH, count, DIM)
            for tree in (params, new)
        )
        # A key stays where one of its queries does.
        stay = (~over).reshape(LAYERS, count, -1).any(axis=-1)
        np.testing.assert_array_equal(
            np.moveaxis(now, 1, 2)[stay], np.moveaxis(was, 1, 2)[stay], name
        )


def test_a_shared_key_takes_what_its_queries_have_in_common():
    params = {name: {"kernel": jnp.ones((1, 1, n * DIM))} for name, n in (("q", 4), ("k", 2))}
    link = qk_clip(MHA(kernel("q", 4), kernel("k", 2)), 100.0)
    new = step(link, params, max_logits=jnp.array([[400.0, 1600.0, 400.0, 99.0]]))
    # First group: gamma 1/4 and 1/16, the key takes sqrt(1/4). Second: one head needs no clipping.
    np.testing.assert_allclose(new["k"]["kernel"][0, 0, ::DIM], [0.5, 1.0])
    np.testing.assert_allclose(new["q"]["kernel"][0, 0, ::DIM], [0.5, 0.125, 0.25, 1.0])


CONFIG = dataclasses.replace(
    moonlight.CONFIGS["moonlight-tiny"],
    **{
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "v_head_dim": 5,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "context": 12,
    },
)


def sharp(config):
    """A Moonlight with logits away from zero, and a batch for it."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = leaf.shape[-2:][0] ** -0.5 * 2 if len(leaf.shape) > 2 else 1.0
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    tokens = jnp.asarray(rng.integers(0, config.vocab_size, [2, config.context]), jnp.int32)
    return jax.tree.map(draw, moonlight.Moonlight(config).abstract_params), tokens


@functools.partial(jax.jit, static_argnums=0)
def report(config, params, tokens):
    return moonlight.Moonlight(config).forward(params, tokens)[1].max_logits


@pytest.mark.parametrize(("q_rank", "layer"), [(None, 0), (20, 1)])
def test_moonlight_reports_the_threshold_after_the_step(q_rank, layer):
    config = dataclasses.replace(CONFIG, q_lora_rank=q_rank)
    params, tokens = sharp(config)
    before = np.asarray(report(config, params, tokens))
    threshold = between(before[layer])
    # One layer at a time: clipping it moves what the later ones see.
    seen = np.where(np.arange(config.num_hidden_layers)[:, None] == layer, before, 0)
    link = qk_clip(moonlight.attentions(config), threshold)
    new = step(link, params, max_logits=seen)
    after, over = np.asarray(report(config, new, tokens)), before[layer] > threshold
    np.testing.assert_allclose(after[layer][over], threshold, rtol=1e-5)
    np.testing.assert_array_equal(after[layer][~over], before[layer][~over])
    np.testing.assert_array_equal(after[:layer], before[:layer])
    assert over.any() and not over.all()


def test_latent_attention_scales_what_the_algorithm_names_and_nothing_else():
    params, _ = sharp(CONFIG)
    s = np.array([[50.0, 400.0, np.inf, 100.0], [1600.0, 1.0, -5.0, np.nan]])
    new = step(qk_clip(moonlight.attentions(CONFIG)), params, max_logits=jnp.asarray(s, "float32"))
    expected = jax.tree.map(np.array, params)
    for stack, layer, head, gamma in (("dense_layers", 0, 1, 1 / 4), ("moe_layers", 0, 0, 1 / 16)):
        attn = expected[stack]["attn"]
        for name, dim, nope in (
            ("q_proj", CONFIG.qk_head_dim, CONFIG.qk_nope_head_dim),
            ("kv_b_proj", CONFIG.qk_nope_head_dim + CONFIG.v_head_dim, CONFIG.qk_nope_head_dim),
        ):
            own = attn[name]["kernel"][layer][:, head * dim : (head + 1) * dim]
            own[:, :nope] *= gamma**0.5
            if name == "q_proj":
                own[:, nope:] *= gamma

    def check(found, wanted, was):
        # p + (f p - p) rounds at the size of p, which is 16 times that of the result.
        np.testing.assert_allclose(found, wanted, rtol=2e-6)
        same = wanted == was
        np.testing.assert_array_equal(np.asarray(found)[same], wanted[same])

    jax.tree.map(check, new, expected, jax.tree.map(np.asarray, params))


def test_llama_comes_to_the_threshold():
    config = llama.LlamaConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=32,
        context=8,
    )
    tokens = jax.random.randint(jax.random.key(1), [8], 0, config.vocab_size)
    params = jax.jit(llama.Llama(config).init)(jax.random.key(0))

    def first_layer(params):
        """Largest logits of the first layer, whose input no clipping changes: `[heads]`."""
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        x = p["embed"]["embedding"][np.asarray(tokens)]
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps)
        x = x * p["layers"]["attn_norm"]["scale"][0]
        angles = np.arange(8)[:, None] * config.rope_theta ** (-np.arange(2) / 2)

        def turned(name, count):
            y = (x @ p["layers"]["attn"][name]["kernel"][0]).reshape(8, count, 2, 2)
            pairs = (y[:, :, 0] + 1j * y[:, :, 1]) * np.exp(1j * angles)[:, None]
            return np.concatenate([pairs.real, pairs.imag], axis=-1)

        q, k = turned("q_proj", 6), np.repeat(turned("k_proj", 2), 3, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / 2
        return scores.max(axis=(1, 2), where=np.tril(np.ones((8, 8), bool)), initial=-np.inf)

    before = first_layer(params)
    threshold = between(before)
    seen = jnp.asarray(np.stack([before, np.full(6, -1.0)]), jnp.float32)
    new = step(qk_clip(llama.attentions(config), threshold), params, max_logits=seen)
    after, over = first_layer(new), before > threshold
    np.testing.assert_allclose(after[over], threshold, rtol=2e-6)
    np.testing.assert_array_equal(after[~over], before[~over])
    second = [jax.tree.map(lambda leaf: leaf[1], tree["layers"]) for tree in (new, params)]
    chex.assert_trees_all_equal(*second)


# ---- layouts -------------------------------------------------------------------------------------


def test_every_layout_of_the_same_heads_gives_the_same_parameters():
    heads, kv, s = 4, 2, jnp.array([[300.0, 200.0, 50.0, 800.0]])
    params = gaussian(q=(WIDTH, heads * DIM), k=(WIDTH, kv * DIM))
    flat = MHA(kernel("q", heads, layers=None), kernel("k", kv, layers=None))
    true = jax.tree.map(np.asarray, step(qk_clip(flat), params, max_logits=s))
    q, k = (params[name]["kernel"] for name in "qk")
    true_q, true_k = (true[name]["kernel"] for name in "qk")

    def check(attention, given, expected):
        found = step(qk_clip(attention), given, max_logits=s)
        chex.assert_trees_all_equal(found, expected)

    own_axis = MHA(
        Heads("q", Split.equal(-2, heads, parts=heads)),
        Heads("k", Split.equal(-2, kv, parts=kv)),
    )
    check(
        own_axis,
        {"q": q.reshape(WIDTH, heads, DIM), "k": k.reshape(WIDTH, kv, DIM)},
        {"q": true_q.reshape(WIDTH, heads, DIM), "k": true_k.reshape(WIDTH, kv, DIM)},
    )
    fused = Split.qkv(-1, heads=heads, kv_heads=kv, head_dim=DIM, per_head=True)
    check(
        MHA(Heads("qkv", fused), Heads("qkv", fused, part=1)),
        {"qkv": jnp.concatenate([q, k, k], axis=1)},
        {"qkv": np.concatenate([true_q, true_k, k], axis=1)},
    )
    interleaved = Split(-1, (2 * DIM, DIM, DIM), (heads, kv, kv), groups=kv)

    def weave(q, k, v):
        parts = (np.asarray(x).reshape(WIDTH, kv, -1) for x in (q, k, v))
        return jnp.asarray(np.concatenate(list(parts), axis=2).reshape(WIDTH, -1))

    check(
        MHA(Heads("qkv", interleaved), Heads("qkv", interleaved, part=1)),
        {"qkv": weave(q, k, k)},
        {"qkv": weave(true_q, true_k, k)},
    )
    rows = MHA(
        Heads("q", Split.equal(0, heads * DIM, parts=heads)),
        Heads("k", Split.equal(0, kv * DIM, parts=kv)),
    )
    check(rows, {"q": q.T, "k": k.T}, {"q": true_q.T, "k": true_k.T})
    stacked_last = MHA(
        Heads("q", Split.equal(1, heads * DIM, parts=heads), layers=2),
        Heads("k", Split.equal(1, kv * DIM, parts=kv), layers=2),
    )
    check(
        stacked_last,
        {"q": q[..., None], "k": k[..., None]},
        {"q": true_q[..., None], "k": true_k[..., None]},
    )


def test_features_of_heads_that_have_their_own_axis():
    split = Split(1, (3, 2), heads=(4, 4), groups=4)
    mla = MLA(
        Heads("q", split, span=2), Heads("q", split, part=1, span=2), Heads("kv", split, span=2)
    )
    params = {name: jnp.ones((WIDTH, 4, 5)) for name in ("q", "kv")}
    new = step(qk_clip(mla), params, max_logits=jnp.array([[400.0, 1.0, 1600.0, 100.0]]))
    np.testing.assert_array_equal(new["q"][0, :, 0], [0.5, 1, 0.25, 1])
    np.testing.assert_array_equal(new["q"][0, :, 3], [0.25, 1, 0.0625, 1])
    np.testing.assert_array_equal(new["kv"][0, :, 2], [0.5, 1, 0.25, 1])
    np.testing.assert_array_equal(new["kv"][..., 3:], 1)


def test_biases_go_with_their_kernels_and_layers_by_themselves_with_their_rows():
    split = Split.equal(-1, 2 * DIM, parts=2)

    def layer(i):
        q = [Heads(f"{i}/q/{part}", split) for part in ("kernel", "bias")]
        return MHA(q, Heads(f"{i}/k/kernel", split))

    one = {"kernel": jnp.ones((WIDTH, 2 * DIM)), "bias": jnp.ones(2 * DIM)}
    params = [{"q": one, "k": one} for _ in range(3)]
    s = jnp.array([[1.0, 400.0], [1.0, 1.0], [1600.0, 1.0]])
    new = step(qk_clip([layer(i) for i in range(3)]), params, max_logits=s)
    for i, factors in enumerate([[1, 0.5], [1, 1], [0.25, 1]]):
        for leaf in (*new[i]["q"].values(), new[i]["k"]["kernel"]):
            np.testing.assert_array_equal(np.ravel(leaf)[: 2 * DIM : DIM], factors)
        np.testing.assert_array_equal(new[i]["k"]["bias"], 1)


# ---- in a chain ----------------------------------------------------------------------------------

HEADS = MHA(kernel("q", 4), kernel("k", 4))
SEEN = jnp.array([[150.0, 99.0, 400.0, 100.0], [3.0, 1600.0, -2.0, 100.00001]])
OVER = np.asarray(SEEN) > 100


def model():
    return gaussian(q=(LAYERS, WIDTH, 16), k=(LAYERS, WIDTH, 16), v=(LAYERS, WIDTH, 16)) | {
        "embed": {"embedding": jnp.ones((5, WIDTH))}
    }


@pytest.mark.parametrize("fallback", [None, optax.sgd(0.1)])
def test_after_muon_with_weight_decay_the_new_parameters_are_scaled(fallback):
    params = model()
    grads = jax.tree.map(lambda x: jnp.cos(7 * x), params)
    views = {name: View(1, 2) for name in "qkv"}
    plain = muon(0.02, weight_decay=0.1, fallback=fallback, views=views)
    chained = optax.chain(plain, qk_clip(HEADS))

    @functools.partial(jax.jit, static_argnums=0)
    def run(tx, params, grads, **extra):
        updates, state = tx.update(grads, tx.init(params), params, **extra)
        return updates, optax.apply_updates(params, updates), state

    updates, expected, _ = run(plain, params, grads)
    found_updates, found, state = run(chained, params, grads, max_logits=SEEN)
    assert jax.tree.structure(state) == jax.tree.structure(chained.init(params))
    root = np.sqrt(np.where(OVER, 100 / np.asarray(SEEN, np.float64), 1))
    for name in params:
        (was,), (now,) = (jax.tree.leaves(tree[name]) for tree in (updates, found_updates))
        (target,), (given,) = (jax.tree.leaves(tree[name]) for tree in (expected, found))
        if name in ("v", "embed"):
            np.testing.assert_array_equal(now, was)
            continue
        was, now, target, given = (
            np.moveaxis(np.reshape(x, (LAYERS, WIDTH, 4, DIM)), 1, 2)
            for x in (was, now, target, given)
        )
        np.testing.assert_array_equal(now[~OVER], was[~OVER], "the very updates, and so weights")
        # p + (f (p + u) - p) rounds three times at the size of p, up to 4.
        np.testing.assert_allclose(given, root[..., None, None] * target, rtol=1e-6, atol=1e-6)


def test_steps_in_a_scan_and_hyperparameters_from_outside():
    tx = optax.inject_hyperparams(qk_clip, static_args="attentions")(HEADS, threshold=100.0)
    params = model()

    @jax.jit
    def run(params):
        def body(carry, seen):
            params, state = carry
            zero = jax.tree.map(jnp.zeros_like, params)
            updates, state = tx.update(zero, state, params, max_logits=seen)
            return (optax.apply_updates(params, updates), state), None

        seen = jnp.stack([SEEN, jnp.zeros_like(SEEN), SEEN])
        return jax.lax.scan(body, (params, tx.init(params)), seen)[0][0]

    once = step(qk_clip(HEADS), params, max_logits=SEEN)
    twice = step(qk_clip(HEADS), once, max_logits=SEEN)
    found = run(params)
    # A compiled loop may fuse a product and a sum into one rounding.
    chex.assert_trees_all_close(found, twice, rtol=1e-6)


def test_multi_steps_take_the_logits_of_the_last_micro_batch():
    params, grads = model(), jax.tree.map(jnp.ones_like, model())
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.01), qk_clip(HEADS)), 2)

    @jax.jit
    def run(params, state, seen):
        with jax.numpy_dtype_promotion("standard"):  # optax's own sums
            updates, state = tx.update(grads, state, params, max_logits=seen)
        return optax.apply_updates(params, updates), state

    between_steps, state = run(params, tx.init(params), jnp.full_like(SEEN, 1e6))
    chex.assert_trees_all_equal(between_steps, params)
    found, _ = run(between_steps, state, SEEN)
    moved = jax.tree.map(lambda g: -0.01 * g, grads)
    expected = step(qk_clip(HEADS), params, moved, max_logits=SEEN)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_parameters_keep_their_dtype(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), model())
    new = step(qk_clip(HEADS), params, max_logits=SEEN.astype(jnp.bfloat16))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
    was, now = (np.asarray(tree["q"]["kernel"], np.float32)[0] for tree in (params, new))
    np.testing.assert_array_equal(now[:, DIM : 2 * DIM], was[:, DIM : 2 * DIM])
    np.testing.assert_allclose(now[:, 2 * DIM : 3 * DIM], was[:, 2 * DIM : 3 * DIM] / 2, rtol=0.01)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(None, "fsdp", "tensor"), P("fsdp", "tensor", None)])
def test_on_a_mesh_nothing_moves(kind, spec):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind, kind))
    params = {name: leaf for name, leaf in model().items() if name in "qk"}
    expected = step(qk_clip(HEADS), params, max_logits=SEEN)
    sharding = NamedSharding(mesh, spec)
    link = qk_clip(HEADS)
    with jax.set_mesh(mesh):
        given = jax.device_put(params, sharding)
        zero = jax.device_put(jax.tree.map(jnp.zeros_like, params), sharding)
        seen = jax.device_put(SEEN, NamedSharding(mesh, P()))

        @functools.partial(jax.jit, out_shardings=sharding)
        def run(params, updates, seen):
            return link.update(updates, link.init(params), params, max_logits=seen)[0]

        compiled = run.lower(given, zero, seen).compile()
        assert collectives(compiled.as_text()) == []
        updates = compiled(given, zero, seen)
    found = {
        name: {"kernel": params[name]["kernel"] + np.asarray(updates[name]["kernel"])}
        for name in params
    }
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


# ---- errors --------------------------------------------------------------------------------------


def refuses(text):
    return pytest.raises(ValueError, match=re.escape(text))


def test_update_names_what_is_missing():
    params, link = model(), qk_clip(HEADS)
    with refuses("qk_clip needs max_logits: call update(updates, state, params, max_logits=...)"):
        link.update(params, link.init(params), params)
    with refuses("qk_clip needs params"):
        link.update(params, link.init(params), max_logits=SEEN)
    with refuses(
        "max_logits has shape (4,), but q/kernel and what follows have 2 layers of 4 heads;"
        " pass (2, 4)."
    ):
        link.update(params, link.init(params), params, max_logits=SEEN[0])


@pytest.mark.parametrize(
    ("attention", "text"),
    [
        (MHA(kernel("qq", 4), kernel("k", 4)), "Heads('qq/kernel') names no parameter; there are "),
        (
            MHA(kernel("q", 8), kernel("k", 4)),
            "q/kernel of shape (2, 12, 16) has 16 entries from axis 2 on (span 1), but its split"
            " has 32.",
        ),
        (
            MHA(kernel("q", 4, layers=3), kernel("k", 4)),
            "q/kernel of shape (2, 12, 16) has no axis 3",
        ),
        (
            MHA(kernel("q", 4, layers=2), kernel("k", 4)),
            "q/kernel has layers and heads on one axis",
        ),
        (
            MHA(kernel("q", 4), kernel("k", 4, layers=None)),
            "must have the same number of layers, found {",
        ),
        (MHA(kernel("q", 4), kernel("q", 4)), "q/kernel has entries that belong to two Heads"),
        (
            MHA(kernel("q", 4), dataclasses.replace(kernel("q", 2, 8), layers=None)),
            "q/kernel has Heads with different splits",
        ),
    ],
)
def test_init_names_the_parameter_that_does_not_fit(attention, text):
    shapes = jax.eval_shape(model)
    with refuses(text):
        qk_clip(attention).init(shapes)


def test_descriptions_that_cannot_be():
    q4, k3 = kernel("q", 4), kernel("k", 3)
    with refuses("k/kernel has 3 key heads, which do not divide the 4 query heads."):
        MHA(q4, k3)
    with refuses("alpha is 2; it must be between 0 and 1."):
        MHA(q4, q4, alpha=2)
    with refuses("must have the same number of heads, found {'q/kernel': 4, 'k/kernel': 3}"):
        MLA(q4, q4, k3)
    with refuses("q/kernel is split into 1 parts; part 1 does not exist."):
        dataclasses.replace(q4, part=1)
    with refuses("All attentions must have the same number of heads, found [4, 3]."):
        qk_clip([HEADS, MHA(k3, k3)])
    with refuses("threshold is 0; it must be positive."):
        qk_clip(HEADS, 0)
    with refuses("q/kernel belongs to two attentions; it may belong to one."):
        qk_clip([MHA(q4, kernel("k", 4)), MHA(q4, kernel("v", 4))]).init(model())
