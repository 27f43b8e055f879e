"""Training a Moonlight: micro-batches, router biases, QK-Clip, meshes, its measures, its FLOPs."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_trees_close_to_largest
from commands import refused
from train_processes import CONFIG, TOY

from optax_muon.cli.main import main
from optax_muon.models import spec
from optax_muon.models.huggingface.convert import BIAS, leaf_shapes, load
from optax_muon.models.moe import balance
from optax_muon.models.moonlight.model import CONFIGS
from optax_muon.models.safetensors_io import Entry, Writer
from optax_muon.training.config import THREE_STAGE, TrainConfig
from optax_muon.training.data.corpus import held_out_starts, load_corpus, starts, windows
from optax_muon.training.devices import Devices, parse_mesh
from optax_muon.training.flops import run_flops, sequence_flops
from optax_muon.training.initialize import initial_state
from optax_muon.training.loop import train
from optax_muon.training.optimizers import (
    HyperParams,
    comparison,
    newton_schulz_flops,
    transformation,
)
from optax_muon.training.presets import PRESETS
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.schedules import MOONLIGHT, three_stage_schedule
from optax_muon.training.state import State, abstract, shapes, shardings
from optax_muon.training.step import gradients, next_token_loss, step

pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = spec.model(CONFIG)
TRAIN_CONFIG = TrainConfig(
    CONFIG, batch=16, steps=4, seed=0, eval_every=4, eval_sequences=20, bias_update_speed=2e-2
)
ADAMW, MUON = comparison(["adamw", "muon-carried"], {"adamw": HyperParams(6e-3, 0.3)})
SGD = optax.sgd(0.5)
BOTH = [pytest.param(CONFIG, id="moonlight"), pytest.param(PRESETS["tiny"].model, id="llama")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Text that has something to learn."""
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(300)))
    return str(path)


@functools.cache
def drawn(shape, seed=0, vocab=256):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


@functools.cache
def start(config=CONFIG):
    """A state with weights and biases that matter, so that experts are unevenly loaded."""
    state = initial_state(dataclasses.replace(TRAIN_CONFIG, model=config), SGD)
    if state.bias is None:
        return state
    rng = np.random.default_rng(1)
    bias = jnp.asarray(0.05 * rng.standard_normal(state.bias.shape), jnp.float32)
    return state._replace(bias=bias)


jitted = functools.partial(jax.jit, static_argnums=(0, 1))(step)


# ---- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", BOTH)
def test_accumulating_micro_batches_is_one_big_batch(config):
    tokens = drawn((8, config.context + 1))
    model, state = spec.model(config), start(config)
    whole, told = jitted(model, SGD, state, tokens[None], 0.02)
    parts, told_in_parts = jitted(model, SGD, state, tokens.reshape(4, 2, -1), 0.02)
    # float32 sums in another order
    assert_trees_close_to_largest(parts.params, whole.params, 1e-6)
    np.testing.assert_allclose(told_in_parts.loss, told.loss, rtol=1e-6)
    np.testing.assert_allclose(told_in_parts.grad_norm, told.grad_norm, rtol=1e-5)
    if told.stats is not None:
        np.testing.assert_array_equal(told_in_parts.stats.load, told.stats.load)
        np.testing.assert_allclose(told_in_parts.stats.max_logits, told.stats.max_logits, rtol=1e-5)
        np.testing.assert_allclose(told_in_parts.stats.entropy, told.stats.entropy, rtol=1e-5)
        np.testing.assert_array_equal(parts.bias, whole.bias)


