"""Experiment trackers that a run can also report to: one row of `TRACKERS` each.

`metrics.jsonl` stays the truth. A tracker is given every step of it once: what the journal already
holds when a trial begins, and each step as it is taken. So a run that resumes, or one that is
tracked only from its second half on, has the whole curve there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from optax_muon.extras import require_extra
from optax_muon.training.loop import StepMetrics

PROJECT = "optax-muon"
"""Name of the project on the services."""


class Tracker(Protocol):
    """The curve of one trial, somewhere else."""

    since: int
    """Steps that are there already."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a step."""

    def close(self) -> None:
        """Send what is not sent yet."""


@dataclasses.dataclass(frozen=True)
class TrackedTrial:
    """What a tracker is told of a trial."""

    folder: Path
    """The run's folder."""
    trial: str
    """Name of the trial."""
    config: Mapping[str, Any]
    """The run's `config.json`."""

    @property
    def run(self) -> str:
        """The run's name."""
        return self.folder.resolve().name


class TensorBoard:
    """Event files in `RUN/tensorboard/TRIAL`, written anew when a trial begins."""

    def __init__(self, tracked: TrackedTrial):
        folder = tracked.folder / "tensorboard" / tracked.trial
        shutil.rmtree(folder, ignore_errors=True)
        self.since = 0
        self._writer = importlib.import_module("tensorboard.summary").Writer(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is in memory."""
        self._writer.close()


class Service:
    """A run of wandb, or of trackio, which has the same interface.

    The name of the run there, and how many steps it has, are in `RUN/tracking/SERVICE-TRIAL.json`.

    Args:
        module: Its name.
        tracked: The trial.
        identity: Keywords of `init` that find the run again, from a name that nobody else has.
    """

    def __init__(
        self, module: str, tracked: TrackedTrial, identity: Callable[[str], dict[str, Any]]
    ):
        self._file = tracked.folder / "tracking" / f"{module}-{tracked.trial}.json"
        saved: dict[str, Any] = {"id": uuid.uuid4().hex[:8], "steps": 0}
        if self._file.exists():
            saved = json.loads(self._file.read_text(encoding="utf-8"))
        self._id, self.since = saved["id"], saved["steps"]
        self._file.parent.mkdir(exist_ok=True)
        self._save()
        self._run = importlib.import_module(module).init(
            project=PROJECT,
            group=tracked.run,
            config=dict(tracked.config),
            resume="allow",
            **identity(self._id),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a step."""
        self._run.log(dict(values), step=step)
        self.since = step
        self._save()

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()

    def _save(self) -> None:
        draft = self._file.with_suffix(".draft")  # a killed process leaves a whole file
        draft.write_text(json.dumps({"id": self._id, "steps": self.since}), encoding="utf-8")
        draft.replace(self._file)


def _wandb(tracked: TrackedTrial) -> Tracker:
    name = f"{tracked.run}-{tracked.trial}"
    return Service("wandb", tracked, lambda unique: {"id": unique, "name": name})


def _trackio(tracked: TrackedTrial) -> Tracker:
    name = f"{tracked.run}-{tracked.trial}"
    return Service("trackio", tracked, lambda unique: {"name": f"{name}-{unique}"})


@dataclasses.dataclass(frozen=True)
class TrackerSpec:
    """A tracker: its name is that of the extra that installs it."""

    name: str
    """Its name on the command line."""
    open: Callable[[TrackedTrial], Tracker]
    """Begins or continues a trial."""
    hint: str
    """The command that shows the curves; `{folder}` is the run's folder."""


TRACKERS: dict[str, TrackerSpec] = {
    each.name: each
    for each in (
        TrackerSpec("tensorboard", TensorBoard, "tensorboard --logdir {folder}/tensorboard"),
        TrackerSpec("wandb", _wandb, "the page that wandb prints"),
        TrackerSpec("trackio", _trackio, f"trackio show --project {PROJECT}"),
    )
}
"""The trackers by name."""


def check_installed(names: Sequence[str]) -> None:
    """Check that these trackers are installed.

    Raises:
        MissingExtraError: One is not.
    """
    for name in names:
        require_extra(name, f"--track {name}")


@contextlib.contextmanager
def tracking(
    names: Sequence[str], tracked: TrackedTrial, past: Sequence[StepMetrics]
) -> Iterator[Callable[[StepMetrics], None]]:
    """Report a trial to trackers.

    Args:
        names: Keys of `TRACKERS`.
        tracked: The trial.
        past: Its steps so far.

    Yields:
        A function that reports a step.
    """
    with contextlib.ExitStack() as closing:
        opened: list[Tracker] = []
        for name in names:
            opened.append(TRACKERS[name].open(tracked))
            closing.callback(opened[-1].close)

        def report(metrics: StepMetrics) -> None:
            for tracker in opened:
                if metrics.step > tracker.since:
                    tracker.log(metrics.step, scalars(metrics))

        for metrics in past:
            report(metrics)
        yield report


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """The numbers of a step by name; those of the model begin with `model/`.

    >>> scalars(StepMetrics(3, 2.5, 1.0, 1e-3, 0.2, model={"imbalance": 0.5, "loads": [1, 2]}))
    {'loss': 2.5, 'grad_norm': 1.0, 'lr': 0.001, 'seconds': 0.2, 'model/imbalance': 0.5}
    """
    row = dataclasses.asdict(metrics)
    row |= {f"model/{name}": value for name, value in row.pop("model").items()}
    del row["step"]
    return {name: value for name, value in row.items() if isinstance(value, int | float)}
