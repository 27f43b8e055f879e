"""A ladder of sizes for a scaling law: models, tokens, batches and learning rates from a budget.

The largest size takes as many operations as the budget allows; each size below takes a quarter of
those of the next one. Operations are counted as `6 N D`, parameters `N` times tokens `D`, with a
fixed ratio of `D` to `N`: 20 is compute-optimal for language models of many sizes (Hoffmann et al.,
arXiv 2203.15556).

Batch and learning rate only start a search. They lie on power laws through two optima: that of
this package at 6e11 operations (`benchmarks/results/scaling_law`, 48 x 2), and that of arXiv
2502.16982, table 2, at 2e19.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable

from optax_muon.errors import UsageError
from optax_muon.models import spec
from optax_muon.models.spec import Config
from optax_muon.training.config import TrainConfig
from optax_muon.training.optimizers import HyperParams

FACTOR = 4.0
"""Ratio of the operations of neighbouring sizes."""
WIDTHS = range(16, 1032, 8)
"""Hidden sizes of the models."""
MIN_STEPS = 20
"""Fewest steps of a run: two of them warm up."""
EVAL_SEQUENCES = 512
"""Held-out sequences of the evaluation at the end."""
BIAS_CHANGE = 4.0
"""How far a router bias may move in a run; scores are in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best batch and learning rate of AdamW that a study found."""

    flops: float
    """6 N D of the run."""
    batch_tokens: float
    """Tokens in a step."""
    lr: float
    """Peak learning rate."""


HERE = Optimum(6 * 67_824 * 1_356_288, 4 * 128, 6e-3)
PAPER = Optimum(6 * 399e6 * 8.92e9, 96 * 8192, 9.503e-4)
WEIGHT_DECAY = 0.1


def optimum(flops: float) -> Optimum:
    """The batch and the learning rate for this many operations, on the laws through both optima.

    >>> optimum(PAPER.flops).batch_tokens == PAPER.batch_tokens
    True
    """
    share = math.log(flops / HERE.flops) / math.log(PAPER.flops / HERE.flops)

    def between(here: float, paper: float) -> float:
        return here * (paper / here) ** share

    batch = between(HERE.batch_tokens, PAPER.batch_tokens)
    return Optimum(flops, batch, between(HERE.lr, PAPER.lr))


@dataclasses.dataclass(frozen=True)
class Rung:
    """One size of the ladder."""

    config: TrainConfig
    """The model, and how long it is trained."""
    parameters: int
    """Parameters that multiply a token."""
    hyper_params: HyperParams
    """Where the search of the learning rate begins."""

    @property
    def tokens(self) -> int:
        """Tokens of a run."""
        return self.config.steps * self.config.batch * self.config.model.context

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6.0 * self.parameters * self.tokens

    @property
    def name(self) -> str:
        """Its name in tables, and of its folder."""
        model = self.config.model
        return f"{model.hidden_size}x{model.num_hidden_layers}"


def ladder(
    kind: str,
    budget: float,
    sizes: int,
    runs: int,
    *,
    tokens_per_parameter: float = 20.0,
    context: int = 128,
    seed: int = 0,
) -> list[Rung]:
    """The sizes whose runs together take a budget, the smallest first.

    Args:
        kind: A key of `spec.REGISTRY`.
        budget: Operations of all runs.
        sizes: Number of sizes.
        runs: Runs at each size.
        tokens_per_parameter: Tokens of a run over the model's parameters.
        context: Tokens of a sequence.
        seed: Seed of the search.

    Raises:
        UsageError: The kind has no small models, or the budget is too small.

    >>> [(rung.name, rung.config.steps) for rung in ladder("llama", 3e13, sizes=3, runs=12)]
    [('32x2', 2612), ('48x2', 2649), ('64x2', 2544)]
    """
    largest = budget / runs / sum(FACTOR**-place for place in range(sizes))
    rungs = [
        _rung(kind, largest / FACTOR**place, tokens_per_parameter, context, seed)
        for place in reversed(range(sizes))
    ]
    names = [rung.name for rung in rungs]
    if len(set(names)) < sizes:
        raise UsageError(
            f"--budget is {budget:g}; {sizes} different sizes need more, or give fewer --sizes"
        )
    return rungs


def _rung(kind: str, flops: float, ratio: float, context: int, seed: int) -> Rung:
    wanted = math.sqrt(flops / (6 * ratio))
    model, parameters = _nearest(kind, wanted, context)
    start = optimum(flops)
    batch = max(1, round(start.batch_tokens / context))
    steps = max(MIN_STEPS, round(ratio * parameters / (batch * context)))
    bias_speed = BIAS_CHANGE / steps if spec.model(model).has_router else 0.0
    config = TrainConfig(
        model, batch, steps, seed, steps, EVAL_SEQUENCES, bias_update_speed=bias_speed
    )
    return Rung(config, parameters, HyperParams(float(f"{start.lr:.2g}"), WEIGHT_DECAY))


def _nearest(kind: str, wanted: float, context: int) -> tuple[Config, int]:
    """The model of this kind whose number of parameters is nearest, and that number."""
    row = spec.REGISTRY.get(kind)
    if row is None or row.of_width is None:
        accepted = ", ".join(name for name, each in spec.REGISTRY.items() if each.of_width)
        raise UsageError(f"--model is {kind}; models of many sizes are {accepted}")
    count = functools.partial(_parameters, row.of_width)
    above = bisect.bisect_left(WIDTHS, wanted, key=count)
    around = WIDTHS[max(0, above - 1) : above + 1]
    width = min(around, key=lambda width: abs(math.log(count(width) / wanted)))
    return dataclasses.replace(row.of_width(width), context=context), count(width)


@functools.cache
def _parameters(of_width: Callable[[int], Config], width: int) -> int:
    """The parameters of the model of this width."""
    return spec.model(of_width(width)).active
