"""`train` runs the experiment, `sweep` finds its learning rates, `sample` lets a model write.

The work is done in `training/` (`run.py`, `sweep.py`, `sample.py`), the outcome is shown by
`training.py` and `sweep.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import optax
import tyro
from rich.console import Console

import optax_muon
from optax_muon.cli.options import at_least, not_both
from optax_muon.cli.reports import sweep as sweep_report
from optax_muon.cli.reports import training as training_report
from optax_muon.errors import UsageError
from optax_muon.models import spec
from optax_muon.models.llama import LlamaConfig
from optax_muon.models.spec import Config
from optax_muon.training import distributed, sweep
from optax_muon.training.config import TrainConfig
from optax_muon.training.data import corpus as data
from optax_muon.training.data.corpus import Corpus
from optax_muon.training.devices import Devices, parse
from optax_muon.training.generate import continuation
from optax_muon.training.initialize import PretrainedSource
from optax_muon.training.loop import shapes
from optax_muon.training.optimizers import comparison, views
from optax_muon.training.presets import PRESETS, HyperParams, Preset, preset
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.trainer import RunConfig, train_all

EVAL_SEQUENCES = 128
"""16 kB at context 128, the same for all trials; looking takes about a tenth of the time."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `train` and `sweep` have in common."""

    model: Annotated[str, tyro.conf.arg(aliases=["--preset"])] = "small"
    """What to train, and with it the batch, the steps, the learning rates and the schedule. A
    Llama: tiny, small, medium, base or large. A mixture of experts as in the paper: moonlight-tiny,
    moonlight-small or moonlight-16b-a3b. All of them recompute layers in the backward pass."""
    data: str | None = None
    """Text to learn: a file, a folder or a quoted glob, as bytes; or a .npy file of integer tokens,
    which stays on disk. Python's own standard library if absent."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    steps: int | None = None
    """Optimizer steps of each run; the model's own if absent."""
    batch: int | None = None
    """Sequences in a step; the model's own if absent."""
    context: int | None = None
    """Tokens in a sequence; the model's own if absent."""
    eval_every: int = 20
    """Steps between two looks at the held-out text."""
    schedule: Literal["cosine", "three-stage"] | None = None
    """Of the learning rate. cosine: up for a tenth of the steps, down to a tenth of the peak.
    three-stage: the paper's, at the same parts of the run: up, down along a cosine, up again and
    down to zero; the batch doubles early. The model's own if absent."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the matrix products; parameters and optimizer state are float32 always. The model's own
    if absent."""
    per_head: bool = False
    """Give Muon a matrix per attention head, where else it has one per layer."""
    bias_update_speed: float | None = None
    """How far an expert's bias moves in a step towards balance; the model's own if absent."""
    qk_clip: float | None = None
    """Scale back queries and keys of heads whose largest attention logit is above this; the paper
    of the method takes 100. Off if absent. Moonlights only."""
    mesh: str | None = None
    """Devices to share the work, as axes and sizes: data=2,fsdp=2,expert=2. data holds copies of
    the parameters, fsdp parts of them, expert the experts, tensor heads and hidden units. The sizes
    multiply to the number of devices. One device if absent."""
    accumulate: int = 1
    """Micro-batches that a step's batch is worked through in, for less memory; the result is the
    same."""

    def check(self) -> None:
        """Refuse counts that are too small, and what the model does not have."""
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("context", 1),
            ("eval_every", 1),
            ("seed", 0),
            ("accumulate", 1),
            ("bias_update_speed", 0),
        ):
            at_least(least, name, getattr(self, name))
        if self.qk_clip is not None and not self.qk_clip > 0:
            raise UsageError(f"--qk-clip is {self.qk_clip:g}, it must be positive")
        if isinstance(self.row.model, LlamaConfig):
            for name, needed in (
                ("bias_update_speed", "a router"),
                ("qk_clip", "a report of its attention logits"),
            ):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"--{name.replace('_', '-')} needs a model with {needed}: --model "
                        f"moonlight-...; {self.model} is a Llama"
                    )

    @property
    def row(self) -> Preset:
        """The preset with its overrides."""
        row = preset(self.model)
        sizes = self.sizes(row)
        sizes = dataclasses.replace(
            sizes, context=self.context or sizes.context, dtype=self.dtype or sizes.dtype
        )
        return dataclasses.replace(
            row,
            model=sizes,
            batch=self.batch or row.batch,
            steps=self.steps or row.steps,
            schedule=self.schedule or row.schedule,
            bias_update_speed=row.bias_update_speed
            if self.bias_update_speed is None
            else self.bias_update_speed,
        )

    def sizes(self, row: Preset) -> Config:
        """The sizes of the model, before `--context` and `--dtype`."""
        return row.model

    @property
    def setup(self) -> TrainConfig:
        """What all trials share."""
        row = self.row
        return TrainConfig(
            row.model,
            row.batch,
            row.steps,
            self.seed,
            self.eval_every,
            EVAL_SEQUENCES,
            row.schedule,
            row.bias_update_speed,
            self.qk_clip,
            self.per_head,
        )

    @property
    def corpus(self) -> Corpus:
        """The text."""
        model = self.row.model
        return data.load(self.data, model.context, model.vocab_size)

    def place(self) -> Devices:
        """The devices; asks for them, so after `distributed.start`.

        Raises:
            UsageError: when the mesh is none of these devices, or something does not divide.
        """
        place = Devices(None if self.mesh is None else parse(self.mesh), self.accumulate)
        place.check(spec.model(self.row.model), self.row.batch)
        return place


