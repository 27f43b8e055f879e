"""Fine-tuning on prompt-completion pairs.

The paper pretrains and fine-tunes with Muon and with AdamW, in all four combinations: two epochs,
the learning rate falling linearly from 5e-5 to 0 (arXiv 2502.16982, section 3.5). The loss is that
of the completions alone (`data/prompts.py`); that of a batch is the mean over the tokens of all its
completions. Router biases stay as pretraining left them, as in the paper's last stage.

Everything else is as in pretraining: the same loop and the same run folder, with one more entry in
`config.json` (`epochs`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax

from optax_muon.models import spec
from optax_muon.models.spec import Model
from optax_muon.training.config import LINEAR, TrainConfig
from optax_muon.training.data.prompts import PromptDataset, TokenBatch, rows, steps
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.loop import Batch
from optax_muon.training.state import State


class EvalResult(NamedTuple):
    """How well a model predicts completions."""

    loss: float
    """Mean over the completions' tokens, nats."""
    exact: float
    """Fraction of the completions of which every token, the end included, is the likeliest one:
    greedy decoding writes them without a mistake."""


def finetune_config(
    model: Model, dataset: PromptDataset, *, batch: int, epochs: int, seed: int, eval_every: int
) -> TrainConfig:
    """What all trials of a fine-tuning run share."""
    return TrainConfig(
        model.config,
        batch,
        steps(len(dataset.train), batch, epochs),
        seed,
        eval_every,
        len(dataset.held_out),
        LINEAR,
        epochs=epochs,
    )


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """Learn the completions of prompts; a `loop.Task`."""

    config: TrainConfig
    """What all trials share; its `epochs` are given."""
    dataset: PromptDataset
    """The pairs."""
    devices: Devices = SINGLE_DEVICE
    """Devices and micro-batches; the mesh, if there is one, must be ambient."""

    def batch(self, number: int) -> Batch:
        """Examples of the training part; see `loop.Task`."""
        config, train = self.config, self.dataset.train
        assert config.epochs is not None
        places = rows(len(train), config.seed, number, config.batch, config.epochs)
        tokens, weights = (
            self.devices.put(array.reshape(self.devices.accumulate, -1, array.shape[-1]))
            for array in train.take(places)
        )
        return tokens, weights

    def held_out_loss(self, state: State) -> float:
        """Mean over the tokens of the held-out completions, nats."""
        return mean_loss(*self._evaluated(state.params, state.bias))

    def evaluate(self, params: optax.Params, bias: jax.Array | None) -> EvalResult:
        """Evaluate parameters on the held-out completions."""
        return evaluate(*self._evaluated(params, bias))

    def _evaluated(self, params: optax.Params, bias: jax.Array | None) -> Evaluated:
        """What is evaluated, as many examples at a time as a micro-batch has."""
        rows = self.config.batch // self.devices.accumulate
        model = spec.model(self.config.model)
        return model, params, bias, self.dataset.held_out, rows, self.devices


Evaluated = tuple[Model, optax.Params, jax.Array | None, TokenBatch, int, Devices]
"""The arguments of `evaluate`."""


def evaluate(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    examples: TokenBatch,
    batch: int,
    devices: Devices = SINGLE_DEVICE,
) -> EvalResult:
    """Evaluate a model on examples, `batch` of them at a time."""
    # Two passes: with the loss of the same logits, jax 0.9 holds them twice.
    loss = mean_loss(model, params, bias, examples, batch, devices)
    parts = _parts(examples, batch, devices)
    exact = sum(int(_exact(model, params, bias, *part)) for part in parts)
    return EvalResult(loss, exact / len(examples))


def mean_loss(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    examples: TokenBatch,
    batch: int,
    devices: Devices = SINGLE_DEVICE,
) -> float:
    """The loss of `EvalResult`; logits are in memory as far as they are in training."""
    parts = _parts(examples, batch, devices)
    loss = sum(float(_loss(model, params, bias, *part)) for part in parts)
    return loss / float(examples.weights.sum())


def _parts(
    examples: TokenBatch, batch: int, devices: Devices
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Tokens and weights `[1, batch, ..]` on the devices; rows of weight 0 fill up the last."""
    places = np.arange(-(-len(examples) // batch) * batch)
    places[len(examples) :] = -1
    for part in places.reshape(-1, batch):
        tokens, weights = examples.take(part)
        yield devices.put(tokens[None]), devices.put(weights[None])


@functools.partial(jax.jit, static_argnums=0)
def _loss(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    tokens: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Sum of the losses of all completions' tokens."""
    losses, _ = model.losses(params, tokens[0, :, :-1], tokens[0, :, 1:], bias)
    return (losses * weights[0]).sum()


@functools.partial(jax.jit, static_argnums=0)
def _exact(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    tokens: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """How many completions are exact; needs all logits of its rows, as `losses` names no token."""
    tokens, weights = tokens[0], weights[0]
    scores, _ = model.forward(params, tokens[:, :-1], bias)
    right = (scores.argmax(axis=-1) == tokens[:, 1:]) | (weights == 0)
    return (right.all(axis=1) & (weights.sum(axis=1) > 0)).sum()
