"""`optax-muon finetune`: what counts in the loss, what is seen when, going on after a stop."""

import dataclasses
import importlib
import json
import math
import shutil
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from commands import refused

from optax_muon.cli.main import EXIT_CODES, main
from optax_muon.errors import Interrupted, UsageError
from optax_muon.models import llama, moonlight, spec
from optax_muon.models.cross_entropy import BLOCK
from optax_muon.training import export, finetune
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.config import TrainConfig
from optax_muon.training.data import prompts
from optax_muon.training.data.prompts import PromptDataset, TokenBatch
from optax_muon.training.devices import Devices
from optax_muon.training.finetune import Finetuning, evaluate, finetune_config
from optax_muon.training.initialize import PretrainedSource, initial_state
from optax_muon.training.loop import train
from optax_muon.training.optimizers import REGISTRY, HyperParams, Trial, transformation
from optax_muon.training.progress import Progress
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.state import State
from optax_muon.training.step import gradients

pytestmark = pytest.mark.usefixtures("standard_promotion")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LLAMA = llama.LlamaConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    context=24,
)
MOONLIGHT = dataclasses.replace(
    moonlight.CONFIGS["moonlight-tiny"],
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=40,
    moe_intermediate_size=24,
    context=24,
)
ADAMW = Trial(REGISTRY["adamw"], HyperParams(1e-2, 0.1))


def write(path, pairs):
    lines = (
        json.dumps({"prompt": p, "completion": a}, ensure_ascii=False) + "\n" for p, a in pairs
    )
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty words to be said again."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abc"), 3)) for _ in range(60)]
    path = tmp_path_factory.mktemp("data") / "copy.jsonl"
    return write(path, [(f"{i} {word} =", word) for i, word in enumerate(words)])


def source_of(folder, config):
    """A run of one checkpoint, of parameters that nobody trained and biases that are not zero."""
    train_config = TrainConfig(config, 4, 10, 0, 10, 4)
    with jax.numpy_dtype_promotion("standard"):
        state = initial_state(train_config, transformation(ADAMW, train_config))
    if state.bias is not None:
        state = state._replace(bias=state.bias + 0.25)
    run = {"training": dataclasses.asdict(train_config), "trials": [ADAMW.to_json()]}
    RunFolder(folder).config.write_text(json.dumps(run))
    with Checkpoints(RunFolder(folder).checkpoints("adamw")) as checkpoints:
        checkpoints.save(10, state)
    return folder, state


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(tmp_path_factory.mktemp("llama"), LLAMA)[0]


def run(source, data, runs, *options):
    """Fine-tune, and what metrics.jsonl says of it."""
    name = f"{source.name}-adamw"
    usual = ["--optimizers", "adamw", "--batch", "8", "--lr", "1e-2", "--eval-every", "4"]
    paths = ["--from", str(source), "--data", str(data), "--runs", str(runs)]
    main(["finetune", *paths, *usual, *options])
    return RunFolder(runs / name).journal.read("adamw")


# What a line becomes


def test_a_line_becomes_bytes_whose_answer_and_end_alone_have_weight(tmp_path):
    path = write(tmp_path / "two.jsonl", [("née =", "é"), ("b", "c")])
    loaded = prompts.load_prompts(path, context=12)
    rows = {bytes(t.astype(np.uint8)).rstrip(b"\0"): w for t, w in both(loaded)}
    assert set(rows) == {b"\0" + "née =é".encode(), b"\0bc"}
    # Position i predicts token i + 1: six bytes of prompt, two of the answer, the end.
    assert rows[b"\0" + "née =é".encode()].tolist() == [0] * 6 + [1] * 3 + [0] * 3
    assert rows[b"\0bc"].tolist() == [0, 1, 1] + [0] * 9


def both(loaded):
    for part in (loaded.train, loaded.held_out):
        yield from zip(part.tokens, part.weights, strict=True)


