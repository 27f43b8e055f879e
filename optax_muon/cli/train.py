"""`optax-muon train` runs the experiment.

The work is done in `training/trainer.py`, the result is shown by `reports/training.py`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import jax
import optax
import tyro
from rich.console import Console

import optax_muon
from optax_muon.cli.options import DeviceOptions, RunOptions, at_least, single_values
from optax_muon.cli.reports import training as report
from optax_muon.errors import UsageError
from optax_muon.models import spec
from optax_muon.models.spec import Config
from optax_muon.platforms import slow_bfloat16
from optax_muon.training import distributed
from optax_muon.training.config import TrainConfig
from optax_muon.training.data import tokenizer
from optax_muon.training.data.corpus import Corpus, load_corpus, vocabulary
from optax_muon.training.initialize import PretrainedSource
from optax_muon.training.optimizers import DEFAULT, comparison, views
from optax_muon.training.presets import PRESETS, Preset, preset
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import RunFolder, usage_errors
from optax_muon.training.state import shapes
from optax_muon.training.trainer import train_all

EVAL_SEQUENCES = 128
"""16 kB at context 128, the same for all trials; evaluating takes about a tenth of the time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(DeviceOptions):
    """What `train` and `sweep` have in common."""

    model: Annotated[str, tyro.conf.arg(aliases=["--preset"])] = "small"
    """The preset to train: its model, batch, steps, hyperparameters and schedule. A Llama: tiny,
    small, medium, base or large. A mixture of experts as in the paper: moonlight-tiny,
    moonlight-small or moonlight-16b-a3b. All of them recompute layers in the backward pass."""
    data: str | None = None
    """Text to learn, as bytes: a file, a folder or a quoted glob; or in tokens, which stay on disk:
    the folder that tokenize has made, whose vocabulary becomes the model's, or a .npy file of
    integers. Python's own standard library by default."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    steps: int | None = None
    """Optimizer steps of each run; the preset's by default."""
    batch: int | None = None
    """Sequences in a step; the preset's by default."""
    context: int | None = None
    """Tokens in a sequence; the preset's by default."""
    eval_every: int = 20
    """Steps between two evaluations on held-out text."""
    schedule: Literal["cosine", "three-stage"] | None = None
    """Schedule of the learning rate. cosine: up for a tenth of the steps, down to a tenth of the
    peak. three-stage: the paper's, at the same fractions of the run: up, down along a cosine, up
    again and down to zero; the batch doubles early. The preset's by default."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the matrix products; parameters and optimizer state are always float32. The preset's
    by default. On a CPU, bfloat16 pays only if it has the instructions: `lscpu | grep -E
    'avx512_bf16|amx_bf16'` on x86, `lscpu | grep bf16` on ARM."""
    per_head: bool = False
    """Give Muon one matrix per attention head instead of one per layer."""
    bias_update_speed: float | None = None
    """Change of an expert's router bias in a step, towards balance; the preset's by default."""
    qk_clip: float | None = None
    """Scale down the queries and keys of every head whose largest attention logit exceeds this; the
    paper that introduced it takes 100. Off by default. For Moonlights only."""

    def check(self) -> None:
        """Check that no number is too small.

        Raises:
            UsageError: When one is.
        """
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
        if self.qk_clip is not None and not 0 < self.qk_clip < math.inf:
            raise UsageError(f"--qk-clip is {self.qk_clip:g}; it must be positive and finite")

    def check_model(self) -> None:
        """Check that the model has what the options need.

        Raises:
            UsageError: When it does not.
        """
        model = spec.model(self.row.model)
        for option, value, needed, has in (
            ("bias-update-speed", self.bias_update_speed, "a router", model.has_router),
            ("qk-clip", self.qk_clip, "statistics of its attention logits", model.reports_logits),
        ):
            if value is not None and not has:
                raise UsageError(
                    f"--{option} needs a model with {needed}, --model moonlight-...; {self.model} "
                    f"is a {model.kind}"
                )

    @property
    def row(self) -> Preset:
        """The preset with its overrides."""
        row = preset(self.model)
        sizes = self.sizes(row)
        with usage_errors():
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
        vocab = vocabulary(self.data)
        return row.model if vocab is None else dataclasses.replace(row.model, vocab_size=vocab)

    @property
    def config(self) -> TrainConfig:
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

    def task(self, config: TrainConfig) -> Pretraining:
        """What is learned; initializes the devices.

        Raises:
            UsageError: When the devices, the model or the text do not fit the options.
        """
        self.check_model()
        devices = self.devices(spec.model(config.model), config.batch)
        corpus = load_corpus(self.data, config.model.context, config.model.vocab_size)
        return Pretraining(config, corpus, devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Experiment, RunOptions):
    """Train one model with several optimizers and compare them.

    By default: AdamW, Muon at AdamW's hyperparameters, and Muon at its own. All see the same
    batches in the same order. Writes config.json, metrics.jsonl, checkpoints, routing.txt (which
    parameters Muon trains, and why), loss.png and summary.md, and prints when each run reached the
    final loss of the first optimizer. Ctrl-C saves.

    On several machines, start the same command on each, with --distributed and --mesh, in a shared
    folder. A TPU pod: gcloud compute tpus tpu-vm ssh NAME --worker=all --command="...".
    SLURM: srun --ntasks-per-node=8 optax-muon train --model base --distributed --mesh fsdp=32.
    """

    name: str | None = None
    """Folder of the run, inside --runs; the preset's name by default."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Start from the newest parameters of this run, or of a folder made by import-hf. The sizes of
    the model are then those of the run; batch, steps and hyperparameters are still --model's."""
    optimizers: tuple[str, ...] = DEFAULT
    """Optimizers to train, one after the other: adamw, muon-carried (Muon at AdamW's
    hyperparameters), muon, muon-adamw-router (routers on AdamW), normuon, lion. The first one is
    the baseline of the comparison; one that would repeat an earlier one is skipped."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Hyperparameters that replace the preset's, such as muon.lr=1.2e-2 adamw.weight_decay=0.1.
    Optimizers without hyperparameters of their own in the preset follow those of another one:
    muon-carried and lion follow adamw, normuon follows muon."""
    save_every: int = 100
    """Steps between checkpoints, a multiple of --eval-every."""
    keep_every: int | None = None
    """Steps between checkpoints that are kept for good, a multiple of --save-every; spectra reads
    them. The last two checkpoints are always kept; by default, only those."""

    def __call__(self) -> None:
        """Train, then report."""
        self.check()
        self.start()
        task = self.task(self.config)
        run = self._run(task.config, task.corpus)
        folder = self.folder(self.name or self.model)
        distributed.on_main_process(lambda: self._create(folder, run, task))
        with task.devices.mesh_context():
            train_all(run, task, folder, task.devices, self.traced, self.track)
            seconds = report.update_times(run, task.devices)
        if distributed.is_main_process():
            report.publish(run, task.corpus.origin, folder, seconds)

    def check(self) -> None:
        """Check that the options fit each other.

        Raises:
            UsageError: When they do not.
        """
        super().check()
        self.check_run()
        at_least(1, "save_every", self.save_every)
        if self.save_every % self.eval_every:
            raise UsageError(
                f"--save-every {self.save_every} must be a multiple of --eval-every "
                f"{self.eval_every}: only evaluated parameters are saved"
            )
        at_least(1, "keep_every", self.keep_every)
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise UsageError(
                f"--keep-every {self.keep_every} must be a multiple of --save-every "
                f"{self.save_every}: only saved parameters can be kept"
            )

    def sizes(self, row: Preset) -> Config:
        """Those of the run that this one starts from, if any."""
        if self.source is None:
            return super().sizes(row)
        given, own = PretrainedSource(self.source).model, spec.model(row.model)
        if given.kind != own.kind:
            fitting = [
                name for name, each in PRESETS.items() if spec.model(each.model).kind == given.kind
            ]
            raise UsageError(
                f"--from {self.source} is a {given.kind} and --model {self.model} a {own.kind}; "
                f"give the batch, steps and hyperparameters of one of {', '.join(fitting)}"
            )
        return given.config

    def _tokenizer(self, corpus: Corpus) -> Path | None:
        """The folder of the tokenizer of the data and of the run that this one starts from.

        Raises:
            UsageError: They are two.
        """
        if self.source is None or not (start := RunFolder(self.source)).has_tokenizer:
            return corpus.tokenizer
        if corpus.tokenizer is None and (self.data is None or not self.data.endswith(".npy")):
            raise UsageError(
                f"--from {self.source} has a tokenizer and --data is raw text; tokenize it first: "
                f"optax-muon tokenize FILES --tokenizer {start.tokenizer} --out TOKENS"
            )
        if corpus.tokenizer and not tokenizer.is_same(corpus.tokenizer, start.tokenizer):
            raise UsageError(
                f"--from {self.source} and --data {self.data} have different tokenizers; make the "
                f"tokens with tokenize --tokenizer {start.tokenizer}"
            )
        return start.tokenizer

    def _create(self, folder: RunFolder, run: RunConfig, task: Pretraining) -> None:
        """Create the folder or resume in it, and print what is to be trained."""
        tokens = self._tokenizer(task.corpus)
        folder.create_or_resume(
            run.to_json(), resume=self.resume, overwrite=self.overwrite, source=self.source
        )
        params = shapes(spec.model(task.config.model), optax.identity()).params
        labels = optax_muon.label(params, views(task.config))
        (folder.path / "routing.txt").write_text(f"{labels}\n", encoding="utf-8")
        if tokens is not None:
            tokenizer.copy(tokens, folder.tokenizer)
        description = report.describe(self.model, task.config)
        heading = f"{description}\n{task.corpus.origin}\non {task.devices}"
        if remark := slow_bfloat16(jax.default_backend(), task.config.model.dtype):
            heading += f"\n{remark}"
        Console(stderr=True).out(heading + self.tracker_hints(folder), highlight=False)

    def _run(self, config: TrainConfig, corpus: Corpus) -> RunConfig:
        tuned, overrides = self.row.hyper_params, single_values(self.overrides)
        return RunConfig(
            self.model,
            self.data,
            corpus.fingerprint,
            config,
            comparison(self.optimizers, tuned, overrides),
            self.save_every,
            None if self.source is None else str(self.source),
            keep_every=self.keep_every,
        )
