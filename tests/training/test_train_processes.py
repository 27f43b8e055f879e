"""`optax-muon train --distributed` as SLURM would start it: two processes of four devices each."""

import jax
import numpy as np
import pytest
import train_processes
from processes import SECONDS, on_a_free_port, run_together

from optax_muon.cli.main import main
from optax_muon.errors import UsageError
from optax_muon.extras import MissingExtraError
from optax_muon.training import distributed as together
from optax_muon.training.presets import PRESETS
from optax_muon.training.run_folder import RunFolder


def options(folder):
    """What all starts have in common."""
    size = ["--model", "moonlight-toy", "--eval-every", "2", "--save-every", "2"]
    alone = ["--optimizers", "muon-carried"]  # one optimizer: half the programs to compile
    return [*size, *alone, "--data", str(folder / "text.py"), "--runs", str(folder / "runs")]


def start(folder, *more):
    """Run the command in two processes, wait for both, and leave none behind.

    Returns their exit codes and what they printed, with what libraries said in one that failed.
    """
    mesh = ["--distributed", "--mesh", "fsdp=2,expert=4"]
    logs = [folder / f"libraries{number}.log" for number in range(2)]
    commands = [
        [train_processes.__file__, log, "4", "train", *options(folder), *mesh, *more]
        for log in logs
    ]

    def run(port):
        environment = {
            "SLURM_JOB_ID": str(port),
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": "2",
            # The port that jax makes of the job may be taken; this one was free a moment ago.
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        }
        own = [{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2)]
        codes, outputs = run_together(commands, [environment | each for each in own])
        return codes, [
            output + log.read_text() if code else output
            for code, output, log in zip(codes, outputs, logs, strict=True)
        ]

    return on_a_free_port(run)


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_two_processes_train_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "moonlight-toy", train_processes.TOY)
    text = "".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(300))
    (tmp_path / "text.py").write_text(text)
    codes, outputs = start(tmp_path, "--name", "two")
    assert codes == [0, 0], "\n".join(outputs)
    assert "Results are in" in outputs[0]
    assert outputs[1] == "", "only the main process prints"
    with jax.numpy_dtype_promotion("standard"):  # as in a process of its own
        main(["train", *options(tmp_path), "--name", "one"])
    two, one = (RunFolder(tmp_path / "runs" / name) for name in ("two", "one"))
    assert sorted(path.name for path in two.path.iterdir()) == sorted(
        path.name for path in one.path.iterdir()
    )
    records = (folder.journal.read("muon-carried") for folder in (two, one))
    for there, here in zip(*records, strict=True):
        np.testing.assert_allclose(there.loss, here.loss, rtol=1e-4)
        assert (there.step, there.val_loss is None) == (here.step, here.val_loss is None)
    codes, outputs = start(tmp_path, "--name", "two")
    assert codes == [2, 2]
    assert "exists; --resume continues it" in outputs[0], "the first one knows why"
    assert "the main process has failed" in outputs[1]


@pytest.mark.parametrize(
    "error", [UsageError("no"), PermissionError(13, "no"), MissingExtraError("no"), KeyError("no")]
)
def test_an_error_of_any_kind_is_agreed_on_before_it_is_raised(error, monkeypatch):
    told = []
    monkeypatch.setattr(together, "any_process", lambda failed: told.append(failed) or True)

    def fail():
        raise error

    with pytest.raises(type(error), match="no"):
        together.on_main_process(fail)
    assert told == [True]
    monkeypatch.setattr(together, "is_main_process", lambda: False)
    with pytest.raises(UsageError, match="the main process has failed"):
        together.on_main_process(fail)


def test_without_an_environment_the_start_is_refused(monkeypatch):
    def nobody():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    with pytest.raises(UsageError, match="--distributed cannot start: coordinator_address"):
        together.start()
