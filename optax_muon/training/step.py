"""One step of training: gradients, the optimizer, the router biases.

`step` is the whole of training in one function, for any model and any mesh. With the state as
shapes alone it compiles without a parameter in memory:

    with jax.set_mesh(mesh):
        state = abstract(model, tx, mesh)
        jax.jit(step, static_argnums=(0, 1)).lower(model, tx, state, tokens, speed).compile()
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_muon.models.moe import balance
from optax_muon.models.spec import ForwardStats, Model
from optax_muon.training.state import State


class StepAux(NamedTuple):
    """What a step measures before its update."""

    loss: jax.Array
    """Mean over the step's tokens, nats."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    stats: ForwardStats | None
    """Statistics of all micro-batches together; None if the model has none."""


def step(
    model: Model,
    tx: optax.GradientTransformation,
    state: State,
    tokens: jax.Array,
    bias_update_speed: jax.Array | float = 0.0,
    weights: jax.Array | None = None,
    **extra: Any,
) -> tuple[State, StepAux]:
    """Take one step of training.

    To be jitted with `model` and `tx` static. Accumulating `k` micro-batches gives the numbers of
    one large batch: the gradient of the mean over all tokens, the sum of the expert loads, the
    largest of the logits. One micro-batch is in memory at a time.

    Args:
        model: The model.
        tx: The optimizer; it gets `max_logits`, `[depth, heads]`, for `optax_muon.qk_clip`.
        state: State before the step; on a mesh as `shardings` lays it out.
        tokens: `[k, b, t + 1]` int32; on a mesh, `b` lies over the batch axes.
        bias_update_speed: Change of a router bias, float32; the caller evaluates its schedule.
        weights: Weights of the predictions of `tokens[..., 1:]`, `[k, b, t]` float32, such as 1 for
            completions and 0 for prompts; the loss is the weighted mean. None weighs all equally.
        extra: What the optimizer's `update` takes beside these.

    Returns:
        The state after the step, and what was measured in it.
    """
    grads, loss, stats = gradients(model, state, tokens, weights)
    if stats is not None:
        extra["max_logits"] = stats.max_logits
    new = update(tx, state, grads, **extra)
    if stats is not None and state.bias is not None:
        new = new._replace(bias=balance.update_bias(state.bias, stats.load, bias_update_speed))
    return new, StepAux(loss, optax.tree.norm(grads), stats)


def gradients(
    model: Model, state: State, tokens: jax.Array, weights: jax.Array | None = None
) -> tuple[optax.Updates, jax.Array, ForwardStats | None]:
    """Gradient, loss and statistics of all micro-batches together; the arguments are `step`'s."""
    parts = tokens.shape[0]
    if weights is not None:
        weights = weights * (weights.size / weights.sum())

    def one(tokens: jax.Array, weights: jax.Array | None) -> Any:
        loss = jax.value_and_grad(next_token_loss, argnums=1, has_aux=True)
        (value, stats), grads = loss(model, state.params, tokens, state.bias, weights)
        return grads, value, stats

    if parts == 1:
        return one(tokens[0], None if weights is None else weights[0])

    def add(total: optax.Updates, part: Any) -> tuple[optax.Updates, Any]:
        grads, value, stats = one(*part)
        # Without the barrier libtpu moves sums over devices out of the loop, and fails at some.
        grads = jax.lax.optimization_barrier(grads)
        total = jax.tree.map(lambda a, b: a + b * (1 / parts), total, grads)
        return total, (value, stats)

    zero = jax.tree.map(jnp.zeros_like, state.params)
    grads, (losses, stats) = jax.lax.scan(add, zero, (tokens, weights))
    return grads, losses.mean(), merge_stats(stats)


def merge_stats(stats: ForwardStats | None) -> ForwardStats | None:
    """The statistics of micro-batches, stacked along a first axis, as those of one batch."""
    if stats is None:
        return None
    return stats._replace(
        max_logits=stats.max_logits.max(axis=0),
        high_logits=stats.high_logits.mean(axis=0),
        load=stats.load.sum(axis=0),
        entropy=stats.entropy.mean(axis=0),
    )


def update(
    tx: optax.GradientTransformation, state: State, grads: optax.Updates, **extra: Any
) -> State:
    """One step of the optimizer alone; `extra` goes to its `update`."""
    tx = optax.with_extra_args_support(tx)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
    return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def next_token_loss(
    model: Model,
    params: optax.Params,
    tokens: jax.Array,
    bias: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, ForwardStats | None]:
    """Cross-entropy of each next token in nats, and the model's statistics.

    Args:
        model: The model.
        params: The parameters.
        tokens: `[b, t + 1]` int32.
        bias: The router biases; None if the model has no router.
        weights: `[b, t]` float32. The loss is the sum over tokens of weight and cross-entropy, over
            the number of tokens. None is a weight of 1.
    """
    losses, stats = model.losses(params, tokens[:, :-1], tokens[:, 1:], bias)
    return (losses if weights is None else losses * weights).mean(), stats