def test_half_a_character_of_json_is_a_question_mark(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text(
        '{"prompt": "a\\ud800", "completion": "\\udc00b"}\n{"prompt": "b", "completion": "c"}\n'
    )
    rows = [bytes(t.astype(np.uint8)) for t, _ in both(prompts.load_prompts(path, context=8))]
    assert b"\0a??b" in [row.rstrip(b"\0") for row in rows]


def test_no_prompt_is_in_both_parts_and_a_twentieth_is_held_out(tmp_path):
    pairs = [(f"{i % 50} =", str(i)) for i in range(200)]
    loaded = prompts.load_prompts(write(tmp_path / "many.jsonl", pairs), context=24)
    found = [
        {bytes(t.astype(np.uint8)).split(b"=")[0] for t in part.tokens}
        for part in (loaded.train, loaded.held_out)
    ]
    assert not found[0] & found[1]
    assert len(loaded.train) + len(loaded.held_out) == 200
    assert 8 <= len(loaded.held_out) <= 16  # a tenth hash at the border has four lines


def test_every_example_is_seen_as_often_as_there_are_epochs():
    seen = [prompts.rows(10, seed=3, step=s, batch=4, epochs=3) for s in range(1, 9)]
    assert prompts.steps(10, batch=4, epochs=3) == 8
    seen = np.concatenate(seen)
    assert [sorted(seen[i : i + 10].tolist()) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert seen[30:].tolist() == [-1, -1]
    assert seen[:10].tolist() != seen[10:20].tolist()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ('{"prompt": "a"}', 'has no text "completion"'),
        ('{"prompt": 1, "completion": "b"}', 'has no text "prompt"'),
        ("[1]", 'has no text "prompt"'),
        ('{"prompt": "a", "completion": ""}', "has an empty completion"),
        (
            '{"prompt": "aaaaaaa", "completion": "bb"}',
            "too long: 10 tokens (8 of the prompt + 2 of the completion); the model's context",
        ),
    ],
)
def test_what_a_line_lacks_is_said_with_its_number(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b"}}\n\n{line}\n')
    with pytest.raises(UsageError) as error:
        prompts.load_prompts(path, context=8)
    assert "line 3" in str(error.value)
    assert said in str(error.value)


def test_a_file_that_is_not_there_not_utf8_or_of_one_prompt_is_refused(tmp_path):
    path = tmp_path / "file.jsonl"
    with pytest.raises(UsageError, match="cannot be read"):
        prompts.load_prompts(path, context=8)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UsageError, match="cannot be read"):
        prompts.load_prompts(path, context=8)
    with pytest.raises(UsageError, match="1 prompts; at least two are needed"):
        prompts.load_prompts(write(path, [("a", "b"), ("a", "c")]), context=8)


# The loss


def learn(model, params, examples, bias=None):
    """Gradient, loss and report of a step on examples."""
    state = State(params, (), bias)
    measured = jax.jit(gradients, static_argnums=0)
    return measured(model, state, examples.tokens[None], examples.weights[None])


@pytest.mark.parametrize("config", [LLAMA, MOONLIGHT], ids=["llama", "moonlight"])
def test_the_loss_is_that_of_the_answers_alone_as_a_plain_loop_finds_it(config, data):
    model = spec.model(config)
    params, bias = jax.jit(model.init)(jax.random.key(1)), model.zero_bias()
    train = prompts.load_prompts(data, config.context).train
    examples = TokenBatch(*train.take(np.arange(4)))
    found = learn(model, params, examples, bias)[1]

    forward = jax.jit(model.forward)
    costs = []
    for tokens, weights in zip(examples.tokens, examples.weights, strict=True):
        end = int(np.flatnonzero(weights)[-1]) + 2  # no padding at all
        scores = np.asarray(forward(params, tokens[None, : end - 1], bias)[0][0], np.float64)
        for place in np.flatnonzero(weights):
            row = scores[place] - scores[place].max()
            costs.append(np.log(np.exp(row).sum()) - row[tokens[place + 1]])
    # float32 logits of a model of width 32, and a sum of sixteen.
    assert float(found) == pytest.approx(np.mean(costs), rel=2e-6)

    # What the prompt's tokens are predicted to be does not matter.
    scores = forward(params, examples.tokens[:, :-1], bias)[0]
    other = np.where(examples.weights > 0, examples.tokens[:, 1:], 7)
    terms = jax.nn.log_softmax(scores)
    picked = -np.take_along_axis(np.asarray(terms), other[..., None], 2)[..., 0]
    mean = (picked * examples.weights).sum() / examples.weights.sum()
    assert float(found) == pytest.approx(mean, rel=2e-6)


def test_rows_that_fill_up_a_batch_change_nothing(data):
    model = spec.model(LLAMA)
    params = jax.jit(model.init)(jax.random.key(1))
    train = prompts.load_prompts(data, LLAMA.context).train
    alone, filled = (TokenBatch(*train.take(np.array(rows))) for rows in ([0, 5], [0, 5, -1, -1]))
    one, other = (learn(model, params, examples)[0] for examples in (alone, filled))
    # The sum over four rows in another order than over two.
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-7)


