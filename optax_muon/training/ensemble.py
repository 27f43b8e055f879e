"""Many small runs in one program: hyperparameters and seeds are arrays, and `vmap` adds an axis.

The members of an ensemble have the same model, optimizer, schedule and batch size. Their learning
rates, weight decays and seeds are arguments of the compiled step, so that a sweep compiles once.
With several members, the step is vectorized over them: an accelerator that a small model leaves
idle trains dozens at once. A CPU gains nothing by that (XLA multiplies a batch of small matrices
one by one), and trains them one after the other, with the same program.

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
from optax_muon.training.optimizers import HyperParams, OptimizerSpec, chain
from optax_muon.training.state import State
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
    program = _Program(dataclasses.replace(config, seed=0), row, len(members) > 1)
    seeds = [member.seed for member in members]
    hyper_params = program.stack([jax.tree.map(np.float32, m.hyper_params) for m in members])
    state = _initial_state(program, hyper_params, program.stack([np.uint32(s) for s in seeds]))
    evaluated = held_out(config, corpus)
    seconds, since = 0.0, time.perf_counter()
    for number in range(1, config.steps + 1):
        # Members of one seed share their batch; it is read once.
        batches = {seed: _batch(config, corpus, seed, number) for seed in set(seeds)}
        tokens = program.stack([batches[seed] for seed in seeds])
        speed = np.float32(config.bias_update_speed_schedule(number - 1))
        state, loss = _step(program, hyper_params, state, tokens, speed)
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
    program = _Program(dataclasses.replace(config, seed=0), row, vectorized=False)
    numbers = jax.tree.map(np.float32, hyper_params)
    state = jax.eval_shape(functools.partial(_initial_state, program), numbers, np.uint32(0))
    tokens = jax.ShapeDtypeStruct([1, config.batch, config.model.context + 1], jnp.int32)
    compiled = _step.lower(program, numbers, state, tokens, np.float32(0)).compile()
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

    config: TrainConfig
    """What all members share."""
    row: OptimizerSpec
    """The optimizer."""
    vectorized: bool
    """Whether arrays have an axis of members in front."""

    @property
    def model(self) -> Model:
        """The model."""
        return spec.model(self.config.model)

    def tx(self, hyper_params: HyperParams) -> optax.GradientTransformation:
        """The optimizer of one member, whose hyperparameters are arrays."""
        unit = self.config.learning_rate(1.0)
        return chain(
            self.row, lambda count: hyper_params.lr * unit(count), hyper_params, self.config
        )

    def stack(self, trees: Sequence[Any]) -> Any:
        """Trees of the members as one; a single member has no axis of members."""
        return (
            jax.tree.map(lambda *leaves: np.stack(leaves), *trees) if self.vectorized else trees[0]
        )

    def vectorize(self, function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
        """The function of one member as that of all."""
        return jax.vmap(function, in_axes) if self.vectorized else function


@functools.partial(jax.jit, static_argnums=0)
def _initial_state(program: _Program, hyper_params: HyperParams, seed: jax.Array) -> State:
    def one(hyper_params: HyperParams, seed: jax.Array) -> State:
        params = program.model.init(jax.random.key(seed))
        return State(params, program.tx(hyper_params).init(params), program.model.zero_bias())

    return program.vectorize(one)(hyper_params, seed)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
    program: _Program,
    hyper_params: HyperParams,
    state: State,
    tokens: jax.Array,
    speed: jax.Array,
) -> tuple[State, jax.Array]:
    def one(hyper_params: HyperParams, state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
        new, aux = step(program.model, program.tx(hyper_params), state, tokens, speed)
        return new, aux.loss

    return program.vectorize(one)(hyper_params, state, tokens)


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
