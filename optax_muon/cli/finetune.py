"""`optax-muon finetune` fine-tunes a trained model on prompt-completion pairs.

The work is done in `training/finetune.py` and `training/trainer.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from optax_muon.cli.options import RunOptions, at_least, single_values
from optax_muon.cli.reports.tables import terminal_table
from optax_muon.training import distributed
from optax_muon.training.data import tokenizer
from optax_muon.training.data.prompts import PromptDataset, load_prompts
from optax_muon.training.finetune import EvalResult, Finetuning, finetune_config
from optax_muon.training.initialize import PretrainedSource
from optax_muon.training.optimizers import HyperParams, comparison
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.trainer import train_all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(RunOptions):
    """Fine-tune a trained model on prompt-completion pairs.

    Only completions count in the loss; a twentieth of the prompts is held out. The learning rate
    falls linearly to 0. Writes a run of its own with config.json, metrics.jsonl and checkpoints,
    which sample, spectra and export-hf read, and prints the loss of the held-out completions before
    and after. Ctrl-C saves.
    """

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of the run to start from, made by train, finetune or import-hf."""
    data: Path
    """Prompt-completion pairs, UTF-8: one line {"prompt": "...", "completion": "..."} each, in the
    tokens of the run: those of its tokenizer, or bytes."""
    raw: bool = False
    """Leave out the chat template of the tokenizer. With it a prompt is the turn of a user, and a
    completion that of the assistant."""
    trial: str | None = None
    """Optimizer of that run whose parameters to start from; by default the last one that has a
    checkpoint."""
    optimizers: tuple[str, ...] = ("muon",)
    """Optimizers to fine-tune with, each from the same parameters: adamw, muon, normuon, lion."""
    lr: float = 5e-5
    """Learning rate of the first step; the default is the paper's, for 16 billion parameters. Small
    models want more: 1.4e-3 to 5.6e-3 is best for the preset small."""
    weight_decay: float = 0.1
    """Weight decay."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Hyperparameters of one optimizer, in place of --lr and --weight-decay: muon.lr=1e-4."""
    name: str | None = None
    """Folder of the new run, inside --runs. By default the names of the run it starts from and of
    the optimizers, such as small-muon."""
    epochs: int = 2
    """Number of passes over the examples."""
    batch: int = 16
    """Examples in a step."""
    seed: int = 0
    """Seed of the order of the examples."""
    eval_every: int = 50
    """Steps between two evaluations on held-out completions, each with a checkpoint."""

    def __call__(self) -> None:
        """Train, then compare."""
        self.check()
        self.start()
        task = self._task()
        run = self._run(task)
        names = "-".join([self.source.resolve().name, *(trial.name for trial in run.trials)])
        folder = self.folder(self.name or names)
        distributed.on_main_process(lambda: self._create(folder, run, task))
        with task.devices.mesh_context():
            found = {"before": _evaluate(task, PretrainedSource(self.source, self.trial))}
            train_all(run, task, folder, task.devices, self.traced, self.track)
            for trial in run.trials:
                source = PretrainedSource(folder.path, trial.name)
                found[f"after {trial.title}"] = _evaluate(task, source)
        if distributed.is_main_process():
            console = Console()
            console.print(terminal_table("held-out completions", rows(found)))
            console.out(f"Results are in {folder.path}", highlight=False)

    def check(self) -> None:
        """Check that no number is too small, and that the options fit each other.

        Raises:
            UsageError: When one is, or they do not.
        """
        for name, least in (("epochs", 1), ("batch", 1), ("seed", 0), ("eval_every", 1)):
            at_least(least, name, getattr(self, name))
        self.check_run()

    def _task(self) -> Finetuning:
        source = PretrainedSource(self.source, self.trial)
        model = source.model
        dataset = load_prompts(self.data, model.config.context, source.tokenizer, raw=self.raw)
        numbers = {"batch": self.batch, "epochs": self.epochs, "seed": self.seed}
        config = finetune_config(model, dataset, **numbers, eval_every=self.eval_every)
        return Finetuning(config, dataset, self.devices(model, self.batch))

    def _run(self, task: Finetuning) -> RunConfig:
        tuned = {name: HyperParams(self.lr, self.weight_decay) for name in self.optimizers}
        return RunConfig(
            None,
            str(self.data),
            task.dataset.fingerprint,
            task.config,
            comparison(self.optimizers, tuned, single_values(self.overrides)),
            self.eval_every,
            str(self.source),
            self.trial,
        )

    def _create(self, folder: RunFolder, run: RunConfig, task: Finetuning) -> None:
        """Create the folder or resume in it, and print what is to be trained."""
        PretrainedSource(self.source, self.trial).check()
        folder.create_or_resume(
            run.to_json(), resume=self.resume, overwrite=self.overwrite, source=self.source
        )
        if (start := RunFolder(self.source)).has_tokenizer:
            tokenizer.copy(start.tokenizer, folder.tokenizer)
        heading = f"{self.source}: {_describe(task.dataset)}, {task.config.steps} steps of"
        where = f"on {task.devices}{self.tracker_hints(folder)}"
        Console(stderr=True).out(f"{heading} {self.batch}\n{where}", highlight=False)


def rows(found: Mapping[str, EvalResult]) -> list[list[str]]:
    """The results by name, under a heading."""
    return [
        ["", "loss, nats per token", "exact"],
        *([name, f"{result.loss:.4f}", f"{result.exact:.1%}"] for name, result in found.items()),
    ]


def _evaluate(task: Finetuning, source: PretrainedSource) -> EvalResult:
    return task.evaluate(*source.weights(task.devices.mesh))


def _describe(dataset: PromptDataset) -> str:
    return f"{len(dataset.train)} examples, {len(dataset.held_out)} held out"
