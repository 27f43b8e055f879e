"""Time the optimizer's share of a training step: AdamW, ours and optax.contrib.muon.

The models are presets of `optax-muon train` at several batch sizes, on random tokens. A step
computes loss and gradient, updates the parameters, and is one program that donates parameters and
state. The optimizer's share is the part of the step's time by which it exceeds the gradient alone.

    python benchmarks/share_of_step.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import _bench
import _jax
import _table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import optax_muon
from optax_muon.models import spec
from optax_muon.training.presets import PRESETS
from optax_muon.training.state import State
from optax_muon.training.step import next_token_loss, update

GRADIENT, ADAMW, OURS, OPTAX = "gradient", "adamw", "ours", "optax"
BATCHES = {"small": (4, 16, 64), "medium": (1, 4, 16), "base": (1, 4)}
TOY = {"tiny": (1,)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A preset's model and the number of sequences in a step."""

    preset: str
    batch: int

    def __str__(self) -> str:
        return f"{self.preset}, {self.batch * PRESETS[self.preset].model.context} tokens"


@dataclasses.dataclass(frozen=True)
class StepTime(_bench.TimedRow):
    """A step with one optimizer, or the gradient alone."""

    share: float
    """Fraction of the step's time that the optimizer takes."""
    over_adamw: float
    """Ratio of the step's time to that with AdamW."""


def main(options: _bench.Options) -> None:
    """Measure and write the results."""
    batches = TOY if options.quick else BATCHES
    cases = [Case(preset, batch) for preset in batches for batch in batches[preset]]
    measured = functools.partial(measure, repeats=options.repeats)
    _bench.run(options, "share_of_step", StepTime, cases, measured, page, picture)


def measure(case: Case, repeats: int) -> list[StepTime]:
    """Time the steps of a case."""
    times = _bench.measure_in_rounds(implementations(case), repeats)
    return [
        StepTime(
            str(case),
            name,
            **each.milliseconds(),
            rounds=len(each.seconds),
            share=round(1 - times[GRADIENT].over(each), 4),
            over_adamw=round(each.over(times[ADAMW]), 4),
        )
        for name, each in times.items()
    ]


def implementations(case: Case) -> dict[str, _bench.Implementation]:
    """The gradient alone, and a step with each optimizer."""
    sizes = PRESETS[case.preset].model
    model = spec.model(sizes)
    shape = (case.batch, sizes.context + 1)
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(sizes.vocab_size, size=shape, dtype=np.int32)
    )
    params = jax.jit(model.init)(jax.random.key(0))
    loss = functools.partial(next_token_loss, model)
    gradient = jax.value_and_grad(lambda params, tokens: loss(params, tokens)[0])
    transformations = {
        ADAMW: optax.adamw(_jax.MUON["learning_rate"], b2=0.95),
        OURS: optax_muon.muon(**_jax.MUON),
        OPTAX: _jax.contrib_muon(params),
    }
    alone = jax.jit(gradient).lower(params, tokens).compile()
    return {
        GRADIENT: functools.partial(alone, params, tokens),
        **{name: Step(gradient, tx, params, tokens) for name, tx in transformations.items()},
    }


class Step:
    """A training state: every call takes the next step, on the same tokens."""

    def __init__(
        self, gradient: Any, tx: optax.GradientTransformation, params: Any, tokens: jax.Array
    ):
        def step(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
            loss, grads = gradient(state.params, tokens)
            return update(tx, state, grads), loss

        own = jax.tree.map(lambda leaf: leaf.copy(), params)
        self._state, self._tokens = State(own, jax.jit(tx.init)(own)), tokens
        self._step = jax.jit(step, donate_argnums=0).lower(self._state, tokens).compile()

    def __call__(self) -> Any:
        """Take one step."""
        self._state, loss = self._step(self._state, self._tokens)
        return self._state, loss


def page(rows: Sequence[StepTime]) -> list[str]:
    """The Markdown page."""
    optimizers = (ADAMW, OURS, OPTAX)
    heads = (
        "model and batch",
        *(f"{name}, ms" for name in (GRADIENT, *optimizers)),
        *(f"share of {name}" for name in optimizers),
        *(f"{name} / {ADAMW}" for name in (OURS, OPTAX)),
    )
    cells = (
        (
            case,
            *(_spread(found[name]) for name in (GRADIENT, *optimizers)),
            *(f"{found[name].share:.1%}" for name in optimizers),
            *(f"{found[name].over_adamw:.2f}" for name in (OURS, OPTAX)),
        )
        for case, found in _bench.by_case(rows).items()
    )
    title = "The optimizer's share of a training step"
    return [*_bench.page_head(title, __doc__), *_table.markdown(heads, cells)]


def _spread(row: StepTime) -> str:
    return f"{row.median_ms:.4g} [{row.lower_ms:.4g}, {row.upper_ms:.4g}]"


def picture(rows: Sequence[StepTime]) -> Any:
    """The steps' times over that with AdamW."""
    cases = list(dict.fromkeys(row.case for row in rows))
    series = {
        name: {row.case: row.over_adamw for row in rows if row.implementation == name}
        for name in (GRADIENT, OURS, OPTAX)
    }
    title = "A training step: time over that with AdamW"
    return _bench.ratios(cases, series, title, "ratio, log scale")


if __name__ == "__main__":
    main(tyro.cli(_bench.Options))
