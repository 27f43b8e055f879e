"""The training loop: one jitted step, one trial, the metrics of every step.

`train` is a generator that knows neither files nor screens: the trainer (`trainer.py`) writes what
it yields and saves what it should, the sweep (`sweep.py`) only looks at the last metrics. What is
learned is a `Task`: pretraining (`pretrain.py`) or fine-tuning (`finetune.py`). The batch of a step
is a function of the seed and the step, so a run that resumes from a saved state gives the same
numbers, bit for bit, as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
import optax

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
    """Wall time of the step, without evaluation."""
    val_loss: float | None = None
    """Held-out loss after the update, nats per token; None between evaluations."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Metrics of the model (`Model.metrics`); empty if it has none."""


def train(
    config: TrainConfig, trial: Trial, task: Task, state: State, done: int = 0
) -> Iterator[tuple[StepMetrics, State]]:
    """Train from step `done` to the end of the schedule.

    Args:
        config: what all trials share.
        trial: the optimizer.
        task: what is learned; its mesh, if it has one, must be ambient.
        state: state after `done` steps; it is donated, so use the yielded one instead.
        done: steps already taken.

    Yields:
        The metrics of each step and the state after it, valid until the next one is asked for.

    Raises:
        Diverged: at the first loss, gradient or held-out loss that is not finite.
    """
    model, tx = spec.model(config.model), transformation(trial, config)
    schedule = config.learning_rate(trial.hyper_params.lr)
    for number in range(done + 1, config.steps + 1):
        tokens, weights = task.batch(number)
        speed = np.float32(config.bias_update_speed_schedule(number - 1))
        start = time.perf_counter()
        state, measured = _step(model, tx, state, tokens, speed, weights)
        measured = jax.tree.map(lambda value: np.asarray(value).tolist(), measured)
        seconds = time.perf_counter() - start
        metrics = StepMetrics(number, lr=float(schedule(number - 1)), seconds=seconds, **measured)
        if number % config.eval_every == 0 or number == config.steps:
            metrics = dataclasses.replace(metrics, val_loss=task.held_out_loss(state))
        yield _finite(metrics, trial), state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(
    model: Model,
    tx: optax.GradientTransformation,
    state: State,
    tokens: jax.Array,
    bias_update_speed: jax.Array,
    weights: jax.Array | None,
) -> tuple[State, dict[str, Any]]:
    """Take a step, and keep the measurements that `StepMetrics` records."""
    state, aux = step(model, tx, state, tokens, bias_update_speed, weights)
    measured = {"loss": aux.loss, "grad_norm": aux.grad_norm, "model": model.metrics(aux.stats)}
    return state, measured


def _finite(metrics: StepMetrics, trial: Trial) -> StepMetrics:
    for name in ("loss", "grad_norm", "val_loss"):
        value = getattr(metrics, name)
        if value is not None and not math.isfinite(value):
            raise Diverged(f"{trial.name}: {name} is {value} at step {metrics.step}")
    return metrics
