"""Training runs as rows of a table: which ones are still needed, and worker processes that do them.

An experiment is a function from the finished runs to those that it needs; it is asked again until
nothing is missing. So a search can go on where its best run is at an edge, and a script that was
stopped continues after the last finished run. On CPUs every run has one core, and there is a worker
for each: models this small leave a second core idle. An accelerator trains the runs that differ in
numbers and seeds alone as one program.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED
from pathlib import Path
from typing import Any, TypeVar

import _corpus
import _table
import jax
import numpy as np
import optax
from _variants import PER_HEAD, SPECS
from rich.console import Console

from optax_muon.models import spec
from optax_muon.models.spec import Config
from optax_muon.training import ensemble, search
from optax_muon.training.config import TrainConfig
from optax_muon.training.ladder import BIAS_CHANGE
from optax_muon.training.optimizers import HyperParams
from optax_muon.training.statistics import Difference, difference

EVAL_SEQUENCES = 1024
STEPS_TIMED = 20
"""Steps of one measurement of their time."""
SEEDS = (1, 2, 3)
"""Seeds of the runs that are reported; searches have seed 0."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, to the end of its own schedule."""

    model: str
    """A key of the ladder."""
    optimizer: str
    """A key of `_variants.SPECS`."""
    tokens_per_parameter: float
    """Training tokens over the parameters that multiply them."""
    batch: int
    """Sequences in a step."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Decoupled weight decay."""
    adamw_lr: float = 0.0
    """Peak learning rate of what Muon leaves to AdamW; 0 is `lr`."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""

    @property
    def hyper_params(self) -> HyperParams:
        """The numbers of the optimizer."""
        return HyperParams(self.lr, self.weight_decay, self.adamw_lr or None)

    @property
    def repeats(self) -> list[Run]:
        """The run with each seed that is reported."""
        return [dataclasses.replace(self, seed=seed) for seed in SEEDS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(Run):
    """A run and its outcome."""

    steps: int
    """Optimizer steps."""
    parameters: int
    """Parameters that multiply a token: all but the embedding."""
    flops: float
    """Operations of all products of the run, in the compiled program: model and optimizer."""
    val_loss: float
    """Loss on the held-out text at the end, nats per byte; NaN if the run diverged."""

    @classmethod
    def measure(
        cls, model: Config, params: optax.Params, bias: jax.Array | None, tokens: np.ndarray
    ) -> dict[str, Any]:
        """What else a row has, from what training ended with, and held-out tokens `[n, t]`."""
        del model, params, bias, tokens
        return {}

    @property
    def model_flops(self) -> float:
        """6 N D: 6 operations for each parameter and token."""
        return 6 * self.parameters**2 * self.tokens_per_parameter

    @property
    def run(self) -> Run:
        """What was run."""
        return Run(*(getattr(self, field.name) for field in dataclasses.fields(Run)))


Row = TypeVar("Row", bound=Finished)
Needed = Callable[[Sequence[Finished]], Iterable[Run]]
"""Tells which runs an experiment needs, finished ones among them, given the finished ones."""


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The models of an experiment, and where its runs and their text are."""

    models: Mapping[str, Config]
    """Models by name, the smallest first."""
    table: Path
    """The CSV file of the finished runs."""
    corpus: Path
    """Folder of the text."""
    kind: type[Finished] = Finished
    """The rows of the table."""

    def finished(self) -> list[Finished]:
        """The runs in the table."""
        return list(_table.read(self.table, self.kind))

    def complete(self, needed: Needed, workers: int) -> list[Finished]:
        """Do all runs that are needed and not in the table; returns the table.

        When a run fails, those that are under way beside it end first, and are written.
        """
        _corpus.load(self.corpus)  # once, before the workers
        self.table.parent.mkdir(parents=True, exist_ok=True)
        failure: BaseException | None = None
        with _pool(workers) as pool:
            pending: dict[concurrent.futures.Future[list[Finished]], list[Run]] = {}
            while True:
                if failure:
                    pending = {each: runs for each, runs in pending.items() if not each.cancel()}
                else:
                    under_way = set(itertools.chain.from_iterable(pending.values()))
                    missing = [run for run in self._missing(needed) if run not in under_way]
                    pending |= {
                        pool.submit(train, self, group): group for group in _groups(missing)
                    }
                if not pending:
                    break
                for each in concurrent.futures.wait(pending, return_when=FIRST_COMPLETED).done:
                    del pending[each]
                    if error := each.exception():
                        failure = failure or error
                    else:
                        self._add(each.result())
        if failure:
            raise failure
        return self.finished()

    def _add(self, rows: Sequence[Finished]) -> None:
        """Write finished runs to the table, and say so."""
        _table.write(self.table, self.kind, [*self.finished(), *rows])
        console = Console(stderr=True, highlight=False)
        for row in rows:
            console.print(f"{row.run}: {row.val_loss:.4f}")

    def _missing(self, needed: Needed) -> list[Run]:
        finished = self.finished()
        done = {row.run for row in finished}
        return [run for run in dict.fromkeys(needed(finished)) if run not in done]

    def config(self, run: Run) -> TrainConfig:
        """The configuration of a run."""
        model = self.models[run.model]
        tokens = run.tokens_per_parameter * spec.model(model).active
        steps = max(10, round(tokens / (run.batch * model.context)))
        return TrainConfig(
            *(model, run.batch, steps, 0, steps, EVAL_SEQUENCES),
            bias_update_speed=BIAS_CHANGE / steps if spec.model(model).has_router else 0.0,
            per_head=run.optimizer in PER_HEAD,
        )

    def step_seconds(self, runs: Sequence[Run], rounds: int) -> list[list[float]]:
        """Wall times of a step of each run, seconds, one for each round, in which all take part.

        On CPUs a process of its own measures on one core, as the runs of an experiment have it.
        """
        with _pool(1) as pool:
            return pool.submit(_step_seconds, self, runs, rounds).result()


