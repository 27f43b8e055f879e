"""`optax-muon import-hf` and `export-hf`: checkpoints of Hugging Face to and from a run's folder.

The work is done in `models/huggingface.py`, and for training runs in `models/training/export.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track

from optax_muon.errors import UsageError, usage_errors
from optax_muon.models.huggingface import (
    Tensor,
    export_checkpoint,
    import_checkpoint,
    read_config,
)
from optax_muon.models.moonlight import MoonlightConfig, count
from optax_muon.training.export import as_imported


@dataclasses.dataclass(frozen=True)
class ImportHF:
    """Make a run of a Hugging Face checkpoint in the DeepSeek-V3 layout, such as Moonlight's.

    Reads config.json and the safetensors files, one tensor at a time; nothing is written unless all
    tensors are there and fit.
    """

    directory: tyro.conf.Positional[Path]
    """Folder of the checkpoint."""
    out: Path
    """Folder of the run to make."""

    @usage_errors()
    def __call__(self) -> None:
        """Copy, then say what it is."""
        config = import_checkpoint(self.directory, self.out, _shown)
        Console(stderr=True).out(f"{self.out}: {_describe(config)}", highlight=False)


@dataclasses.dataclass(frozen=True)
class ExportHF:
    """Make a Hugging Face checkpoint of a run, which `transformers` loads as DeepseekV3ForCausalLM.

    Dtypes stay as they are. The tokenizer's files are not part of a run: copy them beside. Of a
    training run the parameters are first laid out in a temporary folder beside the new one.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run: of import-hf, or of a training run."""
    out: Path
    """Folder of the checkpoint to make."""
    trial: str | None = None
    """Whose parameters, of a training run; by default the last optimizer that has any."""
    step: int | None = None
    """After how many steps, of a training run; by default the newest checkpoint."""

    @usage_errors()
    def __call__(self) -> None:
        """Copy, then say what it is."""
        if self.out.exists():  # before anything is read
            raise UsageError(f"{self.out} exists; give a folder that does not")
        with as_imported(self.run, self.out, self.trial, self.step) as run:
            export_checkpoint(run, self.out, _shown)
            config, _ = read_config(run)
        Console(stderr=True).out(f"{self.out}: {_describe(config)}", highlight=False)


def _shown(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return track(list(tensors), "tensors", console=Console(stderr=True), transient=True)


def _describe(config: MoonlightConfig) -> str:
    total, active = count(config)
    return (
        f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts, {total:,} "
        f"parameters and {active:,} active ones, embeddings not counted"
    )
