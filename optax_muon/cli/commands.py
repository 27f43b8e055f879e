"""The commands by name: dataclasses whose fields are their options; tyro does the rest."""

from __future__ import annotations

from typing import Annotated

import tyro

from optax_muon.cli.doctor import Doctor
from optax_muon.cli.finetune import Finetune
from optax_muon.cli.huggingface import ExportHF, ImportHF
from optax_muon.cli.plan import PlanModel
from optax_muon.cli.report import Report
from optax_muon.cli.sample import Sample
from optax_muon.cli.scaling import Scaling
from optax_muon.cli.spectra import Spectra
from optax_muon.cli.sweep import Sweep
from optax_muon.cli.tokenize import Tokenize
from optax_muon.cli.train import Train

COMMANDS = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Scaling, tyro.conf.subcommand("scaling")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Spectra, tyro.conf.subcommand("spectra")]
    | Annotated[PlanModel, tyro.conf.subcommand("plan")]
    | Annotated[ImportHF, tyro.conf.subcommand("import-hf")]
    | Annotated[ExportHF, tyro.conf.subcommand("export-hf")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)
