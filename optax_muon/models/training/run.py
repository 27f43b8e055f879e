"""One run: every contestant trained in turn, watched, written down, saved, and able to go on."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax

from optax_muon.models.stops import Interrupted
from optax_muon.models.training import family, processes
from optax_muon.models.training.begin import Start, begin
from optax_muon.models.training.checkpoints import Checkpoints, Keep
from optax_muon.models.training.contestants import Contestant, transformation
from optax_muon.models.training.data import Corpus
from optax_muon.models.training.folder import Folder
from optax_muon.models.training.placement import ALONE, Placement
from optax_muon.models.training.progress import Progress
from optax_muon.models.training.setup import Setup
from optax_muon.models.training.train import Record, State, abstract, shapes, train


@dataclasses.dataclass(frozen=True)
class Run:
    """What `config.json` records.

    Attributes:
        preset: the row of `presets.PRESETS` it started from.
        data: the user's file, folder or glob; None is the standard library.
        fingerprint: of the corpus, so that no run goes on with other text.
        setup: what all contestants share.
        contestants: the optimizers and their numbers.
        save_every: steps between checkpoints.
        start: folder of the run whose parameters it begins with; None begins at random.
        keep_every: steps between checkpoints that stay; None keeps the newest ones only.
    """

    preset: str
    data: str | None
    fingerprint: str
    setup: Setup
    contestants: tuple[Contestant, ...]
    save_every: int
    start: str | None = None
    keep_every: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    def settings(self, contestant: Contestant) -> dict[str, Any]:
        """What has to be the same to go on from a checkpoint."""
        return {
            "setup": dataclasses.asdict(self.setup),
            "contestant": dataclasses.asdict(contestant),
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
    """Trains the contestants of one run.

    Attributes:
        run: what was asked for.
        corpus: the text.
        folder: where everything is written.
        progress: what the user sees meanwhile.
        interrupt: whether the user wants to stop.
        placement: devices and micro-batches.
    """

    run: Run
    corpus: Corpus
    folder: Folder
    progress: Progress
    interrupt: Interrupt
    placement: Placement = ALONE

    def train(self, contestant: Contestant) -> None:
        """Train one contestant from its newest checkpoint, or from the start, to the end.

        Raises:
            Diverged: when a loss is not finite; the checkpoints stay as they are.
            Interrupted: on Ctrl-C, after saving.
        """
        path, settings = self.folder.checkpoints(contestant.name), self.run.settings(contestant)
        with Checkpoints(path, Keep(every=self.run.keep_every), settings) as checkpoints:
            state, done = self._begin(contestant, checkpoints)
            setup, placement = self.run.setup, self.placement
            steps = train(setup, contestant, self.corpus, state, done, placement)
            for record, state in steps:
                if processes.is_first():
                    self.folder.journal.write(contestant.name, record)
                self.progress.step(contestant.title, record)
                stop = self._is_stopped(record)
                if stop or self._is_due(record):
                    checkpoints.save(record.step, state, self._position(record))
                if stop:
                    raise Interrupted(f"stopped and saved {contestant.name} at step {record.step}")

    def _begin(self, contestant: Contestant, checkpoints: Checkpoints) -> tuple[State, int]:
        """The state to go on from and its step."""
        done, setup, mesh = checkpoints.latest, self.run.setup, self.placement.mesh
        if processes.is_first():
            self.folder.journal.forget(contestant.name, after=done)
        self.progress.begin(contestant.title, done)
        tx = transformation(contestant, setup)
        if done:
            model = family.model(setup.model)
            like = shapes(model, tx) if mesh is None else abstract(model, tx, mesh)
            return checkpoints.restore(like), done
        start = None if self.run.start is None else Start(Path(self.run.start))
        return begin(setup, tx, mesh, start), done

    def _is_stopped(self, record: Record) -> bool:
        """Whether the user wants to stop; several processes agree on it where they evaluate."""
        if jax.process_count() == 1:
            return self.interrupt.pressed
        return record.val_loss is not None and processes.any_of(self.interrupt.pressed)

    def _is_due(self, record: Record) -> bool:
        """Whether to save: only where the held-out loss has just shown these parameters good."""
        last = record.step == self.run.setup.steps
        return record.val_loss is not None and (last or record.step % self.run.save_every == 0)

    def _position(self, record: Record) -> dict[str, Any]:
        """Where the data is; it is a function of the seed and the step."""
        setup = self.run.setup
        tokens = int(setup.sequences(record.step)) * setup.model.context
        return {"seed": setup.seed, "tokens": tokens}


def train_all(run: Run, corpus: Corpus, folder: Folder, placement: Placement = ALONE) -> None:
    """Train what is not trained yet; the placement's mesh is ambient.

    Raises:
        Diverged: as `Trainer.train`.
        Interrupted: as `Trainer.train`.
    """
    titles = [contestant.title for contestant in run.contestants]
    hidden = not processes.is_first()
    with Interrupt() as interrupt, Progress(titles, run.setup, hidden=hidden) as progress:
        trainer = Trainer(run, corpus, folder, progress, interrupt, placement)
        for contestant in run.contestants:
            trainer.train(contestant)
