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
from processes import SECONDS, wait_until
from saving_until_killed import state_at

from optax_muon.training.checkpoints import Checkpoints, RetentionPolicy

PROGRAM = Path(__file__).parents[1] / "saving_until_killed.py"
KILLS, CUT = 30, 7
"""How many kills there are at least, and how many of them in the midst of saving."""
MOMENTS = (0, False), (1, True), (2, False), (2, True), (3, True)
"""When a process is killed: how many saves it has begun, and whether one is going on."""


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


def halves(folder):
    """What is there of a save that has not ended."""
    return list(folder.glob("steps/*orbax-checkpoint-tmp*"))


def check(folder):
    """All steps that are there are whole; the newest one of them."""
    with Checkpoints(folder / "steps", RetentionPolicy(last=2, every=10)) as checkpoints:
        for step in checkpoints.steps:
            found = checkpoints.restore(jax.eval_shape(state_at, 0), step)
            chex.assert_trees_all_equal(found, state_at(step))
            assert checkpoints.position(step) == {"step": step, "tokens": 1000 * step}
        return checkpoints.latest


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_a_killed_process_leaves_whole_checkpoints_and_loses_at_most_a_step(parent, tmp_path):
    starts = random.Random(0)
    latest, kills, cut = 0, 0, 0
    # A save may end between the look at it and the kill, so there may have to be more of them.
    while kills < KILLS or cut < CUT:
        saves, midst = MOMENTS[kills % len(MOMENTS)]
        wanted = lines(tmp_path) + saves
        parent.stdin.write(f"{tmp_path}\n")
        child = int(parent.stdout.readline())
        if saves:
            wait_until(lambda wanted=wanted: lines(tmp_path) >= wanted, parent)
        else:  # at any moment of its start
            time.sleep(starts.uniform(0, 0.5))
        if midst:
            wait_until(lambda: halves(tmp_path), parent)
        os.kill(child, signal.SIGKILL)
        assert int(parent.stdout.readline()) == signal.SIGKILL
        kills, cut = kills + 1, cut + bool(halves(tmp_path))
        newest = check(tmp_path)
        # The step before the one being saved was whole before that one was begun.
        assert newest >= max(begun(tmp_path) - 1, latest)
        latest = newest
    assert latest > 3, "it has gone on after kills"
