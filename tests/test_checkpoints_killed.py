"""`kill -9` at any moment of saving leaves whole checkpoints only, and loses one step at most."""

import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from saving_until_killed import state_at

from optax_muon.models.training.checkpoints import Checkpoints, Keep

PROGRAM = Path(__file__).parent / "saving_until_killed.py"
RUNS, ROUNDS = 3, 8


def begun(folder):
    """The newest step that the process has begun to save."""
    lines = (folder / "begun").read_text().splitlines() if (folder / "begun").exists() else []
    return int(lines[-1]) if lines else 0


def start(folder):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, PROGRAM, folder])


def wait_for_a_save(process, folder, before):
    deadline = time.monotonic() + 60
    while begun(folder) <= before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def check(folder):
    """All steps that are there are whole; the newest one of them."""
    with Checkpoints(folder / "steps", Keep(last=2, every=10)) as checkpoints:
        for step in checkpoints.steps:
            found = checkpoints.restore(jax.eval_shape(state_at, 0), step)
            jax.tree.map(np.testing.assert_array_equal, found, state_at(step))
            assert checkpoints.position(step) == {"step": step, "tokens": 1000 * step}
        return checkpoints.latest


@pytest.mark.slow
def test_a_killed_process_leaves_whole_checkpoints_and_loses_at_most_a_step(tmp_path):
    moments = random.Random(0)
    folders = [tmp_path / str(run) for run in range(RUNS)]
    latest, halves = dict.fromkeys(folders, 0), 0
    for _ in range(ROUNDS):
        processes = [start(folder) for folder in folders]
        for process, folder in zip(processes, folders, strict=True):
            if moments.random() < 5 / 6:
                wait_for_a_save(process, folder, begun(folder))
                time.sleep(moments.uniform(0, 0.3))
            else:  # at any moment of its start
                time.sleep(moments.uniform(0, 2))
            process.kill()
            process.wait()
            halves += any(folder.glob("steps/*orbax-checkpoint-tmp*"))
            newest = check(folder)
            # The step before the one being saved was whole before that one was begun.
            assert newest >= max(begun(folder) - 1, latest[folder])
            latest[folder] = newest
    assert min(latest.values()) > 1, "all have gone on after kills"
    assert halves >= RUNS * ROUNDS // 3, "kills came in the midst of saving"