def test_exact_answers_are_those_that_greedy_decoding_writes(data):
    model, params, held_out = learned(data)
    found = evaluate(model, params, None, held_out, batch=4)
    forward = jax.jit(model.forward)
    written = 0
    for tokens, weights in zip(held_out.tokens, held_out.weights, strict=True):
        places = np.flatnonzero(weights)
        own = tokens.copy()
        own[places + 1] = 0
        for place in places:
            own[place + 1] = np.argmax(forward(params, own[None, :-1])[0][0, place])
        written += (own == tokens).all()
    assert found.exact == written / len(held_out)
    assert 0 < found.exact <= 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_evaluating_takes_the_memory_of_a_micro_batch(accumulate, monkeypatch):
    """The loss that of a block of logits, exactness that of the logits of a micro-batch."""
    config = dataclasses.replace(MOONLIGHT, vocab_size=4096, context=128)
    model = spec.model(config)
    params, random = jax.jit(model.init)(jax.random.key(1)), np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, [16, config.context + 1], np.int32)
    pairs = TokenBatch(tokens, np.ones([16, config.context], np.float32))
    train_config = TrainConfig(config, 16, 4, 0, 2, 16, epochs=1)
    task = Finetuning(train_config, PromptDataset(pairs, pairs), Devices(None, accumulate))
    needed = {}

    def measured(name):
        program = getattr(finetune, name)

        def run(model, *arrays):
            compiled = program.lower(model, *arrays).compile()
            needed[name] = compiled.memory_analysis().temp_size_in_bytes
            return compiled(*arrays)

        return run

    for name in ("_loss", "_exact"):
        monkeypatch.setattr(finetune, name, measured(name))
    task.evaluate(params, model.zero_bias())
    logits = 4 * config.vocab_size  # of a token
    # Logits of a block and what they are exponentiated to, and 1 MiB for all else.
    assert needed["_loss"] < 2 * BLOCK * logits + 2**20
    assert needed["_exact"] < 16 // accumulate * config.context * logits + 2**21


def learned(data):
    """A model that has learned the examples it is evaluated on."""
    loaded = prompts.load_prompts(data, LLAMA.context)
    loaded = dataclasses.replace(loaded, held_out=loaded.train)
    numbers = {"batch": 8, "epochs": 30, "seed": 0}
    steps = prompts.steps(len(loaded.train), 8, 30)
    config = finetune_config(spec.model(LLAMA), loaded, **numbers, eval_every=steps)
    muon = Trial(REGISTRY["muon"], HyperParams(1e-2, 0.1))
    state = initial_state(config, transformation(muon, config))
    *_, (metrics, state) = train(config, muon, Finetuning(config, loaded), state)
    assert metrics.val_loss < 1
    return spec.model(LLAMA), state.params, loaded.train


def weights(run):
    """The newest parameters and router biases of a run."""
    return PretrainedSource(run).weights()


# The command


@pytest.fixture(scope="module")
def finished(source, data, tmp_path_factory):
    """A whole run's folder of runs, and its records."""
    runs = tmp_path_factory.mktemp("runs")
    with jax.numpy_dtype_promotion("standard"):
        return runs, run(source, data, runs)


def test_the_rate_falls_along_a_line_to_zero(finished):
    lrs = [record.lr for record in finished[1]]
    np.testing.assert_allclose(lrs, 1e-2 * (1 - np.arange(len(lrs)) / len(lrs)), rtol=1e-5)
    assert len(lrs) == prompts.steps(57, batch=8, epochs=2)


def test_the_held_out_answers_get_likelier(finished, source, data):
    loaded = prompts.load_prompts(data, LLAMA.context)
    before = evaluate(spec.model(LLAMA), *weights(source), loaded.held_out, 8).loss
    assert finished[1][-1].val_loss < 0.7 * before


def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    finished, source, data, tmp_path, monkeypatch, capsys
):
    def press_at_six(self, title, record):
        if record.step == 6:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", press_at_six)
        with pytest.raises(SystemExit) as end:
            run(source, data, tmp_path)
    assert end.value.code == EXIT_CODES[Interrupted]
    said = capsys.readouterr().err.splitlines()[-1]
    assert "resume with: optax-muon finetune" in said
    assert said.endswith("--resume")
    again = run(source, data, tmp_path, "--resume")
    whole = finished[1]
    assert [dataclasses.replace(r, seconds=0) for r in again] == [
        dataclasses.replace(r, seconds=0) for r in whole
    ]
    one, other = (weights(runs / f"{source.name}-adamw") for runs in (tmp_path, finished[0]))
    chex.assert_trees_all_equal(one, other)


@pytest.mark.slow
def test_a_moonlight_keeps_its_router_biases(data, tmp_path):
    source, before = source_of(tmp_path, MOONLIGHT)
    np.testing.assert_array_equal(weights(source)[1], before.bias)
    run(source, data, tmp_path / "runs", "--epochs", "1")
    path = tmp_path / "runs" / f"{source.name}-adamw"
    np.testing.assert_array_equal(weights(path)[1], before.bias)


def test_spectra_reads_the_run(finished, source):
    path = finished[0] / f"{source.name}-adamw"
    main(["spectra", str(path)])
    assert (path / "spectra.png").exists()


