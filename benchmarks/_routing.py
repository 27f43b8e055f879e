"""Rows that also say how even the experts' loads are, and how large the attention logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import Results
from _runs import Finished

from optax_muon.models import spec
from optax_muon.models.moe import imbalance
from optax_muon.models.spec import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed(Finished):
    """A run of a mixture of experts, its outcome, and what its routers and heads do at its end."""

    largest_share: float
    """Tokens of the fullest expert of all layers over an even share, on held-out text."""
    max_logit: float
    """Largest attention logit of all heads, on held-out text."""

    @classmethod
    def measure(
        cls, model: Config, params: optax.Params, bias: jax.Array | None, tokens: np.ndarray
    ) -> dict[str, Any]:
        """The statistics of a forward pass."""
        _, stats = spec.model(model).forward(params, jnp.asarray(tokens[:, :-1]), bias)
        if stats is None:
            raise TypeError(f"{type(model).__name__} has no statistics; give a model with experts")
        found = {
            "largest_share": 1 + imbalance(stats.load).max(),
            "max_logit": stats.max_logits.max(),
        }
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def routed(results: Results) -> list[Routed]:
    """The runs of an experiment whose rows are of this kind."""
    return [row for row in results.finished if isinstance(row, Routed)]
