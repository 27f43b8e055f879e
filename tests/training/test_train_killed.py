"""A training run that is killed, `kill -9`, goes on from its newest checkpoint to the same end."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest
from processes import SECONDS, wait_until

from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.initialize import initial_state
from optax_muon.training.optimizers import comparison, transformation
from optax_muon.training.presets import PRESETS
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.trainer import Trainer

TINY = PRESETS["tiny"]
STEPS = 60
CONFIG = TrainConfig(TINY.model, TINY.batch, STEPS, seed=0, eval_every=4, eval_sequences=8)
[MUON] = comparison(["muon"], TINY.hyper_params)
CHILD = """
import sys, conftest
sys.path[:0] = ["tests", "tests/training"]
from test_train_killed import train
train(*sys.argv[1:])
"""


class Nobody:
    """A progress bar that nobody sees and an interrupt that nobody presses."""

    pressed = False

    def begin(self, title, done):
        pass

    def step(self, title, record):
        pass


def train(path, text):
    """Train, or go on."""
    corpus = load_corpus(text, CONFIG.model.context)
    run = RunConfig("tiny", text, corpus.fingerprint, CONFIG, (MUON,), save_every=4)
    Path(path).mkdir(exist_ok=True)
    with jax.numpy_dtype_promotion("standard"):  # parts of optax.adamw need it
        task = Pretraining(CONFIG, corpus)
        Trainer(run, task, RunFolder(Path(path)), Nobody(), Nobody()).train(MUON)


def reached(folder, step):
    """Whether the journal has a step."""
    return any(record.step >= step for record in folder.journal.read(MUON.name))


def outcome(path):
    """The last state and what the steps said of themselves, without their times."""
    folder = RunFolder(path)
    with Checkpoints(folder.checkpoints(MUON.name)) as checkpoints:
        assert checkpoints.latest == STEPS
        like = jax.eval_shape(lambda: initial_state(CONFIG, transformation(MUON, CONFIG)))
        state = checkpoints.restore(like)
    records = folder.journal.read(MUON.name)
    return state, [dataclasses.replace(record, seconds=0.0) for record in records]


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_a_killed_run_goes_on_to_the_same_end(text, tmp_path):
    train(tmp_path / "whole", text)
    killed = RunFolder(tmp_path / "killed")
    for step in (3, 30):  # before the first checkpoint, and between two
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, killed.path, text], cwd=Path(__file__).parents[2]
        )
        wait_until(functools.partial(reached, killed, step), child)
        child.kill()
        child.wait()
        with killed.journal.path.open("a") as file:
            file.write('{"trial": "muon", "st')  # as a kill in the midst of a line
    train(killed.path, text)
    (state, records), (expected, whole) = outcome(killed.path), outcome(tmp_path / "whole")
    chex.assert_trees_all_equal(state, expected)
    assert records == whole
