"""Two processes of four devices, talking over loopback, train as one device does."""

import jax
import meshes
import numpy as np
import pytest
import two_processes
from processes import free_port, run_together

SECONDS = 240
"""How long the processes may take: about ten seconds on two idle cores."""


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(tmp_path):
    result = str(tmp_path / "params.npz")
    address = f"127.0.0.1:{free_port()}"
    commands = [[two_processes.__file__, address, "2", str(number), result] for number in range(2)]
    codes, outputs = run_together(commands, SECONDS)
    assert codes == [0, 0], "\n".join(outputs)
    found = dict(np.load(result))
    steps = [two_processes.tree(seed + 1) for seed in range(two_processes.STEPS)]
    alone = two_processes.train(two_processes.tree(0), steps)
    assert meshes.error(found, jax.tree.map(np.asarray, alone)) <= 1e-5
