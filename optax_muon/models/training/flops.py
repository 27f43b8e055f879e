"""How many floating-point operations a step costs: the model's and the optimizer's.

A multiplication and an addition count two. The model's are 6 per token and multiplying parameter
(2 forward, 4 backward; Kaplan et al., arXiv 2001.08361, section 2.1) and `12 t width` per token and
layer for the attention scores (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B). Embedding
look-ups, norms and AdamW's dozen operations per parameter are left out: with the 2048 tokens of a
`small` step, about a thousandth. Work that the backward pass repeats to save memory is not counted.

Muon's Newton-Schulz on an `m x n` matrix, `m <= n`, is 5 steps of `X X^T`, `A A`, `B X`, that is of
`4 m^2 n + 2 m^3` operations (paper, arXiv 2502.16982, section 2.1).
"""

from __future__ import annotations

import jax
import optax

import optax_muon
from optax_muon.models.training.contestants import Contestant
from optax_muon.models.training.train import Setup

NEWTON_SCHULZ_STEPS = 5


def step_flops(setup: Setup, contestant: Contestant, params: optax.Params) -> int:
    """Operations of one training step: model and optimizer."""
    optimizer = newton_schulz_flops(params) if contestant.optimizer == "muon" else 0
    return model_flops(setup, params) + optimizer


def model_flops(setup: Setup, params: optax.Params) -> int:
    """Operations of one step's forward and backward pass."""
    model = setup.model
    lookups = 0 if model.tie else model.vocab * model.width
    multiplying = sum(leaf.size for leaf in jax.tree.leaves(params)) - lookups
    scores = 12 * model.depth * model.context * model.width
    return setup.tokens_per_step * int(6 * multiplying + scores)


def newton_schulz_flops(params: optax.Params) -> int:
    """Operations of Muon's polynomial over all matrices that `optax_muon.label` gives it.

    >>> import jax.numpy as jnp
    >>> newton_schulz_flops({"dense": {"kernel": jnp.ones([8, 16])}})  # 5 (4 * 64 * 16 + 2 * 512)
    25600
    """
    blocks = (block for row in optax_muon.label(params).rows for block in row.blocks)
    return sum(
        NEWTON_SCHULZ_STEPS * block.batch * (4 * m * m * n + 2 * m**3)
        for block in blocks
        for m, n in [sorted((block.rows, block.cols))]
    )
