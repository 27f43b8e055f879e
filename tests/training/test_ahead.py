"""Steps that are started before the last one's numbers are read: the same run, and nothing waits.

One device: on CPUs collectives of two programs at a time may dead-lock, so that `Devices` starts
none ahead there.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from exploding import explosive_trial

from optax_muon.cli.main import main
from optax_muon.errors import Diverged, Interrupted
from optax_muon.training import loop
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.initialize import initial_state
from optax_muon.training.optimizers import HyperParams, Trial, transformation
from optax_muon.training.optimizers import optimizer as row
from optax_muon.training.presets import PRESETS
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.profile import Profile
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("standard_promotion")

TINY = PRESETS["tiny"]
CONFIG = TrainConfig(TINY.model, 8, 12, seed=0, eval_every=5, eval_sequences=4)
MUON = Trial(row("muon"), HyperParams(0.02, 0.1))


def task(text):
    return Pretraining(CONFIG, load_corpus(text, CONFIG.model.context))


def steps(text, **options):
    """Metrics without times, whether there was a state, and a copy of the last state."""
    state = initial_state(CONFIG, transformation(MUON, CONFIG))
    found = []
    for metrics, after in loop.train(CONFIG, MUON, task(text), state, **options):
        found.append((dataclasses.replace(metrics, seconds=0.0), after is not None))
    return found, jax.tree.map(np.asarray, after)


@pytest.fixture(scope="module")
def plain(text):
    return steps(text)


@pytest.mark.parametrize("ahead", [1, 2, 100])
def test_the_numbers_are_the_same_bit_for_bit(ahead, plain, text):
    found, state = steps(text, ahead=ahead)
    assert [metrics for metrics, _ in found] == [metrics for metrics, _ in plain[0]]
    jax.tree.map(np.testing.assert_array_equal, state, plain[1])
    assert [metrics.step for metrics, there in found if there] == [5, 10, 12]
    assert all(there for _, there in plain[0])


@pytest.mark.parametrize("ahead", [0, 1])
def test_nothing_that_can_be_done_meanwhile_is_done_between_two_steps(ahead, text, monkeypatch):
    """The next batch, and with `ahead` the next step, come before the numbers are waited for."""
    done = []
    start, read = loop._step, loop._Steps._metrics

    def started(model, tx, state, *rest, **numbers):
        done.append("start")
        return start(model, tx, state, *rest, **numbers)

    def waited(self, step):
        done.append(f"read {step.number}")
        return read(self, step)

    class Task(Pretraining):
        def batch(self, number):
            done.append(f"batch {number}")
            return super().batch(number)

    monkeypatch.setattr(loop, "_step", started)
    monkeypatch.setattr(loop._Steps, "_metrics", waited)
    state = initial_state(CONFIG, transformation(MUON, CONFIG))
    told = Task(CONFIG, load_corpus(text, CONFIG.model.context))
    metrics = list(loop.train(CONFIG, MUON, told, state, ahead=ahead))
    assert len(metrics) == 12
    first = {
        0: ["start", "batch 2", "read 1", "start", "batch 3", "read 2"],
        1: ["start", "batch 2", "start", "batch 3", "read 1", "start", "batch 4", "read 2"],
    }
    assert done[0] == "batch 1"
    assert done[1 : 1 + len(first[ahead])] == first[ahead]
    assert [each for each in done if "batch" in each] == [f"batch {n}" for n in range(1, 13)]


def test_a_stop_ends_with_the_steps_under_way(text):
    asked = []

    def is_stopped():
        asked.append(True)
        return len(asked) == 3

    found, _ = steps(text, ahead=1, is_stopped=is_stopped)
    assert [(metrics.step, there) for metrics, there in found] == [
        (1, False),
        (2, False),
        (3, True),
    ]


def test_times_of_overlapping_steps_do_not_overlap(text):
    """So that their sum is the time of all of them."""
    state = initial_state(CONFIG, transformation(MUON, CONFIG))
    found = [m.seconds for m, _ in loop.train(CONFIG, MUON, task(text), state, ahead=2)]
    assert min(found) > 0
    started = [0.0, 0.1, 0.2]
    pipeline = object.__new__(loop._Steps)
    pipeline._read_at = 0.0
    now = iter([1.0, 1.5, 2.25])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.time, "perf_counter", lambda: next(now))
        measured = {"loss": np.float32(1), "grad_norm": np.float32(1), "model": {}}
        seconds = [
            pipeline._metrics(loop._Started(n, 0.1, since, measured)).seconds
            for n, since in enumerate(started)
        ]
    assert seconds == [1.0, 0.5, 0.75]


# ---- whole trials --------------------------------------------------------------------------------


class User:
    """The progress that presses Ctrl-C after a step, and the interrupt."""

    def __init__(self, step=math.inf):
        self.pressed, self.last = False, step

    def begin(self, title, done):
        pass

    def step(self, title, metrics):
        self.pressed = metrics.step >= self.last


@pytest.fixture
def accelerator(monkeypatch):
    """Devices as on an accelerator, one step ahead."""
    monkeypatch.setattr(Devices, "steps_ahead", 1)


def run(folder, text, trial=MUON, stop=math.inf, profile=0):
    user = User(stop)
    asked = RunConfig("tiny", text, "", CONFIG, (trial,), save_every=5)
    Trainer(asked, task(text), folder, user, user, SINGLE_DEVICE, Profile(profile)).train(trial)


def saved(folder, trial=MUON):
    with Checkpoints(folder.checkpoints(trial.name)) as checkpoints:
        return checkpoints.latest, checkpoints.restore(
            initial_state(CONFIG, transformation(trial, CONFIG))
        )


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(("stop", "step"), [(3, 4), (5, 5), (7, 8), (9, 10)])
def test_a_stopped_run_goes_on_bit_for_bit(stop, step, plain, text, tmp_path):
    """It stops after the step that is under way when Ctrl-C is pressed."""
    folder = RunFolder(tmp_path)
    with pytest.raises(Interrupted, match=f"at step {step}$"):
        run(folder, text, stop=stop)
    assert saved(folder)[0] == step
    assert [m.step for m in folder.journal.read("muon")] == list(range(1, step + 1))
    run(folder, text)
    jax.tree.map(np.testing.assert_array_equal, saved(folder)[1], plain[1])
    journal = [dataclasses.replace(m, seconds=0.0) for m in folder.journal.read("muon")]
    assert journal == [metrics for metrics, _ in plain[0]]


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
def test_divergence_leaves_the_last_good_checkpoint(text, tmp_path):
    trial, folder = explosive_trial(6), RunFolder(tmp_path)
    with pytest.raises(Diverged, match="at step 8"):
        run(folder, text, trial)
    step, state = saved(folder, trial)
    assert step == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert folder.journal.read("explosive")[-1].step == 7


def test_on_cpus_nothing_is_started_ahead(monkeypatch):
    assert SINGLE_DEVICE.steps_ahead == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert SINGLE_DEVICE.steps_ahead == 1


# ---- traces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("steps", "written"), [(1, 2), (4, 5), (99, 12)])
def test_a_trace_has_so_many_steps_after_the_first_two(
    steps, written, ahead, text, tmp_path, monkeypatch
):
    calls, folder = [], RunFolder(tmp_path)

    def at():
        return len(folder.journal.read("muon"))

    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append((at(), path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append((at(), None)))
    monkeypatch.setattr(Devices, "steps_ahead", ahead)
    run(folder, text, profile=steps)
    # A step is counted before it is written; at the end of the run all are written.
    assert calls == [(1, folder.profile("muon")), (written, None)]


def test_no_trace_is_written_unless_it_is_asked_for(text, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", None)
    run(RunFolder(tmp_path), text)


def test_a_trace_ends_when_the_run_is_stopped(text, tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(Interrupted):
        run(folder, text, stop=4, profile=5)
    assert list(folder.profile("muon").rglob("*.xplane.pb"))
    run(folder, text, profile=1)  # another one can begin


@pytest.mark.slow
def test_the_command_writes_a_trace(text, tmp_path):
    where = ["--data", text, "--runs", str(tmp_path), "--eval-every", "4", "--save-every", "4"]
    options = ["--optimizers", "muon", "--steps", "4", "--profile", "1"]
    main(["train", "--model", "tiny", *options, *where])
    assert len(list((tmp_path / "tiny/profile/muon").rglob("*.xplane.pb"))) == 1
