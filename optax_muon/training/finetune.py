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
        return self.evaluate(state.params, state.bias).loss

    def evaluate(self, params: optax.Params, bias: jax.Array | None) -> EvalResult:
        """Evaluate parameters on the held-out completions."""
        model, held_out = spec.model(self.config.model), self.dataset.held_out
        return evaluate(model, params, bias, held_out, self.config.batch, self.devices)


def evaluate(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    examples: TokenBatch,
    batch: int,
    devices: Devices = SINGLE_DEVICE,
) -> EvalResult:
    """Evaluate a model on examples, `batch` of them at a time."""
    places = np.arange(-(-len(examples) // batch) * batch)
    places[len(examples) :] = -1
    found = [
        _evaluate(model, params, bias, *(devices.put(array[None]) for array in examples.take(part)))
        for part in places.reshape(-1, batch)
    ]
    loss, exact = np.sum(np.asarray(found, np.float64), axis=0)
    return EvalResult(loss / float(examples.weights.sum()), exact / len(examples))


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    tokens: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses of all completions' tokens, and how many completions are exact."""
    tokens, weights = tokens[0], weights[0]
    scores, _ = model.forward(params, tokens[:, :-1], bias)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
    right = (scores.argmax(axis=-1) == tokens[:, 1:]) | (weights == 0)
    exact = right.all(axis=1) & (weights.sum(axis=1) > 0)
    return (losses * weights).sum(), exact.sum()
