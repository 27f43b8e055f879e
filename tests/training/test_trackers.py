"""Trackers: every step of the journal once, also of a run that was stopped."""

import dataclasses
import json
import sys
import types

import pytest

from optax_muon.errors import Interrupted
from optax_muon.extras import EXTRAS, MissingExtraError
from optax_muon.training import trackers
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.loop import StepMetrics
from optax_muon.training.optimizers import comparison
from optax_muon.training.presets import PRESETS
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.trackers import TRACKERS, TrackedTrial, scalars, tracking
from optax_muon.training.trainer import train_all

pytestmark = pytest.mark.usefixtures("standard_promotion")


def steps(first, last):
    return [StepMetrics(n, 1 / n, 1.0, 0.1, 0.5, model={"x": 2.0 * n}) for n in range(first, last)]


class FakeService(types.ModuleType):
    """wandb or trackio: keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.rows, self.finished = [], [], 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_service_gets_every_step_once_and_the_same_run_again(tmp_path, monkeypatch, name, key):
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)
    tracked = TrackedTrial(tmp_path / "run", "muon", {"seed": 0})
    tracked.folder.mkdir()
    # Two steps before the tracker was asked for, two of it, and one that is repeated after a stop.
    for past, taken in ((steps(1, 3), steps(3, 5)), (steps(1, 4), steps(4, 7))):
        with tracking([name], tracked, past) as report:
            for metrics in taken:
                report(metrics)
    assert service.rows == [(each.step, scalars(each)) for each in steps(1, 7)]
    assert service.finished == 2
    first, second = service.begun
    assert first == second and first["resume"] == "allow" and first["config"] == {"seed": 0}
    other = dataclasses.replace(tracked, folder=tmp_path)
    with tracking([name], other, ()):
        pass
    assert service.begun[2][key] != first[key]


def events(folder):
    """Values by tag and step, as TensorBoard itself reads them."""
    pytest.importorskip("tensorboard", reason="pip install optax-muon[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    read = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    read.Reload()
    return {
        tag: {e.step: float(tensor_util.make_ndarray(e.tensor_proto)) for e in read.Tensors(tag)}
        for tag in read.Tags()["tensors"]
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_the_journal_of_a_run_that_was_stopped(text, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install optax-muon[tensorboard]")
    tiny, folder = PRESETS["tiny"], RunFolder(tmp_path / "a")
    config = TrainConfig(tiny.model, tiny.batch, 12, seed=0, eval_every=5, eval_sequences=8)
    corpus = load_corpus(text, config.model.context)
    trials = comparison(["adamw"], tiny.hyper_params)
    run = RunConfig("tiny", text, corpus.fingerprint, config, trials, save_every=5)
    folder.create_or_resume(run.to_json(), resume=False, overwrite=False)
    log = trackers.TensorBoard.log

    def stopped(self, step, values):
        log(self, step, values)
        if step == 7:
            raise Interrupted("after step 7")

    monkeypatch.setattr(trackers.TensorBoard, "log", stopped)
    with pytest.raises(Interrupted):
        train_all(run, Pretraining(config, corpus), folder, trackers=["tensorboard"])
    monkeypatch.setattr(trackers.TensorBoard, "log", log)
    train_all(run, Pretraining(config, corpus), folder, trackers=["tensorboard"])
    journal = folder.journal.read("adamw")
    found = events(tmp_path / "a" / "tensorboard" / "adamw")
    assert found["loss"] == {r.step: pytest.approx(r.loss, rel=1e-6) for r in journal}
    assert list(found["loss"]) == list(range(1, 13)) and list(found["val_loss"]) == [5, 10, 12]
    assert "track" not in json.loads(folder.config.read_text())


def test_a_tracker_that_is_not_installed_is_an_extra(monkeypatch):
    assert TRACKERS.keys() <= EXTRAS.keys()
    monkeypatch.setitem(EXTRAS, "trackio", ("no_such_module",))
    with pytest.raises(MissingExtraError, match=r"--track trackio needs .*optax-muon\[trackio\]"):
        trackers.check_installed(["trackio"])