def test_what_cannot_be_begun_with_is_refused_in_a_line(finished, source, data, tmp_path, capsys):
    options = ["--data", data, "--runs", tmp_path]
    assert "there is no run in" in refused(
        capsys, "finetune", "--from", tmp_path / "none", *options
    )
    named = refused(capsys, "finetune", "--from", source, *options, "--trial", "muon")
    assert "has no trial 'muon'; it has adamw" in named
    assert "--epochs is 0" in refused(
        capsys, "finetune", "--from", source, *options, "--epochs", "0"
    )
    lost = tmp_path / "lost"
    shutil.copytree(source, lost, ignore=lambda *_: ["checkpoints"])
    assert "has no checkpoint of adamw" in refused(capsys, "finetune", "--from", lost, *options)
    taken = ["--runs", finished[0], "--optimizers", "adamw"]
    exists = refused(capsys, "finetune", "--from", source, "--data", data, *taken)
    assert "exists; --resume continues it" in exists
    other = ["--data", data, *taken, "--resume", "--epochs", "3"]
    line = refused(capsys, "finetune", "--from", source, *other)
    assert "does not fit what is to be restored" in line
    assert "training.epochs is 2 in the checkpoint and 3 now" in line


@pytest.mark.slow
def test_fine_tuning_on_a_mesh_is_that_on_one_device(finished, source, data, tmp_path):
    records = run(source, data, tmp_path, "--mesh", "data=2,fsdp=2,tensor=2", "--accumulate", "2")
    for one, other in zip(finished[1], records, strict=True):
        # Sums in another order, through fifteen steps.
        np.testing.assert_allclose(other.loss, one.loss, rtol=1e-3)
        if one.val_loss is not None:
            np.testing.assert_allclose(other.val_loss, one.val_loss, rtol=1e-3)


@pytest.mark.parametrize("key", ["finetuned", "twice"])
def test_an_exported_run_keeps_the_tokens_of_the_import_it_descends_from(key, tmp_path):
    runs = {name: RunFolder(tmp_path / name) for name in ("imported", "finetuned", "twice")}
    configs = {
        "imported": {"model": {}, "huggingface": {"bos_token_id": 7}},
        "finetuned": {"trials": [], "pretrained": str(tmp_path / "imported")},
        "twice": {"trials": [], "pretrained": str(tmp_path / "finetuned")},
    }
    for name, folder in runs.items():
        folder.path.mkdir()
        folder.config.write_text(json.dumps(configs[name]))
    assert export.origin(runs[key]) == {"bos_token_id": 7}
    shutil.rmtree(runs["imported"].path)
    assert export.origin(runs[key]) is None


# The table of pretraining and fine-tuning


@pytest.fixture
def table(monkeypatch):
    if not BENCHMARKS.exists():
        pytest.skip("benchmarks are not part of a source archive")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("finetune_table")


@pytest.mark.slow
def test_the_table_judges_by_functions_that_nobody_was_fine_tuned_on(tmp_path, table):
    runs = table.Runs(tmp_path, table.TOY)
    runs.prepare()
    training, evaluation = (
        {
            json.loads(line)["prompt"]
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        }
        for name in ("training", "evaluation")
    )
    assert len(training) == len(evaluation) == table.TOY.examples
    assert not training & evaluation
    result = runs.train(table.FinetuneRun("adamw", "muon", 1e-2, seed=1))
    assert result.loss < result.start


def test_the_table_searches_a_rate_for_each_pair_and_compares_other_seeds(table):
    def outcome(run):
        gap = 0.02 if run.after == "muon" else 0.0
        valley = 0.1 * math.log2(run.lr / {"adamw": 3e-3, "muon": 2e-4}[run.after]) ** 2
        loss = 1.5 + gap + valley + 0.1 * run.seed - (0.5 if run.seed == 0 else 0.0)
        return table.FinetuneResult(**dataclasses.asdict(run), start=3.0, loss=loss)

    rows = {}
    while missing := table.needed(rows):
        rows |= {run: outcome(run) for run in missing}
    picked = table.best(rows)
    assert list(picked) == list(table.PAIRS)
    for (_, after), best in picked.items():
        assert best[0].lr == {"adamw": 2.8e-3, "muon": 1.75e-4}[after]
        assert [row.seed for row in best] == [1, 2, 3]
    # Valleys: 0.1 log2(2.8 / 3)^2 = 0.0010, 0.1 log2(1.75 / 2)^2 = 0.0037.
    text = "\n".join(table.page(rows))
    assert (
        "Pretrained with AdamW: the loss of fine-tuning with Muon over that with AdamW is " in text
    )
    assert text.count("is +0.0227 ± 0.0000") == 2
