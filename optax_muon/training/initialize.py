"""The state that a run starts from: random, or the parameters of another run or of an import."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from optax_muon.errors import UsageError
from optax_muon.models import huggingface, spec
from optax_muon.models.spec import Model
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.config import TrainConfig
from optax_muon.training.data import tokenizer as tokenizers
from optax_muon.training.data.tokenizer import Bytes, Tokenizer
from optax_muon.training.run_folder import RunFolder, usage_errors
from optax_muon.training.state import State, abstract, random_state, shardings


@dataclasses.dataclass(frozen=True)
class PretrainedSource:
    """A run, or the folder of an import, to take parameters from."""

    path: Path
    """Its folder."""
    trial: str | None = None
    """Trial to take them from; None is the last one that has a checkpoint."""

    @property
    def model(self) -> Model:
        """Its model.

        Raises:
            UsageError: When there is none.
        """
        with usage_errors():
            return spec.model_of(RunFolder(self.path).sizes())

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; bytes for a model of bytes that has none.

        Raises:
            UsageError: It has none, and its tokens are not bytes; or its model has fewer tokens.
            MissingExtraError: The package that reads it is not installed.
        """
        folder, vocab = RunFolder(self.path), self.model.config.vocab_size
        if folder.has_tokenizer:
            found = tokenizers.load(folder.tokenizer)
            if found.vocab_size > vocab:
                raise UsageError(
                    f"the tokenizer in {folder.tokenizer} has {found.vocab_size} tokens and the "
                    f"model {vocab}; it is another model's"
                )
            return found
        if vocab != Bytes.vocab_size:
            raise UsageError(
                f"{self.path} has a vocabulary of {vocab} and no tokenizer; put the tokenizer.json "
                f"that made its tokens into {folder.tokenizer}"
            )
        return Bytes()

    def check(self) -> None:
        """Check, without reading them, that there are parameters.

        Raises:
            UsageError: When there are none.
        """
        folder = RunFolder(self.path)
        if folder.is_training_run:
            folder.trained_by(self.trial)
            return
        with usage_errors():
            huggingface.read_config(self.path)

    def weights(self, mesh: Mesh | None = None) -> tuple[optax.Params, jax.Array | None]:
        """Its newest parameters, and router biases if the model has any, in float32.

        The biases are zeros if an import holds none.

        Args:
            mesh: Mesh to put them on, which must be ambient; None is the first device.

        Raises:
            UsageError: When there are none.
        """
        folder = RunFolder(self.path)
        if not folder.is_training_run:
            return self._imported(mesh)
        none = optax.identity()
        with Checkpoints(folder.trained_by(self.trial)) as checkpoints:
            like = abstract(self.model, none, mesh)
            saved = checkpoints.restore_items({"params": like.params, "bias": like.bias})
        return saved["params"], saved["bias"]

    def _imported(self, mesh: Mesh | None) -> tuple[optax.Params, jax.Array | None]:
        layout = None if mesh is None else self.model.shardings(mesh)
        with usage_errors():
            _, params, bias = huggingface.load(self.path, layout)
        params, bias = _in_float32((params, bias))
        return params, self.model.zero_bias() if bias is None else bias


def initial_state(
    config: TrainConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    source: PretrainedSource | None = None,
) -> State:
    """The state before the first step of a run; the mesh, if there is one, is ambient.

    Args:
        config: What all trials share.
        tx: The optimizer.
        mesh: Mesh of the state; None is the first device.
        source: Run whose parameters and router biases are used; None draws random parameters.

    Raises:
        UsageError: As `PretrainedSource.weights`.
    """
    model = spec.model(config.model)
    if source is None:
        return random_state(model, tx, config.seed, mesh)
    params, bias = source.weights(mesh)
    layout: Any = None if mesh is None else shardings(model, tx, mesh).opt_state
    return State(params, jax.jit(tx.init, out_shardings=layout)(params), bias)


_in_float32: Callable[[Any], Any] = jax.jit(
    lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
)
