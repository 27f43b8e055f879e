"""Fine-tuning on prompts and answers: a pretrained model, one optimizer, a line down to zero.

The paper pretrains and fine-tunes with Muon and with AdamW, in all four ways: two epochs, the
learning rate falling linearly from 5e-5 to 0 (arXiv 2502.16982, section 3.5). The loss is that of
the answers alone (`answers.py`); a batch's is the mean over all its answers' tokens. Router biases
stay as pretraining left them, as in the paper's last stage.

A run of it is a run like any other (`run.py`, `folder.py`), of one trial: `sample` and
`spectra` read it, and it goes on after a stop, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_muon.errors import UsageError
from optax_muon.models import spec
from optax_muon.models.spec import Model
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.prompts import VOCAB, PromptDataset, TokenBatch, rows
from optax_muon.training.initialize import PretrainedSource
from optax_muon.training.loop import Batch, State, StepMetrics, take_steps
from optax_muon.training.optimizers import Trial, transformation

LINEAR = "linear"


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """A setup whose learning rate falls along a line, from its peak in the first step to 0.

    Attributes:
        epochs: how often every example is seen.
    """

    schedule: str = LINEAR
    epochs: int = 2

    def learning_rate(self, peak: float) -> optax.Schedule:
        """Learning rate by step, from 0.

        >>> from optax_muon.training.presets import PRESETS
        >>> setup = FinetuneConfig(PRESETS["tiny"].model, 8, 100, 0, 20, 1)
        >>> [round(float(setup.learning_rate(5e-5)(step)), 7) for step in (0, 50, 100)]
        [5e-05, 2.5e-05, 0.0]
        """
        return optax.linear_schedule(peak, 0.0, self.steps)


class Pretrained(NamedTuple):
    """Where fine-tuning begins."""

    model: Model
    params: optax.Params
    bias: jax.Array | None
    """Router biases, `[moe_depth, experts]` float32; None where there is no router."""


class EvalResult(NamedTuple):
    """What a model makes of examples."""

    loss: float
    """Mean over the answers' tokens, nats."""
    exact: float
    """Share of the answers of which every token, the end too, is the likeliest one: greedy decoding
    writes them without a fault."""


def pretrained(run: Path, trial: str | None = None) -> Pretrained:
    """The model of a run, with its newest parameters.

    Args:
        run: a folder of `optax-muon train`, `finetune` or `import-hf`.
        trial: whose parameters; None is the last one that has any.

    Raises:
        UsageError: when there is no run, it has no such checkpoint, or its tokens are no bytes.
    """
    start = PretrainedSource(run, trial)
    model = start.model
    if model.config.vocab_size != VOCAB:
        raise UsageError(
            f"{run} has a vocabulary of {model.config.vocab_size}; finetune reads bytes, it must "
            f"be {VOCAB}"
        )
    return Pretrained(model, *start.weights())


def begin(start: Pretrained, setup: FinetuneConfig, trial: Trial) -> State:
    """The state before the first step; what `start` holds is copied, as steps donate theirs."""
    params = jax.tree.map(jnp.copy, start.params)
    bias = None if start.bias is None else jnp.copy(start.bias)
    return State(params, jax.jit(transformation(trial, setup).init)(params), bias)


def finetune(
    setup: FinetuneConfig, trial: Trial, answers: PromptDataset, state: State, done: int = 0
) -> Iterator[tuple[StepMetrics, State]]:
    """Train on answers from step `done` to the end.

    Args:
        setup: its `steps` are `answers.steps` of the training part.
        trial: the optimizer.
        answers: the examples.
        state: after `done` steps; it is donated, so use the yielded one instead.
        done: steps already taken.

    Yields:
        The record of each step and the state after it, valid until the next one is asked for.

    Raises:
        Diverged: at the first loss, gradient or held-out loss that is not finite.
    """
    model = spec.model(setup.model)

    def batch(number: int) -> Batch:
        places = rows(len(answers.train), setup.seed, number, setup.batch, setup.epochs)
        examples = answers.train.at(places)
        return examples.tokens[None], examples.weights[None]

    def held_out(state: State) -> float:
        return judge(model, state.params, state.bias, answers.held_out, setup.batch).loss

    return take_steps(setup, trial, state, done, batch, held_out)


def judge(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    examples: TokenBatch,
    batch: int,
) -> EvalResult:
    """What a model makes of examples, `batch` of them at a time."""
    places = np.arange(-(-len(examples) // batch) * batch)
    places[len(examples) :] = -1
    parts = map(examples.at, places.reshape(-1, batch))
    found = [_judge(model, params, bias, part.tokens, part.weights) for part in parts]
    loss, exact = np.sum(np.asarray(found, np.float64), axis=0)
    return EvalResult(loss / float(examples.weights.sum()), exact / len(examples))


@functools.partial(jax.jit, static_argnums=0)
def _judge(
    model: Model,
    params: optax.Params,
    bias: jax.Array | None,
    tokens: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses of all answers' tokens, and how many answers are exact."""
    scores, _ = model.forward(params, tokens[:, :-1], bias)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
    right = (scores.argmax(axis=-1) == tokens[:, 1:]) | (weights == 0)
    exact = right.all(axis=1) & (weights.sum(axis=1) > 0)
    return (losses * weights).sum(), exact.sum()
