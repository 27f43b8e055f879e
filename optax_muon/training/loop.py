"""The training loop: one jitted step, one trial, the metrics of every step.

`train` is a generator that knows neither files nor screens: the trainer (`trainer.py`) writes what
it yields and saves what it should, the sweep (`sweep.py`) only looks at the last metrics. What is
learned is a `Task`: pretraining (`pretrain.py`) or fine-tuning (`finetune.py`). The batch of a step
is a function of the seed and the step, so a run that resumes from a saved state gives the same
numbers, bit for bit, as one that never stopped.

An accelerator must not wait for the host. While a step runs, the next batch is put on the devices,
and with `ahead=1` the next step is started before the numbers of this one are read:

    host    start 1   batch 2   start 2   batch 3   read 1   start 3   batch 4   read 2
    device            1 ...................2 ............................3 ............

Evaluations and the last step wait for all steps under way, because they need the state itself.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

from optax_muon import compiler_options
from optax_muon.errors import Diverged
from optax_muon.models import spec
from optax_muon.models.spec import Model
from optax_muon.training.config import TrainConfig
from optax_muon.training.optimizers import Trial, transformation
from optax_muon.training.state import State
from optax_muon.training.step import step

Batch = tuple[jax.Array, jax.Array | None]
"""Tokens and weights of a step, as `step` takes them."""


class Task(Protocol):
    """What a run learns, and what it is evaluated on."""

    def batch(self, number: int) -> Batch:
        """The batch of a step, counted from 1; a pure function of the step."""

    def held_out_loss(self, state: State) -> float:
        """Mean loss on held-out data, nats per token."""


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """The measurements of one step: a line of `metrics.jsonl`."""

    step: int
    """The step, counted from 1."""
    loss: float
    """Loss of the step's batch before the update, nats per token."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    lr: float
    """Learning rate of the update."""
    seconds: float
    """Wall time of the step, without evaluation; from the end of the one before it, if it was
    started earlier."""
    val_loss: float | None = None
    """Held-out loss after the update, nats per token; None between evaluations."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Metrics of the model (`Model.metrics`); empty if it has none."""


class _Started(NamedTuple):
    """A step under way."""

    number: int
    """Counted from 1."""
    lr: float
    """Learning rate of the update."""
    since: float
    """When it was started."""
    measured: dict[str, Any]
    """What it measures, on the devices."""


def _never() -> bool:
    return False


def train(
    config: TrainConfig,
    trial: Trial,
    task: Task,
    state: State,
    done: int = 0,
    *,
    ahead: int = 0,
    is_stopped: Callable[[], bool] = _never,
) -> Iterator[tuple[StepMetrics, State | None]]:
    """Train from step `done` to the end of the schedule.

    Args:
        config: What all trials share.
        trial: The optimizer.
        task: What is learned; its mesh, if it has one, must be ambient.
        state: State after `done` steps; it is donated, so use the yielded one instead.
        done: Steps already taken.
        ahead: How many steps may be started before the numbers of a step are read
            (`Devices.steps_ahead`). The numbers are the same.
        is_stopped: Whether to start no further step; asked only where steps are under way.

    Yields:
        The metrics of each step and the state after it, valid until the next one is asked for; None
        where a later step has been started already, which takes the state over. Evaluations, the
        last step and the last one before a stop always have it.

    Raises:
        Diverged: At the first loss, gradient or held-out loss that is not finite.
    """
    steps = _Steps(config, trial, task, state, done)
    for numbers in _between_evaluations(config, done):
        for number in numbers:
            if steps.under_way and is_stopped():
                yield from steps.read(0)
                return
            steps.start(number)
            yield from steps.read(0 if number == numbers[-1] else ahead)


