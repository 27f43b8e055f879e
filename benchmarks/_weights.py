"""Rows that also say how large the weights and the activations have become."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import Results
from _runs import Finished

from optax_muon.models import spec
from optax_muon.models.spec import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighed(Finished):
    """A run, its outcome, and root mean squares at its end."""

    query_rms: float
    """RMS of the query projections."""
    mlp_rms: float
    """RMS of the three matrices of the MLPs."""
    hidden_rms: float
    """RMS of the last block's output on held-out text."""

    @classmethod
    def measure(
        cls, model: Config, params: optax.Params, bias: jax.Array | None, tokens: np.ndarray
    ) -> dict[str, Any]:
        """The root mean squares."""
        del bias  # its models have no router
        found = {
            "query_rms": rms(params["layers"]["attn"]["q_proj"]),
            "mlp_rms": rms(params["layers"]["mlp"]),
            "hidden_rms": hidden_rms(model, params, tokens),
        }
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def weighed(results: Results) -> list[Weighed]:
    """The runs of an experiment whose rows are of this kind."""
    return [row for row in results.finished if isinstance(row, Weighed)]


def rms(tree: Any) -> float:
    """The root mean square of all numbers of a tree."""
    leaves = jax.tree.leaves(tree)
    return float(np.sqrt(sum(jnp.sum(x**2) for x in leaves) / sum(x.size for x in leaves)))


def hidden_rms(model: Config, params: optax.Params, tokens: np.ndarray) -> float:
    """The RMS of what the final norm of a model is given."""
    seen = []

    def look(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.name == "final_norm":
            seen.append(rms(args[0]))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        spec.model(model).forward(params, jnp.asarray(tokens[:, :-1]))
    return seen[0]
