"""One run: every contestant trained in turn, watched, written down, saved, and able to go on."""

from __future__ import annotations

import dataclasses
import signal
from types import FrameType, TracebackType
from typing import Any

from optax_muon.models.stops import Interrupted
from optax_muon.models.training.checkpoints import Checkpoints
from optax_muon.models.training.contestants import Contestant, transformation
from optax_muon.models.training.data import Corpus
from optax_muon.models.training.folder import Folder
from optax_muon.models.training.progress import Progress
from optax_muon.models.training.setup import Setup
from optax_muon.models.training.train import Record, State, init, train


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
    """

    preset: str
    data: str | None
    fingerprint: str
    setup: Setup
    contestants: tuple[Contestant, ...]
    save_every: int

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)


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
    """

    run: Run
    corpus: Corpus
    folder: Folder
    progress: Progress
    interrupt: Interrupt

    def train(self, contestant: Contestant) -> None:
        """Train one contestant from its newest checkpoint, or from the start, to the end.

        Raises:
            Diverged: when a loss is not finite; the checkpoints stay as they are.
            Interrupted: on Ctrl-C, after saving.
        """
        with Checkpoints(self.folder.checkpoints(contestant.name)) as checkpoints:
            state, done = self._begin(contestant, checkpoints)
            steps = train(self.run.setup, contestant, self.corpus, state, done)
            for record, state in steps:
                self.folder.journal.write(contestant.name, record)
                self.progress.step(contestant.title, record)
                if self.interrupt.pressed or self._is_due(record):
                    checkpoints.save(record.step, state)
                if self.interrupt.pressed:
                    raise Interrupted(f"stopped and saved {contestant.name} at step {record.step}")

    def _begin(self, contestant: Contestant, checkpoints: Checkpoints) -> tuple[State, int]:
        """The state to go on from and its step."""
        done = checkpoints.latest
        self.folder.journal.forget(contestant.name, after=done)
        self.progress.begin(contestant.title, done)
        state = init(self.run.setup, transformation(contestant, self.run.setup))
        return (checkpoints.restore(state) if done else state), done

    def _is_due(self, record: Record) -> bool:
        """Whether to save: only where the held-out loss has just shown these parameters good."""
        last = record.step == self.run.setup.steps
        return record.val_loss is not None and (last or record.step % self.run.save_every == 0)


def train_all(run: Run, corpus: Corpus, folder: Folder) -> None:
    """Train what is not trained yet; raises as `Trainer.train` does."""
    titles = [contestant.title for contestant in run.contestants]
    with Interrupt() as interrupt, Progress(titles, run.setup) as progress:
        trainer = Trainer(run, corpus, folder, progress, interrupt)
        for contestant in run.contestants:
            trainer.train(contestant)
