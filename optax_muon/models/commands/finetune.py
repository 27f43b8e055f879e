"""`optax-muon finetune`: a pretrained run, and prompts with their answers, to a run of its own.

The work is done in `training/finetune.py`, the file is read by `training/answers.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from optax_muon.models.commands.options import at_least, not_both
from optax_muon.models.stops import Interrupted
from optax_muon.models.training import answers
from optax_muon.models.training.answers import Answers
from optax_muon.models.training.checkpoints import Checkpoints
from optax_muon.models.training.contestants import TITLES, Contestant
from optax_muon.models.training.finetune import (
    AnswerSetup,
    Judged,
    Pretrained,
    begin,
    finetune,
    judge,
    pretrained,
)
from optax_muon.models.training.folder import Folder
from optax_muon.models.training.presets import Tuning
from optax_muon.models.training.progress import Progress
from optax_muon.models.training.run import Interrupt
from optax_muon.models.training.train import State


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train on: a run's model learns to answer prompts, its learning rate falling to 0.

    Only answers count in the loss; a twentieth of the prompts is held out. Writes a run of its own
    with config.json, metrics.jsonl and checkpoints, which `sample` and `spectra` read, and prints
    the held-out answers' loss before and after. Ctrl-C saves.
    """

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of the run to begin with: of train, finetune or import-hf."""
    data: Path
    """Prompts and answers, UTF-8: a line {"prompt": "...", "answer": "..."} for each."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Which one trains."""
    contestant: str | None = None
    """Whose parameters to begin with; the last one trained if absent."""
    name: str | None = None
    """Folder of the new run, inside `--runs`; FROM-OPTIMIZER if absent."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    epochs: int = 2
    """How often every example is seen."""
    lr: float = 5e-5
    """Learning rate of the first step; the paper's if absent."""
    decay: float = 0.1
    """Weight decay."""
    batch: int = 16
    """Examples in a step."""
    seed: int = 0
    """Seed of the order of the examples."""
    eval_every: int = 50
    """Steps between two looks at the held-out answers, each with a checkpoint."""
    resume: bool = False
    """Go on with the run in the folder, bit for bit as if it had never stopped."""
    overwrite: bool = False
    """Delete the run in the folder and start anew."""

    def __call__(self) -> None:
        """Train, then compare."""
        self.check()
        start = pretrained(self.source, self.contestant)
        examples = answers.load(self.data, start.model.config.context)
        setup, entrant = self._setup(start, examples), self._contestant
        folder = Folder(self.runs / (self.name or f"{self.source.resolve().name}-{self.optimizer}"))
        folder.claim(
            self._config(setup, entrant, examples), resume=self.resume, overwrite=self.overwrite
        )
        heading = (
            f"{self.source}: {len(examples.train)} examples, {len(examples.held_out)} held out, "
            f"{setup.steps} steps of {setup.batch}"
        )
        Console(stderr=True).out(heading, highlight=False)
        before = judge(start.model, start.params, start.bias, examples.held_out, setup.batch)
        state = train(start, setup, entrant, examples, folder)
        after = judge(start.model, state.params, state.bias, examples.held_out, setup.batch)
        console = Console()
        console.print(table(entrant.title, before, after))
        console.out(f"All of it is in {folder.path}", highlight=False)

    def check(self) -> None:
        """Refuse numbers that are too small, and options that contradict each other."""
        for name, least in (("epochs", 1), ("batch", 1), ("seed", 0), ("eval_every", 1)):
            at_least(least, name, getattr(self, name))
        not_both(resume=self.resume, overwrite=self.overwrite)

    def _setup(self, start: Pretrained, examples: Answers) -> AnswerSetup:
        steps = answers.steps(len(examples.train), self.batch, self.epochs)
        return AnswerSetup(
            start.model.config,
            self.batch,
            steps,
            self.seed,
            self.eval_every,
            len(examples.held_out),
            epochs=self.epochs,
        )

    @property
    def _contestant(self) -> Contestant:
        tuning = Tuning(self.lr, self.decay)
        return Contestant(self.optimizer, TITLES[self.optimizer], self.optimizer, tuning)

    def _config(self, setup: AnswerSetup, entrant: Contestant, examples: Answers) -> dict[str, Any]:
        """What `config.json` records."""
        return {
            "from": str(self.source),
            "contestant": self.contestant,
            "data": str(self.data),
            "fingerprint": examples.fingerprint,
            "setup": dataclasses.asdict(setup),
            "contestants": [dataclasses.asdict(entrant)],
        }


def train(
    start: Pretrained, setup: AnswerSetup, entrant: Contestant, examples: Answers, folder: Folder
) -> State:
    """Train from the newest checkpoint, or from the start, to the end.

    Returns:
        The last state.

    Raises:
        Diverged: when a loss is not finite; the checkpoints stay as they are.
        Interrupted: on Ctrl-C, after saving.
    """
    state = begin(start, setup, entrant)
    with (
        Checkpoints(folder.checkpoints(entrant.name)) as checkpoints,
        Interrupt() as interrupt,
        Progress([entrant.title], setup) as progress,
    ):
        done = checkpoints.latest
        state = checkpoints.restore(state) if done else state
        folder.journal.forget(entrant.name, after=done)
        progress.begin(entrant.title, done)
        steps = finetune(setup, entrant, examples, state, done)
        for record, state in steps:
            folder.journal.write(entrant.name, record)
            progress.step(entrant.title, record)
            if interrupt.pressed or record.val_loss is not None:
                checkpoints.save(record.step, state)
            if interrupt.pressed:
                raise Interrupted(f"stopped and saved {entrant.name} at step {record.step}")
    return state


def table(title: str, before: Judged, after: Judged) -> Table:
    """What the model made of the held-out answers."""
    made = Table(title="held-out answers", box=box.SIMPLE, collapse_padding=True)
    for heading in ("", "loss, nats per token", "exact"):
        made.add_column(heading, justify="right" if heading else "left")
    for name, found in (("before", before), (f"after {title}", after)):
        made.add_row(name, f"{found.loss:.4f}", f"{found.exact:.1%}")
    return made