def test_the_gradient_is_that_of_the_mean_over_weighted_tokens():
    tokens = drawn((4, CONFIG.context + 1))
    weights = np.random.default_rng(2).integers(0, 3, (4, CONFIG.context)).astype(np.float32)
    state = start()

    def truth(params):
        scores, _ = MODEL.forward(params, tokens[:, :-1], state.bias)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], axis=-1)
        return -(chosen[..., 0] * weights).sum() / weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(truth))(state.params)
    for k in (1, 2, 4):  # micro-batches of unequal weight are no special case
        parts = tokens.reshape(k, 4 // k, -1), weights.reshape(k, 4 // k, -1)
        got, value, _ = jax.jit(functools.partial(gradients, MODEL))(state, *parts)
        np.testing.assert_allclose(value, loss, rtol=1e-6)
        assert_trees_close_to_largest(got, grads, 2e-6)


def test_router_biases_move_by_the_paper_rule_and_nothing_else_moves_them():
    state, tokens = start(), drawn((1, 8, CONFIG.context + 1))
    after, told = jitted(MODEL, SGD, state, tokens, 0.02)
    load = np.asarray(told.stats.load, np.float64)
    assert load.sum() == CONFIG.num_moe_layers * 8 * CONFIG.context * CONFIG.num_experts_per_tok
    sign = np.sign(load.mean(axis=1, keepdims=True) - load)
    moved = 0.02 * (sign - sign.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(after.bias - state.bias, moved, atol=1e-7)
    still, _ = jitted(MODEL, SGD, state, tokens, 0.0)
    np.testing.assert_array_equal(still.bias, state.bias)


def test_after_qk_clip_the_next_largest_logits_are_at_the_threshold():
    tokens = drawn((1, 8, CONFIG.context + 1))
    state = start()
    _, told = jitted(MODEL, SGD, state, tokens, 0.0)
    threshold = float(np.median(told.stats.max_logits))
    train_config = dataclasses.replace(TRAIN_CONFIG, qk_clip=threshold)
    trial = dataclasses.replace(
        MUON, hyper_params=HyperParams(1e-12, 0.0)
    )  # a step that goes nowhere
    tx = transformation(trial, train_config)
    begun = State(state.params, tx.init(state.params), state.bias)
    clipped, _ = jitted(MODEL, tx, begun, tokens, 0.0, **trial.numbers(1e-12))
    _, again = jitted(MODEL, SGD, clipped._replace(opt_state=state.opt_state), tokens, 0.0)
    first = told.stats.max_logits > threshold
    assert first.any() and not first.all()
    # The first layer's input does not change, so its heads come out exactly where they should.
    top, before = np.asarray(again.stats.max_logits)[0], np.asarray(told.stats.max_logits)[0]
    np.testing.assert_allclose(top, np.minimum(before, threshold), rtol=1e-5)


def test_bfloat16_computes_from_float32_masters():
    low = dataclasses.replace(TRAIN_CONFIG, model=dataclasses.replace(CONFIG, dtype="bfloat16"))
    tx, tokens = transformation(MUON, low), drawn((1, 8, CONFIG.context + 1))
    state = initial_state(low, tx)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {
        np.dtype("float32"),
        np.dtype("int32"),
    }
    after, told = jitted(spec.model(low.model), tx, state, tokens, 0.0, **MUON.numbers(1e-2))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    exact = jitted(MODEL, SGD, state._replace(opt_state=SGD.init(state.params)), tokens, 0.0)[1]
    assert 0 < abs(float(told.loss - exact.loss)) < 0.02  # eps of bfloat16 is 2**-8


def test_the_held_out_loss_weighs_every_sequence_once(text):
    corpus = load_corpus(text, CONFIG.context)
    state = start()
    places = held_out_starts(corpus.held_out, 20, CONFIG.context)
    tokens = windows(corpus.held_out, places, CONFIG.context)
    assert len(tokens) % 8, "the last micro-batch is filled up"
    truth = jax.jit(lambda: next_token_loss(MODEL, state.params, tokens, state.bias)[0])()
    found = Pretraining(TRAIN_CONFIG, corpus, Devices(None, 2)).held_out_loss(state)
    np.testing.assert_allclose(found, truth, rtol=1e-6)


# ---- meshes --------------------------------------------------------------------------------------


def losses(train_config, trial, corpus, devices):
    """The records of a whole run, and what a state looks like at its end."""
    records, task = [], Pretraining(train_config, corpus, devices)
    with devices.mesh_context():
        begun = initial_state(train_config, transformation(trial, train_config), devices.mesh)
        for record, state in train(train_config, trial, task, begun):
            records.append(record)
            lies = [(leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(state)]
    return records, lies


@pytest.mark.slow
@pytest.mark.parametrize("config", BOTH)
def test_eight_devices_train_as_one_does(config, text):
    corpus = load_corpus(text, config.context)
    clip = {"qk_clip": 1.0, "per_head": True} if config is CONFIG else {}
    train_config = dataclasses.replace(TRAIN_CONFIG, model=config, **clip)
    alone, _ = losses(train_config, MUON, corpus, Devices())
    for mesh, k in (("fsdp=2,expert=4", 2), ("data=2,fsdp=1,expert=2,tensor=2", 1)):
        devices = Devices(parse_mesh(mesh), k)
        there, lies = losses(train_config, MUON, corpus, devices)
        with devices.mesh_context():
            lie = shardings(spec.model(config), transformation(MUON, train_config), devices.mesh)
        for (found, ndim), asked in zip(lies, jax.tree.leaves(lie), strict=True):
            assert found.is_equivalent_to(asked, ndim)
        for one, other in zip(alone, there, strict=True):
            # Sums of another order, through four steps; the issue asks for 1e-4.
            np.testing.assert_allclose(other.loss, one.loss, rtol=2e-5)
            if one.model:
                np.testing.assert_allclose(
                    other.model["max_logits"], one.model["max_logits"], rtol=1e-3
                )
                np.testing.assert_allclose(
                    other.model["imbalance"], one.model["imbalance"], atol=0.1
                )
        np.testing.assert_allclose(there[-1].val_loss, alone[-1].val_loss, rtol=2e-5)


def test_a_state_of_shapes_alone_is_what_a_state_will_be():
    mesh = parse_mesh("fsdp=2,expert=4")
    tx = transformation(MUON, TRAIN_CONFIG)
    with jax.set_mesh(mesh):
        like, state = abstract(MODEL, tx, mesh), initial_state(TRAIN_CONFIG, tx, mesh)
    chex.assert_trees_all_equal_shapes_and_dtypes(like, state)
    for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


# ---- schedules -----------------------------------------------------------------------------------


def test_three_stages_of_the_papers_length_are_the_papers():
    config = dataclasses.replace(TRAIN_CONFIG, steps=MOONLIGHT.steps, schedule=THREE_STAGE)
    schedule = config.learning_rate(4.2e-4)
    # arXiv 2502.16982, section 3.3: the batch doubles after 200B tokens, the cosine ends at 5.2T.
    doubles = round(200e9 / (2048 * 8192))
    decayed = doubles + round((5.2e12 - doubles * 2048 * 8192) / (4096 * 8192))
    papers = three_stage_schedule(
        4.2e-4,
        warmup=2000,
        decay_end=decayed,
        floor=4.2e-5,
        rewarm=100,
        rewarm_peak=1e-4,
        cooldown=MOONLIGHT.steps - decayed - 100,
    )
    at = np.linspace(0, MOONLIGHT.steps - 1, 41).astype(int).tolist()
    np.testing.assert_allclose(
        [float(schedule(i)) for i in at], [float(papers(i)) for i in at], rtol=1e-6
    )
    assert [config.batch_at(i + 1) // config.batch for i in at] == [1 + (i >= doubles) for i in at]
    speeds = [config.bias_update_speed_schedule(i) / config.bias_update_speed for i in at]
    assert speeds == [float(i < decayed) for i in at]


def test_three_stages_fit_into_a_short_run(text):
    train_config = dataclasses.replace(TRAIN_CONFIG, steps=40, schedule=THREE_STAGE)
    rates = np.array([float(train_config.learning_rate(1.0)(i)) for i in range(41)])
    assert rates[0] == 0 and math.isclose(rates.max(), 1, rel_tol=1e-6)
    assert math.isclose(rates[37], 0.1, rel_tol=1e-5), "the end of the cosine"
    assert math.isclose(rates[38], 1 / 4.2, rel_tol=1e-5) and rates[40] == 0
    assert [train_config.batch_at(i) for i in (1, 2, 3, 4, 40)] == [16, 16, 16, 32, 32]
    assert train_config.sequences(40) == sum(train_config.batch_at(i) for i in range(1, 41))
    assert train_config.sequences(3.5) == 3 * 16 + 0.5 * 32
    short = dataclasses.replace(train_config, steps=16, eval_every=16)
    short = dataclasses.replace(short, batch=4, model=CONFIG)
    records, _ = losses(short, ADAMW, load_corpus(text, CONFIG.context), Devices(None, 2))
    assert [record.step for record in records] == list(range(1, 17)), "the batch grew on the way"


# ---- FLOPs ---------------------------------------------------------------------------------------


def test_flops_of_the_published_model_are_those_of_its_active_parameters_and_latent_attention():
    train_config = dataclasses.replace(TRAIN_CONFIG, model=CONFIGS["moonlight-16b-a3b"])
    t, layers, heads, width = 8192, 27, 16, 2048
    attention = width * heads * 192 + width * (512 + 64) + 512 * heads * 256 + heads * 128 * width
    norms = 512 + 2 * width
    experts = (6 + 2) * 3 * width * 1408 + width * 64
    dense = 3 * width * 11264
    active = layers * (attention + norms) + 26 * experts + dense + width
    head = width * 163840
    scores = layers * heads * t * (192 + 128) * 2  # of all pairs, as PaLM counts
    assert sequence_flops(train_config) == t * (3 * 2 * (active + head) + 3 * scores)


@pytest.mark.parametrize("per_head", [False, True])
def test_flops_of_muon_are_those_of_its_real_matrices(per_head):
    train_config = dataclasses.replace(TRAIN_CONFIG, per_head=per_head)
    params = shapes(MODEL, SGD).params

    def products(m, n):  # X X^T, A A, (b A + c A A) X: five times, two operations each
        m, n = min(m, n), max(m, n)
        return 5 * 2 * (m * m * n + m * m * m + m * m * n)

    q, kv = products(32, 32), products(16, 32)
    if per_head:
        q, kv = 2 * products(32, 16), 2 * (products(16, 8) + products(16, 8))
    attention = q + products(32, 24) + kv + products(16, 32)
    router = products(32, 8)
    truth = 2 * attention + 3 * products(32, 32) + (8 + 1) * 3 * products(32, 16) + router
    assert newton_schulz_flops(params, MODEL.per_head_views if per_head else None) == truth
    both = run_flops(train_config, MUON, params, 10.0) - run_flops(
        train_config, ADAMW, params, 10.0
    )
    assert both == 10 * truth


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """The preset `moonlight-toy`, seconds long."""
    monkeypatch.setitem(PRESETS, "moonlight-toy", TOY)
    return ["--model", "moonlight-toy", "--eval-every", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The folder that `import-hf` would make of a checkpoint, in bfloat16."""
    run = tmp_path_factory.mktemp("imported")
    (run / "config.json").write_text(
        json.dumps({"model": dataclasses.asdict(CONFIG), "huggingface": {}})
    )
    entries = {
        path: Entry(shape, "F32" if path == BIAS else "BF16")
        for path, shape in leaf_shapes(CONFIG).items()
    }
    rng = np.random.default_rng(3)
    with Writer(run / "params.safetensors", entries) as writer:
        for path, entry in entries.items():
            size = 0.3 if path == BIAS else entry.shape[-2:][0] ** -0.5
            array = size * rng.standard_normal(entry.shape)
            array = np.ones(entry.shape) if path.endswith("scale") else array
            dtype = np.float32 if path == BIAS else jnp.bfloat16
            writer.write(path, (), np.asarray(array, np.float32).astype(dtype))
    return run


@pytest.mark.slow
def test_a_moonlight_of_an_import_trains_on_a_mesh_and_goes_on_on_another(
    toy, imported, text, tmp_path, capsys
):
    alone = ["--optimizers", "muon-carried"]  # one optimizer: half the programs to compile
    where = ["train", *toy, *alone, "--data", text, "--runs", str(tmp_path), "--name", "a"]
    begin = [*where, "--from", str(imported)]
    main([*begin, "--mesh", "fsdp=2,expert=4", "--accumulate", "2"])
    folder = RunFolder(tmp_path / "a")
    first = folder.journal.read("muon-carried")[0]

    config, params, bias = moonlight_of(imported)
    corpus = load_corpus(text, CONFIG.context)
    places = starts(corpus.train, 0, 1, 16, CONFIG.context)
    tokens = windows(corpus.train, places, CONFIG.context)
    loss, report = jax.jit(functools.partial(next_token_loss, spec.model(config)))(
        params, tokens, bias
    )
    np.testing.assert_allclose(first.loss, loss, rtol=1e-5)
    worst = np.asarray(balance.imbalance(report.load)).max()
    np.testing.assert_allclose(first.model["imbalance"], worst, rtol=1e-5)
    np.testing.assert_allclose(first.model["max_logits"], report.max_logits.max(axis=1), rtol=1e-4)

    routing = (folder.path / "routing.txt").read_text()
    assert "experts/up_proj" in routing and "router" in routing
    assert "| optimizer | largest logit |" in (folder.path / "summary.md").read_text()
    assert (folder.path / "experts.png").stat().st_size > 10_000

    whole = [record.loss for record in folder.journal.read("muon-carried")]
    for path in (folder.path / "checkpoints").glob("*/4"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    main([*begin, "--resume", "--mesh", "data=4,tensor=2"])
    again = [record.loss for record in folder.journal.read("muon-carried")]
    np.testing.assert_allclose(again, whole, rtol=1e-4)

    main([*where[:-1], "b", "--from", str(folder.path)])
    after = RunFolder(tmp_path / "b").journal.read("muon-carried")[0].loss
    assert after < first.loss, "it begins where the other run ended"
    capsys.readouterr()
    main(["sample", "--runs", str(tmp_path), "--run", "a", "--length", "5", "--prompt", "def"])
    assert capsys.readouterr().out.startswith("def")


def moonlight_of(run):
    """Sizes, float32 parameters and biases of an imported run."""
    config, params, bias = load(run)
    return config, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), bias


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--mesh", "fsdp=8,pipe=1"],
            "has 'pipe=1'; it takes axes and sizes such as data=2,fsdp=4",
        ),
        (["--mesh", "fsdp=2,fsdp=4"], "each of data, fsdp, expert, tensor at most once"),
        (["--mesh", "fsdp=four"], "has 'fsdp=four'"),
        (["--mesh", "data=2,fsdp=2"], "--mesh data=2,fsdp=2 needs 4 devices, there are 8"),
        (["--mesh", "data=8", "--batch", "12"], "--batch 12 does not divide into 1 micro-batches"),
        (["--accumulate", "3"], "must be a multiple of 3"),
        (["--mesh", "tensor=8"], "which do not divide it; give smaller axes"),
        (["--distributed"], "--distributed needs --mesh"),
        (["--schedule", "three-stage", "--steps", "3"], "three-stage needs at least 4"),
        (["--accumulate", "0"], "--accumulate is 0; it must be at least 1"),
        (["--qk-clip", "0"], "--qk-clip is 0; it must be positive"),
        (["--model", "small", "--qk-clip", "100"], "small is a Llama"),
        (["--model", "small", "--bias-update-speed", "0.1"], "-speed needs a model with a router"),
    ],
)
def test_what_cannot_be_placed_or_is_not_there_is_refused(
    options, reason, toy, text, tmp_path, capsys, monkeypatch
):
    # 48 columns over 8 devices fit, 36 would not.
    odd = dataclasses.replace(CONFIG, num_attention_heads=3)
    odd = dataclasses.replace(odd, qk_nope_head_dim=4, qk_rope_head_dim=8)
    monkeypatch.setitem(
        PRESETS, "moonlight-toy", dataclasses.replace(PRESETS["moonlight-toy"], model=odd)
    )
    assert reason in refused(
        capsys, "train", *toy, "--data", text, "--runs", str(tmp_path), *options
    )
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_start_of_another_kind_is_refused(imported, text, tmp_path, capsys):
    where = ["--data", text, "--runs", str(tmp_path)]
    line = refused(capsys, "train", *where, "--from", str(imported))
    assert "is a Moonlight and --model small a Llama; give" in line and "moonlight-tiny" in line
    assert "there is no run in" in refused(capsys, "train", *where, "--from", str(tmp_path))


def test_the_model_of_a_run_is_told_by_its_sizes():
    for config in (CONFIG, PRESETS["tiny"].model):
        sizes = json.loads(json.dumps(dataclasses.asdict(config)))
        assert spec.model_of({"model": sizes, "batch": 8}) == spec.model(config)
    with pytest.raises(Exception, match="are those of none of these models: llama, moonlight"):
        spec.model_of({"model": {"width": 3}})


# ---- tokens --------------------------------------------------------------------------------------


def test_tokens_stay_on_disk_and_are_the_ones_of_the_file(tmp_path):
    tokens = drawn((1000,), vocab=5000)
    np.save(tmp_path / "tokens.npy", tokens)
    found = load_corpus(str(tmp_path / "tokens.npy"), 16, vocab=5000)
    assert isinstance(found.train, np.memmap)
    np.testing.assert_array_equal(np.concatenate([found.train, found.held_out]), tokens)
    assert (len(found.train), len(found.held_out)) == (950, 50)
    np.save(tmp_path / "more.npy", tokens.astype(np.uint16))
    same = load_corpus(str(tmp_path / "more.npy"), 16, vocab=5000)
    np.testing.assert_array_equal(
        *(windows(each.train, np.array([3, 9]), 16) for each in (found, same))
    )


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.arange(300), "--data has a token 284; the model's vocabulary is 0 to 255"),
        (np.arange(300) - 9, "--data has a token -9"),
        (np.zeros([30, 30], np.int32), "tokens are integers along one axis"),
        (np.zeros(900), "is float64 [900]; tokens are integers"),
    ],
)
def test_tokens_that_the_model_does_not_know_are_refused(tokens, reason, tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", tokens)
    size = ["--model", "tiny", "--context", "4"]
    line = refused(capsys, "train", *size, "--data", f"{tmp_path}/tokens.npy")
    assert reason in line
