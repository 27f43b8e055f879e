"""How many floating-point operations a step costs: the model's and the optimizer's.

A multiplication and an addition count two. The model's are 6 per token and parameter that the token
is multiplied with (2 forward, 4 backward; Kaplan et al., arXiv 2001.08361, section 2.1): of experts
those it goes to. Attention scores are another `6 t` per token and feature of all heads' queries and
values (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B: `12 t width` per layer where both have
`width` features). Embedding look-ups and AdamW's dozen operations per parameter are left out: with
the 2048 tokens of a `small` step, about a thousandth. Work that the backward pass repeats to save
memory is not counted.

Muon's Newton-Schulz on an `m x n` matrix, `m <= n`, is 5 steps of `X X^T`, `A A`, `B X`, that is of
`4 m^2 n + 2 m^3` operations (paper, arXiv 2502.16982, section 2.1).
"""

from __future__ import annotations

import optax

import optax_muon
from optax_muon.models import spec
from optax_muon.training.config import TrainConfig
from optax_muon.training.optimizers import Trial, Views, views

NEWTON_SCHULZ_STEPS = 5


def run_flops(setup: TrainConfig, trial: Trial, params: optax.Params, steps: float = 1.0) -> float:
    """Operations of the first steps of a run, model and optimizer; the last may be a part of one.

    Args:
        setup: what all trials share.
        trial: the optimizer.
        params: arrays or `ShapeDtypeStruct`s.
        steps: how many.
    """
    optimizer = 0
    if trial.optimizer == "muon":
        optimizer = newton_schulz_flops(params, views(setup))
    return setup.sequences(steps) * sequence_flops(setup) + steps * optimizer


def sequence_flops(setup: TrainConfig) -> int:
    """Operations of one sequence's forward and backward pass."""
    model, context = spec.model(setup.model), setup.model.context
    return context * 6 * (model.active + context * model.attended)


def newton_schulz_flops(params: optax.Params, views: Views = None) -> int:
    """Operations of Muon's polynomial over all matrices that `optax_muon.label` gives it.

    >>> import jax.numpy as jnp
    >>> newton_schulz_flops({"dense": {"kernel": jnp.ones([8, 16])}})  # 5 (4 * 64 * 16 + 2 * 512)
    25600
    """
    blocks = (block for row in optax_muon.label(params, views).rows for block in row.blocks)
    return sum(
        NEWTON_SCHULZ_STEPS * block.batch * (4 * m * m * n + 2 * m**3)
        for block in blocks
        for m, n in [sorted((block.rows, block.cols))]
    )
