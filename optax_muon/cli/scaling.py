"""`optax-muon scaling` finds out what an optimizer saves as models grow.

The ladder is made by `training/ladder.py`, the runs by `training/scaling.py`, and the result is
shown by `reports/scaling.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from optax_muon.cli.options import DeviceOptions, at_least
from optax_muon.cli.reports import scaling as report
from optax_muon.errors import UsageError
from optax_muon.models import spec
from optax_muon.training.data.corpus import Corpus, load_corpus
from optax_muon.training.ladder import Rung, ladder
from optax_muon.training.optimizers import optimizer
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.scaling import SEARCHED, Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling(DeviceOptions):
    """Train a ladder of sizes with several optimizers, and fit loss over compute.

    Plans the sizes from a budget of operations and prints them; then every optimizer is trained at
    every size, at its own best learning rate. Writes a table for each size, scaling.md and
    scaling.png with the fits, and the operations that each optimizer needs for the same loss. The
    same command continues after the last finished run.
    """

    budget: float = 3e13
    """Floating-point operations of all runs together, about: 6 for each parameter and token. A
    search that has to go on takes more. With models this small, a CPU core does about 2e10 of them
    in a second."""
    sizes: int = 4
    """Number of sizes; each takes four times the operations of the one below."""
    model: str = "llama"
    """Kind of model: llama, moonlight, or another one that is registered with small sizes."""
    optimizers: tuple[str, ...] = ("adamw", "muon")
    """Optimizers to compare, any of the registry: adamw, muon, muon-adamw-router, normuon, lion.
    The first one is the baseline."""
    seeds: int = 3
    """Runs of each best setting, with seeds that the search has not seen."""
    seed: int = 0
    """Seed of the search; the best runs have the seeds after it."""
    tokens_per_parameter: float = 20.0
    """Tokens of a run over the parameters that multiply them."""
    context: int = 128
    """Tokens in a sequence."""
    data: str | None = None
    """Text to learn, as bytes: a file, a folder or a quoted glob; or a .npy file of integer tokens
    below 256. Python's own standard library by default."""
    out: Path = Path("runs/scaling")
    """Folder of the result."""
    only_plan: Annotated[bool, tyro.conf.arg(name="plan")] = False
    """Print the ladder, and train nothing."""

    def __call__(self) -> None:
        """Run the missing points, then report."""
        self._check()
        rungs = self._rungs()
        Console().print(report.plan_table(rungs))
        if self.only_plan:
            return
        corpus = load_corpus(self.data, self.context, rungs[0].config.model.vocab_size)
        self._create(rungs, corpus)
        study = Study(rungs, self.optimizers, self.seeds, self.out)

        def task(rung: Rung) -> Pretraining:
            devices = self.devices(spec.model(rung.config.model), rung.config.batch)
            return Pretraining(rung.config, corpus, devices)

        with task(rungs[0]).devices.mesh_context():
            study.run(task)
        report.publish(study.results(), self.model, self.out)

    def _check(self) -> None:
        """Check the options.

        Raises:
            UsageError: When a number is too small, or an optimizer unknown.
        """
        for name, least in (("sizes", 1), ("seeds", 1), ("seed", 0), ("context", 1)):
            at_least(least, name, getattr(self, name))
        for name in ("budget", "tokens_per_parameter"):
            at_least(1, name, getattr(self, name))
        if not self.optimizers or len(set(self.optimizers)) < len(self.optimizers):
            raise UsageError("--optimizers must name each optimizer once, the baseline first")
        for name in self.optimizers:
            optimizer(name)

    def _rungs(self) -> list[Rung]:
        return ladder(
            self.model,
            self.budget,
            self.sizes,
            runs=len(self.optimizers) * (SEARCHED + self.seeds),
            tokens_per_parameter=self.tokens_per_parameter,
            context=self.context,
            seed=self.seed,
        )

    def _create(self, rungs: list[Rung], corpus: Corpus) -> None:
        """Write what was asked for, or check that it is what the folder holds.

        Raises:
            UsageError: When the folder holds something else.
        """
        folder = RunFolder(self.out)
        resume = folder.config.exists()
        if self.out.exists() and not resume:
            raise UsageError(
                f"--out {self.out} exists and is not a scaling run; give another folder"
            )
        asked = {
            "ladder": {rung.name: dataclasses.asdict(rung.config) for rung in rungs},
            "fingerprint": corpus.fingerprint,
        }
        folder.create_or_resume(asked, resume=resume, overwrite=False, option="--out")
