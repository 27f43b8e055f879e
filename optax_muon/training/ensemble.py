"""Many small runs in one program: hyperparameters and seeds are arrays, and `vmap` adds an axis.

The members of an ensemble have the same model, optimizer, schedule and batch size. With several
members, the step is vectorized over them: an accelerator that a small model leaves idle trains
dozens at once. A CPU gains nothing by that (XLA multiplies a batch of small matrices one by one),
and trains them one after the other, with the same program.

    for metrics in train(config, optimizer("muon"), members, corpus):
        print(metrics.step, metrics.val_loss)
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_muon import hlo
from optax_muon.models import spec
from optax_muon.models.spec import Model
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import Corpus, held_out_starts, starts, windows
from optax_muon.training.optimizers import HyperParams, OptimizerSpec, Trial, transformation
from optax_muon.training.state import State, draw, shapes
from optax_muon.training.step import next_token_loss, step

EVAL_ROWS = 64
"""Held-out sequences that a member is evaluated on at once."""


@dataclasses.dataclass(frozen=True)
class EnsembleMember:
    """What may differ between the runs of an ensemble."""

    hyper_params: HyperParams
    """Learning rate and weight decay."""
    seed: int
    """Seed of the initial parameters and of the order of the data."""


@dataclasses.dataclass(frozen=True)
class EnsembleMetrics:
    """The measurements of an evaluation."""

    step: int
    """The step, counted from 1."""
    loss: np.ndarray
    """Loss of the step's batch before the update, nats per token, `[members]`; NaN if diverged."""
    val_loss: np.ndarray
    """Held-out loss after the update, nats per token, `[members]`; NaN if diverged."""
    seconds: float
    """Wall time of all steps so far but the first, which compiles; without evaluations."""
    state: State
    """State after the update, `[members, ...]` if there are several; the next step deletes it."""

    def params(self, member: int) -> optax.Params:
        """The parameters of a member after the update."""
        if len(self.loss) == 1:
            return self.state.params
        return jax.tree.map(lambda leaf: leaf[member], self.state.params)


def train(
    config: TrainConfig, row: OptimizerSpec, members: Sequence[EnsembleMember], corpus: Corpus
) -> Iterator[EnsembleMetrics]:
    """Train all members at once, on one device.

    Args:
        config: What all members share; its `seed` is not used.
        row: The optimizer.
        members: Hyperparameters and seeds. All of them give `adamw_lr`, or none does.
        corpus: The text. Members of the same seed see the same batches.

    Yields:
        The measurements of each evaluation, and of the last step. It ends early if all diverged.
    """
    program = _program(config, row, members[0].hyper_params, vectorized=len(members) > 1)
    seeds = [member.seed for member in members]
    hyper_params = program.stack([jax.tree.map(np.float32, m.hyper_params) for m in members])
    rates = np.stack([config.learning_rates(m.hyper_params.lr) for m in members], axis=1)
    state = _initial_state(program, program.stack([np.uint32(seed) for seed in seeds]))
    evaluated = held_out(config, corpus)
    seconds, since = 0.0, time.perf_counter()
    for number in range(1, config.steps + 1):
        # Members of one seed share their batch; it is read once.
        batches = {seed: _batch(config, corpus, seed, number) for seed in set(seeds)}
        tokens = program.stack([batches[seed] for seed in seeds])
        speed = np.float32(config.bias_update_speed_schedule(number - 1))
        lr = program.stack([*rates[number - 1]])
        state, loss = _step(program, state, tokens, speed, lr, hyper_params)
        if number == 1:
            jax.block_until_ready(loss)
            since = time.perf_counter()
        if config.is_evaluated(number):
            jax.block_until_ready(loss)
            seconds += time.perf_counter() - since
            val_loss = np.atleast_1d(_held_out_loss(program, state, evaluated))
            yield EnsembleMetrics(number, np.atleast_1d(loss), val_loss, seconds, state)
            since = time.perf_counter()
            if not np.isfinite(val_loss).any():
                return


def step_flops(config: TrainConfig, row: OptimizerSpec, hyper_params: HyperParams) -> int:
    """Operations of the matrix products of one step, in the compiled program of one member."""
    program = _program(config, row, hyper_params, vectorized=False)
    numbers = jax.tree.map(np.float32, hyper_params)
    state, zero = shapes(program.model, program.tx), np.float32(0)
    tokens = jax.ShapeDtypeStruct([1, config.batch, config.model.context + 1], jnp.int32)
    compiled = _step.lower(program, state, tokens, zero, zero, numbers).compile()
    return hlo.flops(compiled.as_text() or "")


def held_out(config: TrainConfig, corpus: Corpus) -> np.ndarray:
    """The held-out sequences, int32 `[n, EVAL_ROWS, t + 1]`; what fills no row is left out."""
    context = config.model.context
    places = held_out_starts(corpus.held_out, config.eval_sequences, context)
    rows = min(EVAL_ROWS, len(places))
    places = places[: len(places) // rows * rows].reshape(-1, rows)
    return windows(corpus.held_out, places, context)


@dataclasses.dataclass(frozen=True)
class _Program:
    """What an ensemble is compiled for; equal programs share their compilation."""

    model: Model
    """The model."""
    tx: optax.GradientTransformationExtraArgs
    """The optimizer, whose numbers are arguments."""
    vectorized: bool
    """Whether arrays have an axis of members in front."""

    def stack(self, trees: Sequence[Any]) -> Any:
        """Trees of the members as one; a single member has no axis of members."""
        return (
            jax.tree.map(lambda *leaves: np.stack(leaves), *trees) if self.vectorized else trees[0]
        )

    def vectorize(self, function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
        """The function of one member as that of all."""
        return jax.vmap(function, in_axes) if self.vectorized else function


def _program(
    config: TrainConfig, row: OptimizerSpec, hyper_params: HyperParams, vectorized: bool
) -> _Program:
    tx = transformation(Trial(row, hyper_params), config)
    return _Program(spec.model(config.model), tx, vectorized)


@functools.partial(jax.jit, static_argnums=0)
def _initial_state(program: _Program, seed: jax.Array) -> State:
    def one(seed: jax.Array) -> State:
        return draw(program.model, program.tx, jax.random.key(seed))

    return program.vectorize(one)(seed)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(
    program: _Program,
    state: State,
    tokens: jax.Array,
    speed: jax.Array,
    lr: jax.Array,
    hyper_params: HyperParams,
) -> tuple[State, jax.Array]:
    def one(
        state: State, tokens: jax.Array, lr: jax.Array, hyper_params: HyperParams
    ) -> tuple[State, jax.Array]:
        numbers: dict[str, Any] = {"lr": lr, "hyper_params": hyper_params}
        new, aux = step(program.model, program.tx, state, tokens, speed, **numbers)
        return new, aux.loss

    return program.vectorize(one)(state, tokens, lr, hyper_params)


@functools.partial(jax.jit, static_argnums=0)
def _held_out_loss(program: _Program, state: State, tokens: jax.Array) -> jax.Array:
    def one(state: State) -> jax.Array:
        def mean(rows: jax.Array) -> jax.Array:
            return next_token_loss(program.model, state.params, rows, state.bias)[0]

        return jax.lax.map(mean, tokens).mean()

    return program.vectorize(one)(state)


def _batch(config: TrainConfig, corpus: Corpus, seed: int, number: int) -> np.ndarray:
    """The batch of a step, int32 `[1, b, t + 1]`: the one that `Pretraining` draws."""
    size, context = config.batch_at(number), config.model.context
    return windows(corpus.train, starts(corpus.train, seed, number, size, context), context)[None]
