"""`optax-muon import-hf` and `export-hf`: Hugging Face checkpoints to and from a run's folder.

The work is done in `models/huggingface`, and for training runs in `training/export.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import tyro
from rich.console import Console

from optax_muon.cli.progress import tracked
from optax_muon.errors import UsageError
from optax_muon.extras import MissingExtraError
from optax_muon.models.huggingface import (
    Tensor,
    export_checkpoint,
    import_checkpoint,
    read_config,
)
from optax_muon.models.moonlight import MoonlightConfig, count
from optax_muon.training.data import tokenizer
from optax_muon.training.export import as_imported
from optax_muon.training.run_folder import RunFolder, usage_errors


@dataclasses.dataclass(frozen=True)
class ImportHF:
    """Convert a Hugging Face checkpoint in the DeepSeek-V3 layout, such as Moonlight's, to a run.

    Reads config.json and the safetensors files, one tensor at a time; nothing is written unless all
    tensors are present and fit. The tokenizer, if there is one, becomes part of the run; that needs
    the extra tokenize.
    """

    directory: tyro.conf.Positional[Path]
    """Folder of the checkpoint."""
    out: Path
    """Folder of the new run."""

    def __call__(self) -> None:
        """Copy, then say what it is."""
        with usage_errors():
            config = import_checkpoint(self.directory, self.out, _shown, _note)
        self._take_tokenizer()
        Console(stderr=True).out(f"{self.out}: {_describe(config)}", highlight=False)

    def _take_tokenizer(self) -> None:
        """Put the tokenizer into the run, converted if it is a `tiktoken.model`."""
        if not tokenizer.is_in(self.directory):
            return
        try:
            tokenizer.load(self.directory).save(RunFolder(self.out).tokenizer)
        except (MissingExtraError, UsageError) as error:
            _note(f"the tokenizer is left out: {error}")


@dataclasses.dataclass(frozen=True)
class ExportHF:
    """Convert a run to a Hugging Face checkpoint that transformers loads as DeepseekV3ForCausalLM.

    Dtypes stay as they are. The tokenizer is written along if the run has one. The parameters of a
    training run are first written to a temporary folder beside the new one.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, made by import-hf, train or finetune."""
    out: Path
    """Folder of the new checkpoint."""
    trial: str | None = None
    """Optimizer of a training run whose parameters to export; by default the last one that has a
    checkpoint."""
    step: int | None = None
    """Step of a training run whose parameters to export; by default the newest checkpoint."""

    def __call__(self) -> None:
        """Copy, then say what it is."""
        if self.out.exists():  # before anything is read
            raise UsageError(f"{self.out} exists; give a folder that does not")
        with usage_errors(), as_imported(self.run, self.out, self.trial, self.step) as run:
            export_checkpoint(run, self.out, _shown)
            config, _ = read_config(run)
        if (folder := RunFolder(self.run)).has_tokenizer:
            tokenizer.copy(folder.tokenizer, self.out)
        Console(stderr=True).out(f"{self.out}: {_describe(config)}", highlight=False)


def _shown(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return tracked(tensors, "tensors")


def _note(sentence: str) -> None:
    Console(stderr=True).out(sentence, highlight=False)


def _describe(config: MoonlightConfig) -> str:
    total, active = count(config)
    return (
        f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts, {total:,} "
        f"parameters and {active:,} active ones, embeddings not counted"
    )
