"""Two processes of four devices, talking over loopback, train as one device does."""

import pathlib
import socket
import subprocess
import sys

import jax
import meshes
import numpy as np
import pytest
import two_processes

SECONDS = 240
"""How long the processes may take: about ten seconds on two idle cores."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_together(processes, result):
    """Start the processes, wait for all, and leave none behind."""
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, two_processes.__file__, address, str(processes), str(number), result],
            cwd=pathlib.Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        outputs = [each.communicate(timeout=SECONDS)[0] for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert [each.returncode for each in started] == [0] * processes, "\n".join(outputs)


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(tmp_path):
    result = str(tmp_path / "params.npz")
    run_together(2, result)
    found = dict(np.load(result))
    steps = [two_processes.tree(seed + 1) for seed in range(two_processes.STEPS)]
    alone = two_processes.train(two_processes.tree(0), steps)
    assert meshes.error(found, jax.tree.map(np.asarray, alone)) <= 1e-5
