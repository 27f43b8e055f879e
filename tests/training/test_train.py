"""`optax-muon train`: what it leaves behind, going on after a stop, saying no in one line."""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import chex
import matplotlib.image
import numpy as np
import optax
import pytest
from commands import refused
from exploding import explosive_trial
from processes import SECONDS, wait_until

from optax_muon.cli.commands import COMMANDS
from optax_muon.cli.main import main
from optax_muon.cli.reports import training
from optax_muon.errors import Diverged, Interrupted
from optax_muon.training import loop
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.flops import run_flops
from optax_muon.training.initialize import initial_state
from optax_muon.training.loop import StepMetrics
from optax_muon.training.optimizers import (
    DEFAULT,
    REGISTRY,
    HyperParams,
    OptimizerSpec,
    Trial,
    comparison,
    newton_schulz_flops,
    register,
    transformation,
)
from optax_muon.training.presets import PRESETS
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.styles import Style
from optax_muon.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("standard_promotion")

TINY = PRESETS["tiny"]
CONFIG = TrainConfig(TINY.model, TINY.batch, TINY.steps, seed=0, eval_every=10, eval_sequences=128)
TRIALS = comparison(DEFAULT, TINY.hyper_params)
OPTIONS = ["--preset", "tiny", "--eval-every", "10", "--save-every", "20"]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of one whole run."""
    runs = tmp_path_factory.mktemp("runs")
    main(["train", *OPTIONS, "--data", text, "--runs", str(runs), "--name", "whole"])
    return RunFolder(runs / "whole")


class Silence:
    """A progress bar that nobody sees."""

    def begin(self, title, done):
        pass

    def step(self, title, record):
        pass


class StopAfter(Silence):
    """Presses Ctrl-C after a step: the progress it watches and the interrupt in one."""

    def __init__(self, step=math.inf):
        self.pressed, self.last = False, step

    def step(self, title, record):
        self.pressed = record.step >= self.last


def train(folder, trial, text, stop_after=math.inf):
    corpus = load_corpus(text, CONFIG.model.context)
    run = RunConfig("tiny", text, corpus.fingerprint, CONFIG, (trial,), save_every=20)
    user = StopAfter(stop_after)
    task = Pretraining(CONFIG, corpus)
    Trainer(run, task, folder, user, user).train(trial)


def saved(folder, trial):
    with Checkpoints(folder.checkpoints(trial.name)) as checkpoints:
        state = initial_state(CONFIG, transformation(trial, CONFIG))
        return checkpoints.latest, checkpoints.restore(state)


def without_seconds(records):
    return [dataclasses.replace(record, seconds=0.0) for record in records]


# What a run leaves behind


def test_one_optimizer_is_trained_alone_as_among_others(finished, text, tmp_path):
    alone = ["--optimizers", "muon", "--save-every", "10", "--keep-every", "20"]
    where = ["--data", text, "--runs", str(tmp_path), "--name", "alone"]
    main(["train", "--preset", "tiny", "--eval-every", "10", *where, *alone])
    folder = RunFolder(tmp_path / "alone")
    [trial] = folder.read_config()["trials"]
    assert trial["name"] == TRIALS[-1].name
    records, among = (f.journal.read(TRIALS[-1].name) for f in (folder, finished))
    assert without_seconds(records) == without_seconds(among)
    with Checkpoints(folder.checkpoints(TRIALS[-1].name)) as checkpoints:
        assert checkpoints.steps == [20, 30, 40]
    row = (folder.path / "summary.md").read_text().splitlines()[6]
    assert row.split(" | ")[4:7] == ["-", "-", "-"]  # AdamW's final loss, and when it was reached


def test_kept_steps_are_saved_steps(capsys):
    line = refused(capsys, "train", "--save-every", "40", "--keep-every", "60")
    assert "--keep-every 60 must be a multiple of --save-every 40" in line


def test_every_step_of_every_contestant_is_written_once(finished):
    for trial in TRIALS:
        records = finished.journal.read(trial.name)
        assert [r.step for r in records] == list(range(1, 41))
        assert [r.step for r in records if r.val_loss is not None] == [10, 20, 30, 40]


def test_every_contestant_learns_from_the_same_start(finished):
    curves = [finished.journal.read(trial.name) for trial in TRIALS]
    # Steps of AdamW and of Muon are two programs, which may sum in other orders.
    first = [records[0].loss for records in curves]
    np.testing.assert_allclose(first, first[0], rtol=1e-6)
    assert all(records[-1].val_loss < 0.75 * math.log(256) for records in curves)


def test_the_first_update_has_no_learning_rate_and_the_peak_comes_after_the_warm_up(finished):
    lrs = [record.lr for record in finished.journal.read("adamw")]
    assert lrs[0] == 0
    assert np.argmax(lrs) == 4
    assert math.isclose(max(lrs), TINY.hyper_params["adamw"].lr, rel_tol=1e-6)
    assert lrs[-1] < 0.12 * TINY.hyper_params["adamw"].lr


def test_the_config_holds_what_was_asked_for(finished, text):
    config = json.loads(finished.config.read_text())
    assert config["preset"] == "tiny"
    assert config["data"] == text
    assert config["training"]["model"] == dataclasses.asdict(TINY.model)
    assert [c["hyper_params"]["lr"] for c in config["trials"]] == [0.01, 0.01, 0.02]


def test_the_summary_holds_each_final_loss_and_learning_rate(finished):
    summary = (finished.path / "summary.md").read_text()
    for trial in TRIALS:
        final = finished.journal.read(trial.name)[-1].val_loss
        row = next(line for line in summary.splitlines() if f"| {trial.title} |" in line)
        assert f"| {trial.hyper_params.lr:g} | 0.1 | {final:.4f} |" in row
    assert "jax" in summary.splitlines()[-1]


def test_the_picture_shows_something(finished):
    picture = matplotlib.image.imread(finished.path / "loss.png")
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20


def test_a_finished_run_resumes_to_the_same_report(finished, text):
    before = finished.journal.path.read_text()
    where = ["--runs", str(finished.path.parent), "--name", "whole", "--resume"]
    main(["train", *OPTIONS, "--data", text, *where])
    assert finished.journal.path.read_text() == before


def test_sample_writes_on_from_the_prompt(finished, capsys):
    where = ["--runs", str(finished.path.parent), "--run", "whole"]
    main(["sample", *where, "--prompt", "def f", "--length", "60", "--temperature", "0"])
    first = capsys.readouterr().out
    folder = str(finished.path)  # instead of its name
    main(["sample", "--run", folder, "--prompt", "def f", "--length", "60", "--temperature", "0"])
    assert first.startswith("def f")
    assert len(first) == len("def f") + 60 + 1
    assert capsys.readouterr().out == first


# Stopping and going on


@pytest.mark.parametrize("trial", [TRIALS[0], TRIALS[2]], ids=lambda c: c.name)
def test_a_stopped_run_goes_on_bit_for_bit(finished, text, tmp_path, trial):
    folder = RunFolder(tmp_path)
    with pytest.raises(Interrupted, match="at step 23"):
        train(folder, trial, text, stop_after=23)
    assert saved(folder, trial)[0] == 23
    train(folder, trial, text)
    chex.assert_trees_all_equal(saved(folder, trial), saved(finished, trial))
    whole = finished.journal.read(trial.name)
    assert without_seconds(folder.journal.read(trial.name)) == without_seconds(whole)


def test_steps_after_the_last_checkpoint_and_half_lines_are_forgotten(tmp_path):
    journal = RunFolder(tmp_path).journal
    for step in (1, 2, 3):
        journal.write("muon", StepMetrics(step, 1.0, 1.0, 0.1, 0.5))
        journal.write("adamw", StepMetrics(step, 1.0, 1.0, 0.1, 0.5))
    with journal.path.open("a") as file:
        file.write('{"trial": "muon", "st')
    journal.truncate("muon", after=1)
    assert [record.step for record in journal.read("muon")] == [1]
    assert [record.step for record in journal.read("adamw")] == [1, 2, 3]


@pytest.mark.timeout(3 * SECONDS)
def test_ctrl_c_saves_and_says_how_to_go_on(text, tmp_path):
    arguments = ["train", *OPTIONS, "--data", text, "--runs", str(tmp_path), "--name", "long"]
    program = "from optax_muon.cli.main import main; main()"
    command = [sys.executable, "-c", program, *arguments, "--steps", "100000", "--overwrite"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    folder = RunFolder(tmp_path / "long")
    wait_until(lambda: len(folder.journal.read("adamw")) >= 5, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    step = folder.journal.read("adamw")[-1].step
    [last] = [line for line in said.splitlines() if "resume with" in line]
    assert f"saved adamw at step {step}; resume with: optax-muon train --preset tiny" in last
    assert last.endswith("--steps 100000 --resume")
    assert (folder.checkpoints("adamw") / str(step)).is_dir()


# Divergence


def test_a_loss_that_is_not_finite_stops_with_its_step(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        where = ["--data", text, "--runs", str(tmp_path)]
        main(["train", *OPTIONS, *where, "--set", "adamw.lr=1e30"])
    assert end.value.code == 1
    # Step 1 has learning rate 0, step 2 the first large update, which step 3 meets.
    said = capsys.readouterr().err
    assert any(line.endswith("is nan at step 3") for line in said.splitlines())
    assert "Traceback" not in said


def test_divergence_leaves_the_last_good_checkpoint(text, tmp_path):
    trial, folder = explosive_trial(25), RunFolder(tmp_path)
    with pytest.raises(Diverged, match="at step 27"):
        train(folder, trial, text)
    step, state = saved(folder, trial)
    assert step == 20
    chex.assert_tree_all_finite(state)
    assert folder.journal.read("explosive")[-1].step == 26


# Refusals: one line, exit code 2


def test_an_unknown_preset_is_refused(capsys):
    assert "unknown model 'huge'; there are tiny, small" in refused(
        capsys, "train", "--preset", "huge"
    )


def test_text_that_is_not_there_is_refused(capsys, tmp_path):
    assert "no file matches" in refused(capsys, "train", "--data", f"{tmp_path}/*.txt")


def test_text_too_short_for_a_sequence_is_refused(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("too short")
    assert "too short for one sequence" in refused(
        capsys, "train", *OPTIONS, "--data", f"{tmp_path}/a.txt"
    )


def test_a_run_that_exists_is_refused_without_resume_or_overwrite(finished, text, capsys):
    where = ["--runs", str(finished.path.parent), "--name", "whole"]
    line = refused(capsys, "train", *OPTIONS, "--data", text, *where)
    assert "exists; --resume continues it, --overwrite deletes it" in line


def test_resuming_with_another_config_is_refused(finished, text, capsys):
    where = ["--runs", str(finished.path.parent), "--name", "whole", "--resume"]
    line = refused(capsys, "train", *OPTIONS, "--data", text, *where, "--seed", "7")
    assert (
        "does not fit what is to be restored: training.seed is 0 in the checkpoint and 7 now"
        in line
    )


def test_resuming_with_other_text_is_refused(finished, text, capsys):
    added = Path(text).parent / "added.py"
    where = ["--runs", str(finished.path.parent), "--name", "whole", "--resume"]
    try:
        added.write_text("more\n" * 100)
        line = refused(capsys, "train", *OPTIONS, "--data", text, *where)
    finally:
        added.unlink()
    assert "fingerprint is" in line


def test_resuming_nothing_is_refused(tmp_path, text, capsys):
    where = ["--runs", str(tmp_path), "--name", "none", "--resume"]
    assert "there is no run in" in refused(capsys, "train", *OPTIONS, "--data", text, *where)


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path, text, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    where = ["--runs", str(tmp_path), "--name", "mine", "--overwrite"]
    assert "there is no run in" in refused(capsys, "train", *OPTIONS, "--data", text, *where)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--set", "muon=3"], "--set muon=3 is not OPTIMIZER.HYPERPARAMETER=NUMBER"),
        (["--set", "muon.lr=1,2"], "--set muon.lr has 2 numbers; only sweep takes several"),
        (["--set", "muon.beta=1"], "muon has no hyperparameter 'beta'; it has lr, weight_decay"),
        (["--set", "soap.lr=1"], "unknown optimizer 'soap'; there are adamw, muon-carried, muon"),
        (["--optimizers", "soap"], "unknown optimizer 'soap'"),
        (["--resume", "--overwrite"], "are mutually exclusive"),
        (["--save-every", "15"], "--save-every 15 must be a multiple of --eval-every 10"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--batch", "-2"], "--batch is -2; it must be at least 1"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["--set", "muon.lr=0"], "lr is 0; it must be positive and finite"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, reason, text, tmp_path, capsys):
    where = ["--data", text, "--runs", str(tmp_path)]
    assert reason in refused(capsys, "train", *OPTIONS, *where, *options)


def test_a_sample_of_nothing_is_refused(finished, tmp_path, capsys):
    where = ["--runs", str(finished.path.parent), "--run", "whole"]
    assert "no run in" in refused(capsys, "sample", "--runs", str(tmp_path), "--run", "none")
    assert "no trial 'sgd'" in refused(capsys, "sample", *where, "--trial", "sgd")
    assert "--length is 0; it must be at least 1" in refused(capsys, "sample", "--length", "0")


def test_without_the_extra_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tyro" else 1)
    line = refused(capsys, "train")
    assert line.startswith("optax-muon: The command needs tyro; install optax-muon with its extra")


@pytest.mark.parametrize("command", get_args(COMMANDS), ids=lambda c: get_args(c)[0].__name__)
def test_help_explains_every_command_and_option(command, capsys):
    options, subcommand = get_args(command)
    with pytest.raises(SystemExit) as end:
        main([subcommand.name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert options.__doc__.splitlines()[0] in " ".join(shown.split())
    explained = explanations(options)
    for field in dataclasses.fields(options):
        text = explained[field.name]
        assert len(text) > 10, f"{field.name} is not explained"
        assert text[:15] in shown


def explanations(options):
    """The text below each field of a dataclass and its bases."""
    found = {}
    for kind in reversed(options.__mro__[:-1]):
        [body] = [node.body for node in ast.parse(inspect.getsource(kind)).body]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign):
                is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                found[field.target.id] = text.value.value if is_text else ""
    return found


# An optimizer from outside


def test_an_optimizer_from_outside_is_one_row(text, tmp_path, monkeypatch):
    outside = OptimizerSpec(
        "outside",
        "From Outside",
        Style("#123456", "-.", "*"),
        lambda schedule, numbers, views: optax.adafactor(
            schedule, weight_decay_rate=numbers.weight_decay * 1e-3
        ),
        step_flops=lambda params, views: 10**6,
        lr_ratio=0.5,
    )
    monkeypatch.setitem(REGISTRY, "outside", outside)
    with pytest.raises(ValueError, match="'outside' is registered already"):
        register(outside)
    where = ["--data", text, "--runs", str(tmp_path), "--name", "a"]
    main(["train", *OPTIONS, *where, "--steps", "20", "--optimizers", "adamw", "outside"])
    folder = RunFolder(tmp_path / "a")
    [_, trial] = folder.read_config()["trials"]
    assert trial["hyper_params"] == {"lr": 0.5 * 0.01, "weight_decay": 0.2}
    curve = folder.journal.read("outside")
    assert curve[-1].val_loss < curve[9].val_loss
    assert "| From Outside | 0.005 | 0.2 |" in (folder.path / "summary.md").read_text()
    picture = matplotlib.image.imread(folder.path / "loss.png")[..., :3]
    assert (np.round(255 * picture) == (0x12, 0x34, 0x56)).all(axis=-1).any()
    params = initial_state(CONFIG, optax.identity()).params
    trials = comparison(("adamw", "outside"), TINY.hyper_params)
    one, other = (run_flops(CONFIG, trial, params, 3) for trial in trials)
    assert other - one == 3 * 10**6
    sizes = ["--preset", "tiny", "--data", text, "--steps", "4", "--weight-decay", "0.1"]
    sweep = ["--optimizers", "outside", "--set", "outside.lr=1e-3", "--out", str(tmp_path / "s")]
    main(["sweep", *sizes, *sweep])
    assert "| From Outside | 0.001 | 0.1 | **" in (tmp_path / "s" / "sweep.md").read_text()
    main(["spectra", str(folder.path)])
    assert "outside" in (folder.path / "spectra.csv").read_text()


def test_every_registered_optimizer_learns(text, finished):
    corpus = load_corpus(text, CONFIG.model.context)
    task = Pretraining(CONFIG, corpus)
    for name in set(REGISTRY) - set(DEFAULT):
        [trial] = comparison([name], TINY.hyper_params)
        state = initial_state(CONFIG, transformation(trial, CONFIG))
        *_, (last, _) = loop.train(CONFIG, trial, task, state)
        assert last.val_loss < 0.75 * math.log(256)


# Arithmetic of the report


def outcome(name, losses, flops, step_seconds=0.1):
    trial = Trial(REGISTRY[name], HyperParams(1e-3, 0.1))
    steps = range(10, 10 * len(losses) + 1, 10)
    records = [
        StepMetrics(step, 1.0, 1.0, 1e-3, step_seconds, loss)
        for step, loss in zip(steps, losses, strict=True)
    ]
    return training.Outcome(trial, records, lambda n: n * flops, update_seconds=0.02)


def test_the_fractions_are_those_of_the_crossing():
    adamw = outcome("adamw", [4.0, 3.0, 2.5, 2.0], flops=100)
    muon = outcome("muon", [3.0, 1.0, 0.9, 0.8], flops=120)
    compared = training.Comparison(muon, adamw)
    assert compared.reached == 15  # half way from 3 at step 10 to 1 at step 20
    assert compared.steps == 15 / 40
    assert math.isclose(compared.flops, 15 / 40 * 1.2)
    assert math.isclose(muon.share, 0.2)


def test_a_level_that_is_never_reached_says_so():
    adamw, muon = outcome("adamw", [3.0, 2.0], 100), outcome("muon", [3.0, 2.1], 120)
    compared = training.Comparison(muon, adamw)
    assert (compared.reached, compared.steps, compared.flops) == (None, None, None)
    assert "never" in compared.cells


def test_flops_are_six_per_weight_and_token_and_the_products_of_newton_schulz():
    model = TINY.model
    params = initial_state(CONFIG, optax.identity()).params
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    weights = 256 * 32 + 2 * layer + 32
    scores = 12 * model.num_hidden_layers * model.context * model.hidden_size
    assert run_flops(CONFIG, TRIALS[0], params) == 8 * 32 * (6 * weights + scores)

    def products(m, n):  # X X^T, A A, (b A + c A A) X: five times, two operations each
        return 5 * 2 * (m * m * n + m * m * m + m * m * n)

    layer = 2 * products(32, 32) + 2 * products(16, 32) + 3 * products(32, 64)
    assert newton_schulz_flops(params) == 2 * layer
    assert run_flops(CONFIG, TRIALS[1], params) - run_flops(CONFIG, TRIALS[0], params) == 2 * layer


def test_muon_at_adamws_numbers_is_not_run_twice():
    same = dict.fromkeys(("adamw", "muon"), TINY.hyper_params["adamw"])
    assert [trial.name for trial in comparison(DEFAULT, same)] == ["adamw", "muon-carried"]
