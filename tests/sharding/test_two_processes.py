"""Two processes of four devices, talking over loopback, train as one device does."""

import jax
import meshes
import numpy as np
import pytest
import two_processes
from processes import SECONDS, on_a_free_port, run_together


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_two_processes_train_as_one_device_does(tmp_path):
    result = str(tmp_path / "params.npz")

    def run(port):
        common = [two_processes.__file__, f"127.0.0.1:{port}", "2"]
        return run_together([[*common, str(number), result] for number in range(2)])

    codes, outputs = on_a_free_port(run)
    assert codes == [0, 0], "\n".join(outputs)
    found = dict(np.load(result))
    steps = [two_processes.tree(seed + 1) for seed in range(two_processes.STEPS)]
    alone = two_processes.train(two_processes.tree(0), steps)
    assert meshes.error(found, jax.tree.map(np.asarray, alone)) <= 1e-5
