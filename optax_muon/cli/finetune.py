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

from optax_muon.cli.options import at_least, not_both
from optax_muon.errors import Interrupted
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.data import prompts
from optax_muon.training.data.prompts import PromptDataset
from optax_muon.training.finetune import (
    EvalResult,
    FinetuneConfig,
    Pretrained,
    begin,
    finetune,
    judge,
    pretrained,
)
from optax_muon.training.loop import State
from optax_muon.training.optimizers import TITLES, Trial
from optax_muon.training.presets import HyperParams
from optax_muon.training.progress import Progress
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.trainer import Interrupt


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
    trial: str | None = None
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
        start = pretrained(self.source, self.trial)
        examples = prompts.load(self.data, start.model.config.context)
        setup, trial = self._setup(start, examples), self._contestant
        folder = RunFolder(
            self.runs / (self.name or f"{self.source.resolve().name}-{self.optimizer}")
        )
        folder.claim(
            self._config(setup, trial, examples), resume=self.resume, overwrite=self.overwrite
        )
        heading = (
            f"{self.source}: {len(examples.train)} examples, {len(examples.held_out)} held out, "
            f"{setup.steps} steps of {setup.batch}"
        )
        Console(stderr=True).out(heading, highlight=False)
        before = judge(start.model, start.params, start.bias, examples.held_out, setup.batch)
        state = train(start, setup, trial, examples, folder)
        after = judge(start.model, state.params, state.bias, examples.held_out, setup.batch)
        console = Console()
        console.print(table(trial.title, before, after))
        console.out(f"All of it is in {folder.path}", highlight=False)

    def check(self) -> None:
        """Refuse numbers that are too small, and options that contradict each other."""
        for name, least in (("epochs", 1), ("batch", 1), ("seed", 0), ("eval_every", 1)):
            at_least(least, name, getattr(self, name))
        not_both(resume=self.resume, overwrite=self.overwrite)

    def _setup(self, start: Pretrained, examples: PromptDataset) -> FinetuneConfig:
        steps = prompts.steps(len(examples.train), self.batch, self.epochs)
        return FinetuneConfig(
            start.model.config,
            self.batch,
            steps,
            self.seed,
            self.eval_every,
            len(examples.held_out),
            epochs=self.epochs,
        )

    @property
    def _contestant(self) -> Trial:
        tuning = HyperParams(self.lr, self.decay)
        return Trial(self.optimizer, TITLES[self.optimizer], self.optimizer, tuning)

    def _config(
        self, setup: FinetuneConfig, trial: Trial, examples: PromptDataset
    ) -> dict[str, Any]:
        """What `config.json` records."""
        return {
            "from": str(self.source),
            "trial": self.trial,
            "data": str(self.data),
            "fingerprint": examples.fingerprint,
            "setup": dataclasses.asdict(setup),
            "trials": [dataclasses.asdict(trial)],
        }


def train(
    start: Pretrained,
    setup: FinetuneConfig,
    trial: Trial,
    examples: PromptDataset,
    folder: RunFolder,
) -> State:
    """Train from the newest checkpoint, or from the start, to the end.

    Returns:
        The last state.

    Raises:
        Diverged: when a loss is not finite; the checkpoints stay as they are.
        Interrupted: on Ctrl-C, after saving.
    """
    state = begin(start, setup, trial)
    with (
        Checkpoints(folder.checkpoints(trial.name)) as checkpoints,
        Interrupt() as interrupt,
        Progress([trial.title], setup) as progress,
    ):
        done = checkpoints.latest
        state = checkpoints.restore(state) if done else state
        folder.journal.forget(trial.name, after=done)
        progress.begin(trial.title, done)
        steps = finetune(setup, trial, examples, state, done)
        for record, state in steps:
            folder.journal.write(trial.name, record)
            progress.step(trial.title, record)
            if interrupt.pressed or record.val_loss is not None:
                checkpoints.save(record.step, state)
            if interrupt.pressed:
                raise Interrupted(f"stopped and saved {trial.name} at step {record.step}")
    return state


def table(title: str, before: EvalResult, after: EvalResult) -> Table:
    """What the model made of the held-out answers."""
    made = Table(title="held-out answers", box=box.SIMPLE, collapse_padding=True)
    for heading in ("", "loss, nats per token", "exact"):
        made.add_column(heading, justify="right" if heading else "left")
    for name, found in (("before", before), (f"after {title}", after)):
        made.add_row(name, f"{found.loss:.4f}", f"{found.exact:.1%}")
    return made
