"""`kill -9` at any moment of saving leaves whole checkpoints only, and loses one step at most."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import pytest
from saving_until_killed import state_at

from optax_muon.training.checkpoints import Checkpoints, RetentionPolicy

PROGRAM = Path(__file__).parents[1] / "saving_until_killed.py"
KILLS = 30


@pytest.fixture
def parent():
    """The process that starts the others; its warning of forks with threads is of no concern."""
    command = [sys.executable, "-W", "ignore", PROGRAM]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, bufsize=1) as process:
        yield process


def begun(folder):
    """The newest step that was begun to be saved."""
    lines = (folder / "begun").read_text().splitlines() if (folder / "begun").exists() else []
    return int(lines[-1]) if lines else 0


def lines(folder):
    return (folder / "begun").read_text().count("\n") if (folder / "begun").exists() else 0


def wait_for_a_save(folder, before):
    deadline = time.monotonic() + 60
    while lines(folder) == before:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def check(folder):
    """All steps that are there are whole; the newest one of them."""
    with Checkpoints(folder / "steps", RetentionPolicy(last=2, every=10)) as checkpoints:
        for step in checkpoints.steps:
            found = checkpoints.restore(jax.eval_shape(state_at, 0), step)
            chex.assert_trees_all_equal(found, state_at(step))
            assert checkpoints.position(step) == {"step": step, "tokens": 1000 * step}
        return checkpoints.latest


@pytest.mark.slow
def test_a_killed_process_leaves_whole_checkpoints_and_loses_at_most_a_step(parent, tmp_path):
    moments = random.Random(0)
    latest, halves = 0, 0
    for _ in range(KILLS):
        before = lines(tmp_path)
        parent.stdin.write(f"{tmp_path}\n")
        child = int(parent.stdout.readline())
        if moments.random() < 5 / 6:
            wait_for_a_save(tmp_path, before)
            time.sleep(moments.uniform(0, 0.3))
        else:  # at any moment of its start
            time.sleep(moments.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        assert int(parent.stdout.readline()) == signal.SIGKILL
        halves += any(tmp_path.glob("steps/*orbax-checkpoint-tmp*"))
        newest = check(tmp_path)
        # The step before the one being saved was whole before that one was begun.
        assert newest >= max(begun(tmp_path) - 1, latest)
        latest = newest
    assert latest > 3, "it has gone on after kills"
    assert halves >= KILLS // 4, "kills came in the midst of saving"
