"""One run: every trial trained in turn, watched, written down, saved, and able to go on."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax

from optax_muon.errors import Interrupted
from optax_muon.models import spec
from optax_muon.training import distributed
from optax_muon.training.checkpoints import Checkpoints, RetentionPolicy
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import Corpus
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.initialize import PretrainedSource, begin
from optax_muon.training.loop import State, StepMetrics, abstract, shapes, train
from optax_muon.training.optimizers import Trial, transformation
from optax_muon.training.progress import Progress
from optax_muon.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What `config.json` records.

    Attributes:
        preset: the row of `presets.PRESETS` it started from.
        data: the user's file, folder or glob; None is the standard library.
        fingerprint: of the corpus, so that no run goes on with other text.
        setup: what all trials share.
        trials: the optimizers and their numbers.
        save_every: steps between checkpoints.
        start: folder of the run whose parameters it begins with; None begins at random.
        keep_every: steps between checkpoints that stay; None keeps the newest ones only.
    """

    preset: str
    data: str | None
    fingerprint: str
    setup: TrainConfig
    trials: tuple[Trial, ...]
    save_every: int
    start: str | None = None
    keep_every: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    def settings(self, trial: Trial) -> dict[str, Any]:
        """What has to be the same to go on from a checkpoint."""
        return {
            "setup": dataclasses.asdict(self.setup),
            "trial": dataclasses.asdict(trial),
            "fingerprint": self.fingerprint,
        }


class Interrupt:
    """Holds back the first Ctrl-C until the step is done; the second one acts as usual."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._before)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains the trials of one run.

    Attributes:
        run: what was asked for.
        corpus: the text.
        folder: where everything is written.
        progress: what the user sees meanwhile.
        interrupt: whether the user wants to stop.
        placement: devices and micro-batches.
    """

    run: RunConfig
    corpus: Corpus
    folder: RunFolder
    progress: Progress
    interrupt: Interrupt
    placement: Devices = SINGLE_DEVICE

    def train(self, trial: Trial) -> None:
        """Train one trial from its newest checkpoint, or from the start, to the end.

        Raises:
            Diverged: when a loss is not finite; the checkpoints stay as they are.
            Interrupted: on Ctrl-C, after saving.
        """
        path, settings = self.folder.checkpoints(trial.name), self.run.settings(trial)
        with Checkpoints(path, RetentionPolicy(every=self.run.keep_every), settings) as checkpoints:
            state, done = self._begin(trial, checkpoints)
            setup, placement = self.run.setup, self.placement
            steps = train(setup, trial, self.corpus, state, done, placement)
            for record, state in steps:
                if distributed.is_first():
                    self.folder.journal.write(trial.name, record)
                self.progress.step(trial.title, record)
                stop = self._is_stopped(record)
                if stop or self._is_due(record):
                    checkpoints.save(record.step, state, self._position(record))
                if stop:
                    raise Interrupted(f"stopped and saved {trial.name} at step {record.step}")

    def _begin(self, trial: Trial, checkpoints: Checkpoints) -> tuple[State, int]:
        """The state to go on from and its step."""
        done, setup, mesh = checkpoints.latest, self.run.setup, self.placement.mesh
        if distributed.is_first():
            self.folder.journal.forget(trial.name, after=done)
        self.progress.begin(trial.title, done)
        tx = transformation(trial, setup)
        if done:
            model = spec.model(setup.model)
            like = shapes(model, tx) if mesh is None else abstract(model, tx, mesh)
            return checkpoints.restore(like), done
        start = None if self.run.start is None else PretrainedSource(Path(self.run.start))
        return begin(setup, tx, mesh, start), done

    def _is_stopped(self, record: StepMetrics) -> bool:
        """Whether the user wants to stop; several processes agree on it where they evaluate."""
        if jax.process_count() == 1:
            return self.interrupt.pressed
        return record.val_loss is not None and distributed.any_of(self.interrupt.pressed)

    def _is_due(self, record: StepMetrics) -> bool:
        """Whether to save: only where the held-out loss has just shown these parameters good."""
        last = record.step == self.run.setup.steps
        return record.val_loss is not None and (last or record.step % self.run.save_every == 0)

    def _position(self, record: StepMetrics) -> dict[str, Any]:
        """Where the data is; it is a function of the seed and the step."""
        setup = self.run.setup
        tokens = int(setup.sequences(record.step)) * setup.model.context
        return {"seed": setup.seed, "tokens": tokens}


def train_all(
    run: RunConfig, corpus: Corpus, folder: RunFolder, placement: Devices = SINGLE_DEVICE
) -> None:
    """Train what is not trained yet; the placement's mesh is ambient.

    Raises:
        Diverged: as `Trainer.train`.
        Interrupted: as `Trainer.train`.
    """
    titles = [trial.title for trial in run.trials]
    hidden = not distributed.is_first()
    with Interrupt() as interrupt, Progress(titles, run.setup, hidden=hidden) as progress:
        trainer = Trainer(run, corpus, folder, progress, interrupt, placement)
        for trial in run.trials:
            trainer.train(trial)
