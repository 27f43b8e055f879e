"""The training loop: one jitted step, one contestant, a record of every step.

`train` is a generator that knows neither files nor screens: the run (`run.py`) writes what it
yields and saves what it should, the sweep (`sweep.py`) only looks at the last record. The batch of
a step is a function of the seed and the step, so going on from a saved state gives the same
numbers, bit for bit, as never having stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_muon.models.llama import Llama, LlamaConfig, logits
from optax_muon.models.stops import Diverged
from optax_muon.models.training.contestants import Contestant, transformation
from optax_muon.models.training.data import Corpus, batch, held_out_batch


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all contestants share.

    Attributes:
        model: the Llama's sizes.
        batch: sequences in a step.
        steps: optimizer steps of the whole schedule.
        seed: of the initial parameters and of the order of the data.
        eval_every: steps between two looks at the held-out text.
        eval_sequences: held-out sequences of each look, always the same ones.
    """

    model: LlamaConfig
    batch: int
    steps: int
    seed: int
    eval_every: int
    eval_sequences: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in one step."""
        return self.batch * self.model.context


class State(NamedTuple):
    """Everything that training changes: parameters and the optimizer's state."""

    params: optax.Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Record:
    """What one step says about itself.

    Attributes:
        step: counted from 1.
        loss: of the step's batch before its update, nats per token.
        grad_norm: global norm of the gradient before clipping.
        lr: learning rate of the update.
        seconds: wall time of the step, without evaluation.
        val_loss: held-out loss after the update, nats per token; None between evaluations.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    val_loss: float | None = None


def init(setup: Setup, tx: optax.GradientTransformation) -> State:
    """The state before the first step; the parameters are equal for every optimizer."""
    return _init(Llama(setup.model), tx, jax.random.key(setup.seed))


def train(
    setup: Setup, contestant: Contestant, corpus: Corpus, state: State, done: int = 0
) -> Iterator[tuple[Record, State]]:
    """Train from step `done` to the end of the schedule.

    Args:
        setup: what all contestants share.
        contestant: the optimizer.
        corpus: the text.
        state: after `done` steps; it is donated, so use the yielded one instead.
        done: steps already taken.

    Yields:
        The record of each step and the state after it, valid until the next one is asked for.

    Raises:
        Diverged: at the first loss, gradient or held-out loss that is not finite.
    """
    model, tx = Llama(setup.model), transformation(contestant, setup.steps)
    schedule = contestant.schedule(setup.steps)
    held_out = held_out_batch(corpus.held_out, setup.eval_sequences, setup.model.context)
    for step in range(done + 1, setup.steps + 1):
        tokens = batch(corpus.train, setup.seed, step, setup.batch, setup.model.context)
        start = time.perf_counter()
        state, (loss, grad_norm) = _step(model, tx, state, tokens)
        loss, grad_norm = float(loss), float(grad_norm)
        seconds = time.perf_counter() - start
        record = Record(step, loss, grad_norm, float(schedule(step - 1)), seconds)
        if step % setup.eval_every == 0 or step == setup.steps:
            record = dataclasses.replace(record, val_loss=evaluate(model, state.params, held_out))
        yield _finite(record, contestant), state


def evaluate(model: Llama, params: optax.Params, tokens: np.ndarray) -> float:
    """Mean loss over `tokens`, `[sequences, context + 1]`, in nats per token."""
    return float(_loss(model, params, tokens))


def next_token_loss(model: Llama, params: optax.Params, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of each next token, nats."""
    scores = logits(model, params, tokens[:, :-1])
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
    return losses.mean()


_loss = jax.jit(next_token_loss, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(model: Llama, tx: optax.GradientTransformation, key: jax.Array) -> State:
    params = model.init(key, jnp.zeros([1, 1], jnp.int32))["params"]
    return State(params, tx.init(params))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(
    model: Llama, tx: optax.GradientTransformation, state: State, tokens: jax.Array
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    loss_and_grads = jax.value_and_grad(functools.partial(next_token_loss, model))
    loss, grads = loss_and_grads(state.params, tokens)
    return update(tx, state, grads), (loss, optax.tree.norm(grads))


def update(tx: optax.GradientTransformation, state: State, grads: optax.Updates) -> State:
    """One step of the optimizer alone."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state)


def _finite(record: Record, contestant: Contestant) -> Record:
    for name in ("loss", "grad_norm", "val_loss"):
        value = getattr(record, name)
        if value is not None and not math.isfinite(value):
            raise Diverged(f"{contestant.name}: {name} is {value} at step {record.step}")
    return record