class _Steps:
    """Steps that are started, and later read, in order.

    Args:
        config: As `train` takes it.
        trial: As `train` takes it.
        task: As `train` takes it.
        state: As `train` takes it.
        done: Steps already taken.
    """

    def __init__(self, config: TrainConfig, trial: Trial, task: Task, state: State, done: int):
        self.under_way: collections.deque[_Started] = collections.deque()
        self._config, self._trial, self._task, self._state = config, trial, task, state
        self._model, self._tx = spec.model(config.model), transformation(trial, config)
        # Before the steps: on an accelerator its few operations would wait for those under way.
        self._rates = config.learning_rates(trial.hyper_params.lr)
        self._batch = task.batch(done + 1) if done < config.steps else None
        self._read_at = 0.0

    def start(self, number: int) -> None:
        """Start a step, and put the next one's batch on the devices."""
        assert self._batch is not None
        (tokens, weights), config = self._batch, self._config
        speed = np.float32(config.bias_update_speed_schedule(number - 1))
        numbers = self._trial.numbers(self._rates[number - 1])
        since = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            self._state, measured = _step(
                self._model, self._tx, self._state, tokens, speed, weights, **numbers
            )
        for value in jax.tree.leaves(measured):
            value.copy_to_host_async()
        lr = float(numbers["lr"])
        self.under_way.append(_Started(number, lr, since, measured))
        self._batch = self._task.batch(number + 1) if number < config.steps else None

    def read(self, keep: int) -> Iterator[tuple[StepMetrics, State | None]]:
        """Wait for all steps under way but the last `keep`; yields what `train` yields."""
        while len(self.under_way) > keep:
            metrics = self._metrics(self.under_way.popleft())
            if self._config.is_evaluated(metrics.step):
                metrics = dataclasses.replace(
                    metrics, val_loss=self._task.held_out_loss(self._state)
                )
            yield _finite(metrics, self._trial), None if self.under_way else self._state

    def _metrics(self, started: _Started) -> StepMetrics:
        number, lr, since, measured = started
        values = jax.tree.map(lambda value: np.asarray(value).tolist(), measured)
        now = time.perf_counter()
        seconds, self._read_at = now - max(since, self._read_at), now
        return StepMetrics(number, lr=lr, seconds=seconds, **values)


def _between_evaluations(config: TrainConfig, done: int) -> Iterator[range]:
    """The steps after `done`, cut after each evaluation.

    >>> from optax_muon.training.presets import PRESETS
    >>> config = TrainConfig(PRESETS["tiny"].model, 8, 25, 0, eval_every=10, eval_sequences=1)
    >>> [(steps[0], steps[-1]) for steps in _between_evaluations(config, done=7)]
    [(8, 10), (11, 20), (21, 25)]
    """
    while done < config.steps:
        end = min(config.steps, done - done % config.eval_every + config.eval_every)
        yield range(done + 1, end + 1)
        done = end


def _step(
    model: Model,
    tx: optax.GradientTransformation,
    state: State,
    tokens: jax.Array,
    bias_update_speed: np.float32,
    weights: jax.Array | None,
    **numbers: Any,
) -> tuple[State, dict[str, Any]]:
    """Take a step, and keep the measurements that `StepMetrics` records."""
    return _jitted()(model, tx, state, tokens, bias_update_speed, weights, **numbers)


@functools.cache
def _jitted() -> Callable[..., tuple[State, dict[str, Any]]]:
    """The step, compiled with the options for this machine's devices."""

    def measured_step(
        model: Model, tx: optax.GradientTransformation, *args: Any, **numbers: Any
    ) -> tuple[State, dict[str, Any]]:
        state, aux = step(model, tx, *args, **numbers)
        return state, {
            "loss": aux.loss,
            "grad_norm": aux.grad_norm,
            "model": model.metrics(aux.stats),
        }

    options = compiler_options(jax.devices()[0])
    return jax.jit(measured_step, static_argnums=(0, 1), donate_argnums=2, compiler_options=options)


def _finite(metrics: StepMetrics, trial: Trial) -> StepMetrics:
    for name in ("loss", "grad_norm", "val_loss"):
        value = getattr(metrics, name)
        if value is not None and not math.isfinite(value):
            raise Diverged(f"{trial.name}: {name} is {value} at step {metrics.step}")
    return metrics
