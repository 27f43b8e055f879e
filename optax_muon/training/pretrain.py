"""Pretraining: random windows of a corpus, evaluated on windows of its held-out part."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import optax

from optax_muon.models import spec
from optax_muon.models.spec import Model
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import Corpus, held_out_starts, starts
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.loop import Batch
from optax_muon.training.state import State
from optax_muon.training.step import next_token_loss


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Learn the next token of a corpus; a `loop.Task`."""

    config: TrainConfig
    """What all trials share."""
    corpus: Corpus
    """The text."""
    devices: Devices = SINGLE_DEVICE
    """Devices and micro-batches; the mesh, if there is one, must be ambient."""

    def batch(self, number: int) -> Batch:
        """Windows of the training part; see `loop.Task`."""
        config, tokens = self.config, self.corpus.train
        size, context = config.batch_at(number), config.model.context
        places = starts(tokens, config.seed, number, size, context).reshape(-1, self._rows)
        return self.devices.sequences(tokens, places, context), None

    def held_out_loss(self, state: State) -> float:
        """Mean loss over `eval_sequences` held-out windows, nats per token."""
        context, tokens = self.config.model.context, self.corpus.held_out
        places = held_out_starts(tokens, self.config.eval_sequences, context)
        count = len(places)
        # Filled up to whole micro-batches with sequences of weight 0.
        places = np.resize(places, -(-count // self._rows) * self._rows)
        shares = (np.arange(len(places)) < count).astype(np.float32) * (len(places) / count)
        windows = self.devices.sequences(tokens, places.reshape(-1, self._rows), context)
        weights = np.repeat(shares.reshape(-1, self._rows, 1), context, axis=2)
        model = spec.model(self.config.model)
        weights_on_devices = self.devices.put(weights)
        return float(_mean_loss(model, state.params, windows, state.bias, weights_on_devices))

    @property
    def _rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.config.batch // self.devices.accumulate


@functools.partial(jax.jit, static_argnums=0)
def _mean_loss(
    model: Model,
    params: optax.Params,
    tokens: jax.Array,
    bias: jax.Array | None,
    weights: jax.Array,
) -> jax.Array:
    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return next_token_loss(model, params, part[0], bias, part[1])[0]

    return jax.lax.map(one, (tokens, weights)).mean()
