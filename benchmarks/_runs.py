"""Training runs as rows of a table: which ones are still needed, and worker processes that do them.

An experiment is a function from the finished runs to those that it needs; it is asked again until
nothing is missing. So a search can go on where its best run is at an edge, and a script that was
stopped continues after the last finished run. On CPUs every run has one core, and there is a worker
for each: models this small leave a second core idle.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import _corpus
import _table
import jax
from rich.console import Console

from optax_muon.models import spec
from optax_muon.models.llama import LlamaConfig
from optax_muon.training import ensemble
from optax_muon.training.config import TrainConfig
from optax_muon.training.optimizers import HyperParams, optimizer

CONTEXT = 128
EVAL_SEQUENCES = 1024
STEP = 2.0
"""Factor between neighbours in a search."""


def llama(hidden_size: int, layers: int, context: int = CONTEXT) -> LlamaConfig:
    """A Llama with heads of 16 features and an MLP of 8/3 the width."""
    return LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 16,
        intermediate_size=round(hidden_size / 6) * 16,
        context=context,
    )


MODELS = {
    f"{width} x {layers}": llama(width, layers)
    for width, layers in ((16, 2), (32, 2), (48, 2), (64, 3), (96, 3), (128, 3))
}
"""The ladder of sizes, by width and depth."""
TOY = {"16 x 1": llama(16, 1, context=32), "32 x 1": llama(32, 1, context=32)}
"""Two sizes that train in seconds, for tests."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, to the end of its own schedule."""

    model: str
    """A key of the ladder."""
    optimizer: str
    """A key of `optax_muon.training.optimizers.REGISTRY`."""
    tokens_per_parameter: float
    """Training tokens over the parameters that multiply them."""
    batch: int
    """Sequences in a step."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Decoupled weight decay."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(Run):
    """A run and its outcome."""

    steps: int
    """Optimizer steps."""
    parameters: int
    """Parameters that multiply a token: all but the embedding."""
    flops: float
    """Operations of all products of the run, in the compiled program: model and optimizer."""
    seconds: float
    """Wall time of the steps, on one core, without compilation and evaluation."""
    val_loss: float
    """Loss on the held-out text at the end, nats per byte; NaN if the run diverged."""

    @property
    def model_flops(self) -> float:
        """6 N D: 6 operations for each parameter and token."""
        return 6 * self.parameters**2 * self.tokens_per_parameter

    @property
    def run(self) -> Run:
        """What was run."""
        return Run(*(getattr(self, field.name) for field in dataclasses.fields(Run)))


Needed = Callable[[Sequence[Finished]], Iterable[Run]]
"""Tells which runs an experiment needs, finished ones among them, given the finished ones."""


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The models of an experiment, and where its runs and their text are."""

    models: dict[str, LlamaConfig]
    """Models by name, the smallest first."""
    table: Path
    """The CSV file of the finished runs."""
    corpus: Path
    """Folder of the text."""

    def finished(self) -> list[Finished]:
        """The runs in the table."""
        return _table.read(self.table, Finished)

    def complete(self, needed: Needed, workers: int) -> list[Finished]:
        """Do all runs that are needed and not in the table; returns the table."""
        console = Console(stderr=True, highlight=False)
        _corpus.load(self.corpus)  # once, before the workers
        self.table.parent.mkdir(parents=True, exist_ok=True)
        cores = multiprocessing.get_context("spawn").Queue()
        for core in itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), workers):
            cores.put(core)
        with concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _take_core, (cores,)
        ) as pool:
            while missing := self._missing(needed):
                started = [pool.submit(train, self, run) for run in missing]
                for each in concurrent.futures.as_completed(started):
                    row = each.result()
                    _table.write(self.table, Finished, [*self.finished(), row])
                    console.print(f"{row.run}: {row.val_loss:.4f} in {row.seconds:.0f} s")
        return self.finished()

    def _missing(self, needed: Needed) -> list[Run]:
        finished = self.finished()
        done = {row.run for row in finished}
        return [run for run in dict.fromkeys(needed(finished)) if run not in done]

    def config(self, run: Run) -> TrainConfig:
        """The configuration of a run."""
        model = self.models[run.model]
        tokens = run.tokens_per_parameter * spec.model(model).active
        steps = max(10, round(tokens / (run.batch * model.context)))
        return TrainConfig(model, run.batch, steps, 0, steps, EVAL_SEQUENCES)


def _take_core(cores: Any) -> None:
    if jax.config.jax_platforms in (None, "cpu"):
        os.sched_setaffinity(0, {cores.get()})


@functools.cache
def _flops(config: TrainConfig, name: str) -> int:
    return ensemble.step_flops(config, optimizer(name), HyperParams(1e-3, 0.1))


def train(ladder: Ladder, run: Run) -> Finished:
    """Do a run."""
    config, corpus = ladder.config(run), _corpus.load(ladder.corpus)
    member = ensemble.EnsembleMember(HyperParams(run.lr, run.weight_decay), run.seed)
    flops = _flops(config, run.optimizer) * config.steps
    [last] = ensemble.train(config, optimizer(run.optimizer), [member], corpus)
    return Finished(
        **dataclasses.asdict(run),
        steps=config.steps,
        parameters=spec.model(config.model).active,
        flops=float(flops),
        seconds=round(last.seconds, 1),
        val_loss=round(float(last.val_loss[0]), 5),
    )


def search(finished: Sequence[Finished], start: Run, names: Sequence[str]) -> tuple[list[Run], Run]:
    """Search one number after the other, in factors of two, until the best is inside.

    Args:
        finished: The runs so far.
        start: Where the search begins.
        names: Fields of `Run`, in the order in which they are searched; one may come twice.

    Returns:
        The runs to do next, none when the search is over, and the best run so far.
    """
    losses = {row.run: row.val_loss for row in finished}
    for name in names:
        missing, start = _bracket(losses, start, name)
        if missing:
            return missing, start
    return [], start


def _bracket(losses: dict[Run, float], start: Run, name: str) -> tuple[list[Run], Run]:
    """Both neighbours of the best value of one field, and on from there."""
    best = start
    while True:
        around = [best, _neighbour(best, name, 1 / STEP), _neighbour(best, name, STEP)]
        if missing := [run for run in around if run not in losses]:
            return missing, best
        lowest = min(around, key=lambda run: _finite(losses[run]))
        if lowest == best:
            return [], best
        best = lowest


def _neighbour(run: Run, name: str, factor: float) -> Run:
    value = getattr(run, name) * factor
    # Three digits, as in the table: 1.2e-2 / 2 * 2 is the same run again.
    rounded = max(1, round(value)) if name == "batch" else float(f"{value:.3g}")
    return dataclasses.replace(run, **{name: rounded})


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
