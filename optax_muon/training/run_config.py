"""What a run was asked for: the contents of `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from optax_muon.training.config import TrainConfig
from optax_muon.training.optimizers import Trial


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run of `train` or `finetune`, as `config.json` records it."""

    preset: str | None
    """Name of its preset in `presets.PRESETS`; None in fine-tuning."""
    data: str | None
    """The user's file, folder or glob; None is the standard library."""
    fingerprint: str
    """Hash of the data, so that no run is resumed with other data."""
    training: TrainConfig
    """What all trials share."""
    trials: tuple[Trial, ...]
    """The optimizers and their hyperparameters; the first is the baseline."""
    save_every: int
    """Steps between checkpoints."""
    pretrained: str | None = None
    """Folder of the run whose parameters it starts from; None starts from random ones."""
    pretrained_trial: str | None = None
    """Trial of that run that it starts from; None is the last one that has a checkpoint."""
    keep_every: int | None = None
    """Steps between checkpoints that are kept for good; None keeps only the newest ones."""

    def to_json(self) -> dict[str, Any]:
        """As `config.json` holds it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "training": dataclasses.asdict(self.training),
            "trials": [trial.to_json() for trial in self.trials],
        }

    def settings(self, trial: Trial) -> dict[str, Any]:
        """What must be the same to resume from a checkpoint."""
        return {
            "training": dataclasses.asdict(self.training),
            "trial": trial.to_json(),
            "fingerprint": self.fingerprint,
        }
