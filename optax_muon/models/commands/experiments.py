"""`train` runs the experiment, `sweep` finds its learning rates, `sample` lets a model write.

The work is done in `training/` (`run.py`, `sweep.py`, `sample.py`), the outcome is shown by
`report.py` and `sweep_report.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from optax_muon.models.commands import report, sweep_report
from optax_muon.models.stops import UsageError
from optax_muon.models.training import data, sweep
from optax_muon.models.training.contestants import lineup
from optax_muon.models.training.family import model_of
from optax_muon.models.training.folder import Folder
from optax_muon.models.training.presets import Preset, Tuning, preset
from optax_muon.models.training.run import Run, train_all
from optax_muon.models.training.sample import continuation
from optax_muon.models.training.setup import Setup

EVAL_SEQUENCES = 128
"""16 kB at context 128, the same for all contestants; looking takes about a tenth of the time."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `train` and `sweep` have in common."""

    preset: str = "small"
    """Size of the model, the batch and the run: tiny, small, medium, base or large."""
    data: str | None = None
    """Text to learn: a file, a folder or a quoted glob; Python's own standard library if absent."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    steps: int | None = None
    """Optimizer steps of each run; the preset's own if absent."""
    batch: int | None = None
    """Sequences in a step; the preset's own if absent."""
    context: int | None = None
    """Bytes in a sequence; the preset's own if absent."""
    eval_every: int = 20
    """Steps between two looks at the held-out text."""

    def check(self) -> None:
        """Refuse counts that are too small."""
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("context", 1),
            ("eval_every", 1),
            ("seed", 0),
        ):
            _at_least(least, name, getattr(self, name))

    @property
    def row(self) -> Preset:
        """The preset with its overrides."""
        row = preset(self.preset)
        model = dataclasses.replace(row.model, context=self.context or row.model.context)
        return dataclasses.replace(
            row, model=model, batch=self.batch or row.batch, steps=self.steps or row.steps
        )

    @property
    def setup(self) -> Setup:
        """What all contestants share."""
        row = self.row
        return Setup(row.model, row.batch, row.steps, self.seed, self.eval_every, EVAL_SEQUENCES)


@dataclasses.dataclass(frozen=True)
class Train(Experiment):
    """Train one model with AdamW, with Muon at AdamW's numbers, and with Muon at its own.

    All see the same batches in the same order. Writes config.json, metrics.jsonl, checkpoints,
    loss.png and summary.md, and prints when each Muon run reached AdamW's final loss. Ctrl-C saves.
    """

    name: str | None = None
    """Folder of the run, inside `--runs`; the preset's name if absent."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    adamw_lr: float | None = None
    """Peak learning rate of AdamW and of the Muon that takes over its numbers; swept if absent."""
    adamw_decay: float | None = None
    """Weight decay of the same two; swept if absent."""
    muon_lr: float | None = None
    """Peak learning rate of Muon's own run; swept if absent."""
    muon_decay: float | None = None
    """Weight decay of Muon's own run; swept if absent."""
    save_every: int = 100
    """Steps between checkpoints, a multiple of `--eval-every`."""
    resume: bool = False
    """Go on with the run in the folder, bit for bit as if it had never stopped."""
    overwrite: bool = False
    """Delete the run in the folder and start anew."""

    def __call__(self) -> None:
        """Train, then report."""
        self.check()
        corpus = data.load(self.data, self.row.model.context)
        run = self._run(corpus)
        folder = Folder(self.runs / (self.name or self.preset))
        folder.claim(run.to_json(), resume=self.resume, overwrite=self.overwrite)
        heading = f"{report.describe(run.preset, run.setup)}\n{corpus.origin}"
        Console(stderr=True).out(heading, highlight=False)
        train_all(run, corpus, folder)
        report.publish(run, corpus.origin, folder)

    def check(self) -> None:
        """Refuse options that contradict each other."""
        super().check()
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        if self.save_every % self.eval_every:
            raise UsageError(
                f"--save-every {self.save_every} must be a multiple of --eval-every "
                f"{self.eval_every}: only evaluated parameters are saved"
            )

    def _run(self, corpus: data.Corpus) -> Run:
        row = self.row
        adamw = _override(row.adamw, self.adamw_lr, self.adamw_decay)
        muon = _override(row.muon, self.muon_lr, self.muon_decay)
        contestants = lineup(adamw, muon)
        return Run(
            self.preset, self.data, corpus.fingerprint, self.setup, contestants, self.save_every
        )


@dataclasses.dataclass(frozen=True)
class Sweep(Experiment):
    """Find the learning rate and weight decay of AdamW and of Muon, with the same budget.

    Every point is one whole training run. Writes sweep.csv line by line, then sweep.md and
    sweep.png; the same command goes on after the last finished point.
    """

    out: Path = Path("runs/sweep")
    """Folder of the result."""
    adamw_lr: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    """Peak learning rates to try with AdamW."""
    muon_lr: tuple[float, ...] = (6e-3, 1.2e-2, 2.4e-2)
    """Peak learning rates to try with Muon, as many as with AdamW."""
    decay: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Weight decays to try with each."""

    def __call__(self) -> None:
        """Run the missing points, then report."""
        self.check()
        points = sweep.grid({"adamw": self.adamw_lr, "muon": self.muon_lr}, self.decay)
        corpus = data.load(self.data, self.row.model.context)
        # Only the final loss counts, so the held-out text is looked at once.
        setup = dataclasses.replace(self.setup, eval_every=self.row.steps)
        folder = Folder(self.out)
        config = {"setup": dataclasses.asdict(setup), "fingerprint": corpus.fingerprint}
        folder.claim(config, resume=folder.config.exists(), overwrite=False)
        table = sweep.Table(self.out / "sweep.csv")
        sweep.run_all(setup, corpus, points, table)
        sweep_report.publish(table.read(), report.describe(self.preset, setup), self.out)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Write on from a prompt with a trained model."""

    run: str = "small"
    """Name of the run."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    contestant: str | None = None
    """Whose parameters: adamw, muon-carried or muon-tuned; the last one trained if absent."""
    prompt: str = "def "
    """Text to go on from; an empty one is the beginning of a file."""
    length: int = 400
    """Bytes to write."""
    temperature: float = 0.7
    """Divides the logits; 0 always takes the likeliest byte."""
    seed: int = 0
    """Seed of the draws."""

    def __call__(self) -> None:
        """Print the prompt and its continuation."""
        _at_least(1, "length", self.length)
        _at_least(0, "temperature", self.temperature)
        folder = Folder(self.runs / self.run)
        config = folder.read_config()
        model = model_of(config)
        names = [self.contestant] if self.contestant else [c["name"] for c in config["contestants"]]
        params = folder.newest_params(names)
        prompt = self.prompt.encode()
        text = continuation(model, params, prompt, self.length, self.temperature, self.seed)
        Console().out((prompt + text).decode(errors="replace"), highlight=False)


def _at_least(least: float, name: str, value: float | None) -> None:
    if value is not None and value < least:
        option = name.replace("_", "-")
        raise UsageError(f"--{option} is {value}, it must be at least {least}")


def _override(tuning: Tuning, lr: float | None, weight_decay: float | None) -> Tuning:
    """The preset's numbers, but for those that are given."""
    return Tuning(
        tuning.lr if lr is None else lr,
        tuning.weight_decay if weight_decay is None else weight_decay,
    )