@dataclasses.dataclass(frozen=True)
class Train(Experiment):
    """Train one model with AdamW, with Muon at AdamW's numbers, and with Muon at its own.

    All see the same batches in the same order. Writes config.json, metrics.jsonl, checkpoints,
    routing.txt (which parameter is Muon's, and why), loss.png and summary.md, and prints when each
    Muon run reached AdamW's final loss. Ctrl-C saves.

    On several machines start the same command on each, with --distributed and --mesh; they need a
    folder in common. A TPU pod: gcloud compute tpus tpu-vm ssh NAME --worker=all --command="...".
    SLURM: srun --ntasks-per-node=GPUS optax-muon train --distributed --mesh data=4,fsdp=8.
    """

    name: str | None = None
    """Folder of the run, inside `--runs`; the model's name if absent."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Begin with the newest parameters of this run, or of a folder that import-hf has made, and
    with its sizes; batch, steps and rates are those of --model."""
    optimizer: Literal["adamw", "muon"] | None = None
    """Train one of them alone, at its own numbers; all are compared if absent."""
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
    keep_every: int | None = None
    """Steps between checkpoints that stay for good, a multiple of `--save-every`: `spectra` shows
    them. The last two stay in any case."""
    distributed: bool = False
    """This is one of several processes that train together; the environment says which (TPU pods,
    SLURM, Open MPI, Kubernetes). Needs `--mesh`."""
    resume: bool = False
    """Go on with the run in the folder, bit for bit as if it had never stopped; with another --mesh
    or --accumulate, to rounding."""
    overwrite: bool = False
    """Delete the run in the folder and start anew."""

    def __call__(self) -> None:
        """Train, then report."""
        self.check()
        if self.distributed:
            distributed.start()
        placement, corpus = self.place(), self.corpus
        run = self._run(corpus)
        folder = RunFolder(self.runs / (self.name or self.model))
        distributed.first(lambda: self._claim(folder, run, f"{corpus.origin}\non {placement}"))
        with placement.ambient:
            train_all(run, corpus, folder, placement)
            seconds = training_report.update_times(run, placement)
        if distributed.is_first():
            training_report.publish(run, corpus.origin, folder, seconds)

    def check(self) -> None:
        """Refuse options that contradict each other."""
        super().check()
        not_both(resume=self.resume, overwrite=self.overwrite)
        if self.distributed and self.mesh is None:
            raise UsageError("--distributed needs --mesh, which says how devices share the work")
        if self.save_every % self.eval_every:
            raise UsageError(
                f"--save-every {self.save_every} must be a multiple of --eval-every "
                f"{self.eval_every}: only evaluated parameters are saved"
            )
        at_least(1, "keep_every", self.keep_every)
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise UsageError(
                f"--keep-every {self.keep_every} must be a multiple of --save-every "
                f"{self.save_every}: only what is saved can be kept"
            )

    def sizes(self, row: Preset) -> Config:
        """Those of the run that this one begins with, if it does."""
        if self.start is None:
            return row.model
        given, own = PretrainedSource(self.start).model, spec.model(row.model)
        if given.kind != own.kind:
            fits = type(given.config)
            fitting = [name for name, each in PRESETS.items() if type(each.model) is fits]
            raise UsageError(
                f"--from {self.start} is a {given.kind} and --model {self.model} a {own.kind}; "
                f"give the batch, steps and rates of one of {', '.join(fitting)}"
            )
        return given.config

    def _claim(self, folder: RunFolder, run: RunConfig, origin: str) -> None:
        """Make the folder this run's own, and say what begins."""
        folder.claim(run.to_json(), resume=self.resume, overwrite=self.overwrite)
        params = shapes(spec.model(run.setup.model), optax.identity()).params
        labels = optax_muon.label(params, views(run.setup))
        (folder.path / "routing.txt").write_text(f"{labels}\n")
        heading = f"{training_report.describe(run.preset, run.setup)}\n{origin}"
        Console(stderr=True).out(heading, highlight=False)

    def _run(self, corpus: Corpus) -> RunConfig:
        row = self.row
        adamw = _override(row.adamw, self.adamw_lr, self.adamw_decay)
        muon = _override(row.muon, self.muon_lr, self.muon_decay)
        return RunConfig(
            self.model,
            self.data,
            corpus.fingerprint,
            self.setup,
            comparison(adamw, muon, self.optimizer),
            self.save_every,
            None if self.start is None else str(self.start),
            self.keep_every,
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
        placement, corpus = self.place(), self.corpus
        # Only the final loss counts, so the held-out text is looked at once.
        setup = dataclasses.replace(self.setup, eval_every=self.row.steps)
        folder = RunFolder(self.out)
        config = {"setup": dataclasses.asdict(setup), "fingerprint": corpus.fingerprint}
        folder.claim(config, resume=folder.config.exists(), overwrite=False)
        table = sweep.Table(self.out / "sweep.csv")
        with placement.ambient:
            sweep.run_all(setup, corpus, points, table, placement)
        heading = training_report.describe(self.model, setup)
        sweep_report.publish(table.read(), heading, setup.unit, self.out)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Write on from a prompt with a trained model."""

    run: str = "small"
    """Name of the run."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    trial: str | None = None
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
        at_least(1, "length", self.length)
        at_least(0, "temperature", self.temperature)
        start = PretrainedSource(self.runs / self.run, self.trial)
        params, bias = start.weights()
        prompt = self.prompt.encode()
        text = continuation(
            start.model, params, bias, prompt, self.length, self.temperature, self.seed
        )
        Console().out((prompt + text).decode(errors="replace"), highlight=False)


def _override(tuning: HyperParams, lr: float | None, weight_decay: float | None) -> HyperParams:
    """The preset's numbers, but for those that are given."""
    return HyperParams(
        tuning.lr if lr is None else lr,
        tuning.weight_decay if weight_decay is None else weight_decay,
    )
