"""The training loop: one jitted step, one trial, a record of every step.

`train` is a generator that knows neither files nor screens: the run (`run.py`) writes what it
yields and saves what it should, the sweep (`sweep.py`) only looks at the last record. The batch of
a step is a function of the seed and the step, so going on from a saved state gives the same
numbers, bit for bit, as never having stopped.

`step` is the whole of training in one function, for any model and any mesh; `abstract` is the state
it takes as shapes alone, so that it compiles without a parameter in memory:

    with jax.set_mesh(mesh):
        state = abstract(model, tx, mesh)
        jax.jit(step, static_argnums=(0, 1)).lower(model, tx, state, tokens, rate).compile()
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

import optax_muon
from optax_muon.errors import Diverged
from optax_muon.models import spec
from optax_muon.models.moe import balance
from optax_muon.models.spec import ForwardStats, Model
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import Corpus, held_out_starts, starts
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.optimizers import Trial, transformation


class State(NamedTuple):
    """Everything that training changes."""

    params: optax.Params
    """The parameters, float32."""
    opt_state: optax.OptState
    """The optimizer's state."""
    bias: jax.Array | None = None
    """Router biases, `[moe_depth, experts]` float32; None where there is no router."""


class StepAux(NamedTuple):
    """What a step says of itself, before its update."""

    loss: jax.Array
    """Mean over the step's tokens, nats."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    report: ForwardStats | None
    """Of a model that makes one; of several micro-batches together."""


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one step says about itself; what only a Moonlight says is None of a Llama.

    Attributes:
        step: counted from 1.
        loss: of the step's batch before its update, nats per token.
        grad_norm: global norm of the gradient before clipping.
        lr: learning rate of the update.
        seconds: wall time of the step, without evaluation.
        val_loss: held-out loss after the update, nats per token; None between evaluations.
        max_logit: largest attention logit.
        max_logits: largest attention logit of each layer.
        high_logits: share of attention logits above `moonlight.HIGH_LOGIT`.
        imbalance: largest load of an expert over the mean, less one, in the worst layer.
        router_entropy: mean entropy of the routers' scores, nats.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    val_loss: float | None = None
    max_logit: float | None = None
    max_logits: list[float] | None = None
    high_logits: float | None = None
    imbalance: float | None = None
    router_entropy: float | None = None


# ---- the step ------------------------------------------------------------------------------------


def step(
    model: Model,
    tx: optax.GradientTransformation,
    state: State,
    tokens: jax.Array,
    rate: jax.Array | float = 0.0,
    weights: jax.Array | None = None,
) -> tuple[State, StepAux]:
    """One step of training: gradients, the optimizer, the router biases.

    To be jitted with `model` and `tx` static. Accumulating `k` micro-batches is one big batch: the
    gradient is that of the mean over all tokens, the load is their sum, the largest logit the
    largest of all. One micro-batch is in memory at a time.

    Args:
        model: the model.
        tx: the optimizer; it is handed `max_logits`, `[depth, heads]`, for `optax_muon.qk_clip`.
        state: before the step; on a mesh as `shardings` lays it out.
        tokens: `[k, b, t + 1]` int32; on a mesh, `b` lies over `layers.BATCH`.
        rate: change of a router bias, float32; a schedule is called by the caller.
        weights: of the predictions of `tokens[..., 1:]`, `[k, b, t]` float32, such as 1 for answers
            and 0 for prompts; the loss is the weighted mean. None weighs all the same.

    Returns:
        The state after the step, and what was measured in it.
    """
    grads, loss, report = gradients(model, state, tokens, weights)
    max_logits = None if report is None else report.max_logits
    new = update(tx, state, grads, max_logits)
    if report is not None and state.bias is not None:
        new = new._replace(bias=balance.update_bias(state.bias, report.load, rate))
    return new, StepAux(loss, optax.tree.norm(grads), report)


def gradients(
    model: Model, state: State, tokens: jax.Array, weights: jax.Array | None = None
) -> tuple[optax.Updates, jax.Array, ForwardStats | None]:
    """Gradient, loss and report of all micro-batches together; arguments as of `step`."""
    parts = tokens.shape[0]
    if weights is not None:
        weights = weights * (weights.size / weights.sum())

    def one(tokens: jax.Array, weights: jax.Array | None) -> Any:
        loss = jax.value_and_grad(next_token_loss, argnums=1, has_aux=True)
        (value, report), grads = loss(model, state.params, tokens, state.bias, weights)
        return grads, value, report

    if parts == 1:
        return one(tokens[0], None if weights is None else weights[0])

    def add(total: optax.Updates, part: Any) -> tuple[optax.Updates, Any]:
        grads, value, report = one(*part)
        # Kept apart: libtpu moves sums over devices out of the loop, and fails at some of them.
        grads = jax.lax.optimization_barrier(grads)
        total = jax.tree.map(lambda a, b: a + b * (1 / parts), total, grads)
        return total, (value, report)

    zero = jax.tree.map(jnp.zeros_like, state.params)
    grads, (losses, reports) = jax.lax.scan(add, zero, (tokens, weights))
    return grads, losses.mean(), together(reports)


def together(reports: ForwardStats | None) -> ForwardStats | None:
    """The report of several micro-batches, stacked along a first axis, as if they were one."""
    if reports is None:
        return None
    return ForwardStats(
        max_logits=reports.max_logits.max(axis=0),
        high_logits=reports.high_logits.mean(axis=0),
        load=reports.load.sum(axis=0),
        entropy=reports.entropy.mean(axis=0),
    )


def update(
    tx: optax.GradientTransformation,
    state: State,
    grads: optax.Updates,
    max_logits: jax.Array | None = None,
) -> State:
    """One step of the optimizer alone."""
    tx = optax.with_extra_args_support(tx)
    said = {} if max_logits is None else {"max_logits": max_logits}
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **said)
    return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def next_token_loss(
    model: Model,
    params: optax.Params,
    tokens: jax.Array,
    bias: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, ForwardStats | None]:
    """Cross-entropy of each next token in nats, and the model's report.

    Args:
        model: the model.
        params: its parameters.
        tokens: `[b, t + 1]` int32.
        bias: of its router.
        weights: `[b, t]` float32. The loss is the sum over tokens of weight and cross-entropy, over
            the number of tokens. None is a weight of 1.
    """
    losses, report = model.losses(params, tokens[:, :-1], tokens[:, 1:], bias)
    return (losses if weights is None else losses * weights).mean(), report


# ---- the state -----------------------------------------------------------------------------------


def init(setup: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh | None = None) -> State:
    """The state before the first step, on a mesh as `shardings` says.

    The parameters are equal for every optimizer, and on every mesh up to rounding.
    """
    model = spec.model(setup.model)
    key = jax.random.key(setup.seed)
    if mesh is None:
        return _initial_state(model, tx, key)
    # The momenta of a jitted program lie where its outputs are asked to.
    jitted = jax.jit(functools.partial(_state, model, tx), out_shardings=shardings(model, tx, mesh))
    return jitted(key)


def shardings(model: Model, tx: optax.GradientTransformation, mesh: Mesh) -> Any:
    """A `State` of `NamedSharding`s; the mesh must be ambient."""
    state, params = shapes(model, tx), model.shardings(mesh)
    opt_state = optax_muon.state_shardings(tx, state.params, params)
    bias: Any = None if state.bias is None else NamedSharding(mesh, P())
    return State(params, opt_state, bias)


def abstract(model: Model, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state as `ShapeDtypeStruct`s on a mesh, which must be ambient."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes(model, tx),
        shardings(model, tx, mesh),
    )


def shapes(model: Model, tx: optax.GradientTransformation) -> State:
    """The state as `ShapeDtypeStruct`s, wherever it may lie."""
    key = jax.eval_shape(jax.random.key, 0)  # none is made: the ambient mesh may be of no computer
    return jax.eval_shape(functools.partial(_state, model, tx), key)


def _state(model: Model, tx: optax.GradientTransformation, key: jax.Array) -> State:
    params = model.init(key)
    return State(params, tx.init(params), model.zero_bias())


# ---- the loop ------------------------------------------------------------------------------------


def train(
    setup: TrainConfig,
    trial: Trial,
    corpus: Corpus,
    state: State,
    done: int = 0,
    placement: Devices = SINGLE_DEVICE,
) -> Iterator[tuple[StepMetrics, State]]:
    """Train from step `done` to the end of the schedule.

    Args:
        setup: what all trials share.
        trial: the optimizer.
        corpus: the text.
        state: after `done` steps; it is donated, so use the yielded one instead.
        done: steps already taken.
        placement: devices and micro-batches; its mesh, if it has one, must be ambient.

    Yields:
        The record of each step and the state after it, valid until the next one is asked for.

    Raises:
        Diverged: at the first loss, gradient or held-out loss that is not finite.
    """
    context, sequences = setup.model.context, setup.batch // placement.accumulate

    def batch(number: int) -> Batch:
        size = setup.batch_at(number)
        places = starts(corpus.train, setup.seed, number, size, context).reshape(-1, sequences)
        return placement.sequences(corpus.train, places, context), None

    def held_out(state: State) -> float:
        return evaluate(setup, state, corpus, placement)

    return take_steps(setup, trial, state, done, batch, held_out)


Batch = tuple[ArrayLike, ArrayLike | None]
"""Tokens and weights of a step, as `step` takes them."""


def take_steps(
    setup: TrainConfig,
    trial: Trial,
    state: State,
    done: int,
    batch: Callable[[int], Batch],
    held_out: Callable[[State], float],
) -> Iterator[tuple[StepMetrics, State]]:
    """Take the steps after `done`, whatever they learn; yields and raises as `train`.

    Args:
        setup: what all trials share.
        trial: the optimizer.
        state: after `done` steps; it is donated.
        done: steps already taken.
        batch: of a step, counted from 1.
        held_out: the held-out loss of a state.
    """
    model, tx = spec.model(setup.model), transformation(trial, setup)
    schedule = setup.learning_rate(trial.tuning.lr)
    for number in range(done + 1, setup.steps + 1):
        tokens, weights = batch(number)
        rate = np.float32(setup.bias_rate(number - 1))
        start = time.perf_counter()
        state, told = _step(model, tx, state, tokens, rate, weights)
        told = {name: np.asarray(value).tolist() for name, value in told.items()}
        seconds = time.perf_counter() - start
        record = StepMetrics(number, lr=float(schedule(number - 1)), seconds=seconds, **told)
        if number % setup.eval_every == 0 or number == setup.steps:
            record = dataclasses.replace(record, val_loss=held_out(state))
        yield _finite(record, trial), state


def evaluate(
    setup: TrainConfig, state: State, corpus: Corpus, placement: Devices = SINGLE_DEVICE
) -> float:
    """Mean loss over the held-out sequences of the setup, in nats per token."""
    context, rows = setup.model.context, setup.batch // placement.accumulate
    places = held_out_starts(corpus.held_out, setup.eval_sequences, context)
    count = len(places)
    # Filled up to whole micro-batches with sequences that weigh nothing.
    places = np.resize(places, -(-count // rows) * rows)
    shares = (np.arange(len(places)) < count).astype(np.float32) * (len(places) / count)
    tokens = placement.sequences(corpus.held_out, places.reshape(-1, rows), context)
    weights = placement.put(np.repeat(shares.reshape(-1, rows, 1), context, axis=2))
    model = spec.model(setup.model)
    return float(_held_out_loss(model, state.params, tokens, state.bias, weights))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(
    model: Model,
    tx: optax.GradientTransformation,
    state: State,
    tokens: jax.Array,
    rate: jax.Array,
    weights: jax.Array | None,
) -> tuple[State, dict[str, jax.Array]]:
    """`step`, and of what it measured that which a record holds."""
    state, (loss, grad_norm, report) = step(model, tx, state, tokens, rate, weights)
    return state, {"loss": loss, "grad_norm": grad_norm, **_told(report)}


def _told(report: ForwardStats | None) -> dict[str, jax.Array]:
    if report is None:
        return {}
    attention = {
        "max_logit": report.max_logits.max(),
        "max_logits": report.max_logits.max(axis=1),
        "high_logits": report.high_logits.mean(),
    }
    if not report.load.size:
        return attention
    return {
        **attention,
        "imbalance": balance.imbalance(report.load).max(),
        "router_entropy": report.entropy.mean(),
    }


_initial_state = jax.jit(_state, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=0)
def _held_out_loss(
    model: Model,
    params: optax.Params,
    tokens: jax.Array,
    bias: jax.Array | None,
    weights: jax.Array,
) -> jax.Array:
    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return next_token_loss(model, params, part[0], bias, part[1])[0]

    return jax.lax.map(one, (tokens, weights)).mean()


def _finite(record: StepMetrics, trial: Trial) -> StepMetrics:
    for name in ("loss", "grad_norm", "val_loss"):
        value = getattr(record, name)
        if value is not None and not math.isfinite(value):
            raise Diverged(f"{trial.name}: {name} is {value} at step {record.step}")
    return record