def _on_cpu() -> bool:
    """Whether each run has a core, and not all of them an accelerator."""
    return jax.config.jax_platforms in (None, "cpu") and jax.default_backend() == "cpu"


def _groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that are done as one program: on CPUs each for itself, see `ensemble.py`."""
    if _on_cpu():
        return [[run] for run in runs]
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        same = (run.model, run.optimizer, run.tokens_per_parameter, run.batch, not run.adamw_lr)
        groups.setdefault(same, []).append(run)
    return list(groups.values())


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """The worker processes."""
    context = multiprocessing.get_context("spawn")
    if not _on_cpu():
        return concurrent.futures.ProcessPoolExecutor(workers, context)
    cores = context.Queue()
    for core in itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), workers):
        cores.put(core)
    return concurrent.futures.ProcessPoolExecutor(workers, context, _take_core, (cores,))


def _take_core(cores: Any) -> None:
    """Stay on a core of its own; called before jax starts its threads, which stay there too."""
    os.sched_setaffinity(0, {cores.get()})


@functools.cache
def _step_flops(config: TrainConfig, name: str) -> int:
    return ensemble.step_flops(config, SPECS[name], HyperParams(1e-3, 0.1))


def _last(config: TrainConfig, runs: Sequence[Run], corpus: Path) -> ensemble.EnsembleMetrics:
    """Train runs of one optimizer together; the measurements after the last step."""
    members = [ensemble.EnsembleMember(run.hyper_params, run.seed) for run in runs]
    [last] = ensemble.train(config, SPECS[runs[0].optimizer], members, _corpus.load(corpus))
    return last


def _step_seconds(ladder: Ladder, runs: Sequence[Run], rounds: int) -> list[list[float]]:
    """What `Ladder.step_seconds` returns. The round before the first one is not counted."""
    corpus = _corpus.load(ladder.corpus)
    steps = STEPS_TIMED * (rounds + 1)
    trainings = []
    for run in runs:
        timed = {"steps": steps, "eval_every": STEPS_TIMED, "eval_sequences": ensemble.EVAL_ROWS}
        config = dataclasses.replace(ladder.config(run), **timed)
        member = ensemble.EnsembleMember(run.hyper_params, run.seed)
        trainings.append(ensemble.train(config, SPECS[run.optimizer], [member], corpus))
    since_start = [[next(each).seconds for each in trainings] for _ in range(rounds + 1)]
    return [
        [(end - start) / STEPS_TIMED for start, end in itertools.pairwise(ends)]
        for ends in zip(*since_start, strict=True)
    ]


def _bias(last: ensemble.EnsembleMetrics, place: int) -> jax.Array | None:
    """The router biases of a run, `[num_moe_layers, n_routed_experts]`."""
    bias = last.state.bias
    return None if bias is None else bias.reshape(len(last.loss), -1, bias.shape[-1])[place]


def train(ladder: Ladder, runs: Sequence[Run]) -> list[Finished]:
    """Do runs that differ in numbers and seeds alone."""
    config = ladder.config(runs[0])
    last = _last(config, runs, ladder.corpus)
    tokens = ensemble.held_out(config, _corpus.load(ladder.corpus))[0]
    return [
        ladder.kind(
            **dataclasses.asdict(run),
            steps=config.steps,
            parameters=spec.model(config.model).active,
            flops=float(_step_flops(config, run.optimizer) * config.steps),
            val_loss=round(float(last.val_loss[place]), 5),
            **ladder.kind.measure(config.model, last.params(place), _bias(last, place), tokens),
        )
        for place, run in enumerate(runs)
    ]


def tuned(
    finished: Sequence[Row],
    start: Run,
    names: Sequence[str] = ("lr",),
    search_seeds: Sequence[int] = (0,),
    seeds: Sequence[int] = SEEDS,
) -> tuple[list[Run], list[Row]]:
    """The runs of a search to do next, and the rows of its best run once all seeds are done."""
    rows = {row.run: row for row in finished}
    losses = {run: row.val_loss for run, row in rows.items()}
    missing, repeats = search.tune(losses, start, names, seeds, search_seeds)
    return missing, [rows[run] for run in repeats]


def found(finished: Sequence[Row], runs: Sequence[Run]) -> list[Row]:
    """The rows of these runs; none before all are finished."""
    rows = {row.run: row for row in finished}
    return [rows[run] for run in runs] if all(run in rows for run in runs) else []


def losses(rows: Iterable[Finished]) -> list[float]:
    """The losses of rows."""
    return [row.val_loss for row in rows]


def paired(rows: Iterable[Finished], others: Iterable[Finished]) -> Difference:
    """How far the losses of rows are above those of others with the same seeds."""
    return difference(losses(rows), losses(others))
