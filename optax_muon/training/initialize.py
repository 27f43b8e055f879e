"""Where a run begins: at random, or with the parameters of another run or of an imported one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from optax_muon.errors import usage_errors
from optax_muon.models import huggingface, spec
from optax_muon.models.spec import Model
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.config import TrainConfig
from optax_muon.training.loop import State, abstract, init, shapes, shardings
from optax_muon.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class PretrainedSource:
    """A run, or the folder of an import, to take parameters from.

    Attributes:
        path: its folder.
        trial: whose parameters; None is the last one trained.
    """

    path: Path
    trial: str | None = None

    @property
    @usage_errors()
    def model(self) -> Model:
        """Its model.

        Raises:
            UsageError: when there is none.
        """
        return spec.model_of(RunFolder(self.path).read_config())

    @usage_errors()
    def weights(self, mesh: Mesh | None = None) -> tuple[optax.Params, jax.Array | None]:
        """Its newest parameters, and router biases if the model has any, in float32.

        An import that holds no biases has zeros.

        Args:
            mesh: where they are to lie; it is ambient. None is the first device.

        Raises:
            UsageError: when there are none.
        """
        config = RunFolder(self.path).read_config()
        layout = None if mesh is None else self.model.shardings(mesh)
        if "trials" not in config:
            _, params, bias = huggingface.load(self.path, layout)
            params, bias = _in_float32((params, bias))
            return params, self.model.zero_bias() if bias is None else bias
        with Checkpoints(RunFolder(self.path).trained_by(self.trial)) as checkpoints:
            return self._saved(checkpoints, mesh)

    def _saved(
        self, checkpoints: Checkpoints, mesh: Mesh | None
    ) -> tuple[optax.Params, jax.Array | None]:
        """Parameters and biases of the newest checkpoint."""
        none = optax.identity()
        like = shapes(self.model, none) if mesh is None else abstract(self.model, none, mesh)
        saved = checkpoints.some({"params": like.params, "bias": like.bias})
        return saved["params"], saved["bias"]


def begin(
    setup: TrainConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    start: PretrainedSource | None = None,
) -> State:
    """The state before the first step of a run; the mesh, if there is one, is ambient.

    Args:
        setup: what all trials share.
        tx: the optimizer.
        mesh: where the state lies.
        start: whose parameters and router biases; None makes them at random.

    Raises:
        UsageError: as `PretrainedSource.weights`.
    """
    if start is None:
        return init(setup, tx, mesh)
    params, bias = start.weights(mesh)
    model = spec.model(setup.model)
    layout: Any = None if mesh is None else shardings(model, tx, mesh).opt_state
    return State(params, jax.jit(tx.init, out_shardings=layout)(params), bias)


_in_float32: Callable[[Any], Any] = jax.jit(
    lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
)
