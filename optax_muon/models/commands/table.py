"""The commands by name: dataclasses whose fields are their options; tyro does the rest."""

from __future__ import annotations

from typing import Annotated

import tyro

from optax_muon.models.commands.experiments import Sample, Sweep, Train
from optax_muon.models.commands.finetune import Finetune
from optax_muon.models.commands.huggingface import ExportHF, ImportHF
from optax_muon.models.commands.plan import PlanModel
from optax_muon.models.commands.spectra import Spectra

COMMANDS = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Spectra, tyro.conf.subcommand("spectra")]
    | Annotated[PlanModel, tyro.conf.subcommand("plan")]
    | Annotated[ImportHF, tyro.conf.subcommand("import-hf")]
    | Annotated[ExportHF, tyro.conf.subcommand("export-hf")]
)
