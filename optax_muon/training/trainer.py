"""One run: every trial trained in turn, with its progress shown, its metrics and states saved."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from optax_muon.errors import Interrupted
from optax_muon.models import spec
from optax_muon.training import distributed
from optax_muon.training.checkpoints import Checkpoints, RetentionPolicy
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.initialize import PretrainedSource, initial_state
from optax_muon.training.loop import StepMetrics, Task, train
from optax_muon.training.optimizers import Trial, transformation
from optax_muon.training.profile import NO_PROFILE, Profile
from optax_muon.training.progress import Progress
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.state import State, abstract
from optax_muon.training.trackers import TrackedTrial, tracking


class Interrupt(contextlib.AbstractContextManager["Interrupt"]):
    """Holds back the first Ctrl-C until the step is done; the second one acts as usual."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._before)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains the trials of one run."""

    run: RunConfig
    """The configuration of the run."""
    task: Task
    """What the trials learn."""
    folder: RunFolder
    """The folder that everything is written to."""
    progress: Progress
    """The progress bars."""
    interrupt: Interrupt
    """Knows whether the user has pressed Ctrl-C."""
    devices: Devices = SINGLE_DEVICE
    """Devices and micro-batches."""
    profile: Profile = NO_PROFILE
    """Which steps are traced."""
    trackers: Sequence[str] = ()
    """Where the metrics go beside the journal: keys of `trackers.TRACKERS`."""

    def train(self, trial: Trial) -> None:
        """Train one trial from its newest checkpoint, or from the start, to the end.

        Raises:
            Diverged: When a loss is not finite; the checkpoints stay as they are.
            Interrupted: On Ctrl-C, after saving.
        """
        path, settings = self.folder.checkpoints(trial.name), self.run.settings(trial)
        with Checkpoints(path, RetentionPolicy(every=self.run.keep_every), settings) as checkpoints:
            begun, done = self._begin(trial, checkpoints)
            steps = self._steps(trial, begun, done)
            with contextlib.closing(steps), self._tracking(trial) as track:
                for metrics, state in steps:
                    self._report(trial, metrics)
                    track(metrics)
                    if state is not None:  # else a later step has it
                        self._keep(trial, metrics, state, checkpoints)

    def _keep(
        self, trial: Trial, metrics: StepMetrics, state: State, checkpoints: Checkpoints
    ) -> None:
        """Save a state that is due; or any, if the user wants to stop."""
        stop = self._is_stopped(metrics)
        if stop or self._is_due(metrics):
            checkpoints.save(metrics.step, state, self._position(metrics))
        if stop:
            raise Interrupted(f"stopped and saved {trial.name} at step {metrics.step}")

    def _steps(
        self, trial: Trial, begun: State, done: int
    ) -> Generator[tuple[StepMetrics, State | None]]:
        """The steps of a trial, traced if asked for."""
        steps = train(
            self.run.training,
            trial,
            self.task,
            begun,
            done,
            ahead=self.devices.steps_ahead,
            is_stopped=self._is_stopped_here,
        )
        with self.profile.trace(self.folder.profile(trial.name)) as trace:
            for metrics, state in steps:
                trace.step()
                yield metrics, state

    def _begin(self, trial: Trial, checkpoints: Checkpoints) -> tuple[State, int]:
        """The state to continue from, and its step."""
        done, config, mesh = checkpoints.latest, self.run.training, self.devices.mesh
        if distributed.is_main_process():
            self.folder.journal.truncate(trial.name, after=done)
        self.progress.begin(trial.title, done)
        tx = transformation(trial, config)
        if done:
            return checkpoints.restore(abstract(spec.model(config.model), tx, mesh)), done
        return initial_state(config, tx, mesh, self._source), done

    def _report(self, trial: Trial, metrics: StepMetrics) -> None:
        if distributed.is_main_process():
            self.folder.journal.write(trial.name, metrics)
        self.progress.step(trial.title, metrics)

    def _tracking(
        self, trial: Trial
    ) -> contextlib.AbstractContextManager[Callable[[StepMetrics], None]]:
        """The trackers of a trial, which only the main process reports to."""
        names = self.trackers if distributed.is_main_process() else ()
        tracked = TrackedTrial(self.folder.path, trial.name, self.run.to_json())
        return tracking(names, tracked, self.folder.journal.read(trial.name) if names else ())

    def _is_stopped(self, metrics: StepMetrics) -> bool:
        """Whether the user wants to stop; several processes agree on it where they evaluate."""
        if jax.process_count() == 1:
            return self.interrupt.pressed
        return metrics.val_loss is not None and distributed.any_process(self.interrupt.pressed)

    def _is_stopped_here(self) -> bool:
        """Whether to start no further step; several processes must all start the same ones."""
        return jax.process_count() == 1 and self.interrupt.pressed

    def _is_due(self, metrics: StepMetrics) -> bool:
        """Whether to save: only after an evaluation, which has shown the parameters to be good."""
        last = metrics.step == self.run.training.steps
        return metrics.val_loss is not None and (last or metrics.step % self.run.save_every == 0)

    def _position(self, metrics: StepMetrics) -> dict[str, Any]:
        """Position in the data, only to be read: a batch is a function of the seed and the step."""
        config = self.run.training
        tokens = int(config.sequences(metrics.step)) * config.model.context
        return {"seed": config.seed, "tokens": tokens}

    @property
    def _source(self) -> PretrainedSource | None:
        if self.run.pretrained is None:
            return None
        return PretrainedSource(Path(self.run.pretrained), self.run.pretrained_trial)


def train_all(
    run: RunConfig,
    task: Task,
    folder: RunFolder,
    devices: Devices = SINGLE_DEVICE,
    profile: Profile = NO_PROFILE,
    trackers: Sequence[str] = (),
) -> None:
    """Train every trial to its end; the devices' mesh is ambient.

    Args:
        run: What was asked for.
        task: What is learned.
        folder: Where everything is written.
        devices: Devices and micro-batches.
        profile: Which steps are traced.
        trackers: Where the metrics go beside the journal: keys of `trackers.TRACKERS`.

    Raises:
        Diverged: As `Trainer.train`.
        Interrupted: As `Trainer.train`.
    """
    titles = [trial.title for trial in run.trials]
    shown = Progress(titles, run.training, devices, hidden=not distributed.is_main_process())
    with Interrupt() as interrupt, shown as progress:
        trainer = Trainer(run, task, folder, progress, interrupt, devices, profile, trackers)
        for trial in run.trials:
            trainer.train(trial)
