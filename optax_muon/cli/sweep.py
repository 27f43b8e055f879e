"""`optax-muon sweep` finds learning rates and weight decays.

The work is done in `training/sweep.py`, the result is shown by `reports/sweep.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from optax_muon.cli.options import assignments, at_least
from optax_muon.cli.reports import sweep as sweep_report
from optax_muon.cli.reports import training as training_report
from optax_muon.cli.train import Experiment
from optax_muon.errors import UsageError
from optax_muon.training import sweep
from optax_muon.training.optimizers import hyper_params, optimizer
from optax_muon.training.run_folder import RunFolder

RATIOS = (0.5, 1.0, 2.0)
"""Learning rates to try, over the preset's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Experiment):
    """Find the learning rate and weight decay of each optimizer, with the same budget.

    Every point is one whole training run. Writes sweep.csv line by line, then sweep.md and
    sweep.png; the same command continues after the last finished point.
    """

    out: Path = Path("runs/sweep")
    """Folder of the result."""
    optimizers: tuple[str, ...] = ("adamw", "muon")
    """Optimizers to tune: adamw, muon, muon-adamw-router, normuon, lion."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Peak learning rates to try, such as adamw.lr=3e-3,6e-3 muon.lr=6e-3,1.2e-2: the same number
    of them for each optimizer. By default half, once and twice the preset's. muon.adamw_lr=3e-3
    gives what Muon leaves to AdamW rates of its own; every combination with muon.lr is a point."""
    weight_decay: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Weight decays to try with each learning rate."""
    seeds: int = 1
    """Runs of each point, with --seed and the seeds after it. The best point is that of the lowest
    mean, which is reported with its 95% interval."""

    def __call__(self) -> None:
        """Run the missing points, then report."""
        self.check()
        at_least(1, "seeds", self.seeds)
        points = self._points()
        # Only the final loss counts, so one evaluation at the end is enough.
        config = dataclasses.replace(self.config, eval_every=self.row.steps)
        task, folder = self.task(config), RunFolder(self.out)
        asked = {
            "training": dataclasses.asdict(config),
            "fingerprint": task.corpus.fingerprint,
        }
        resume = folder.config.exists()
        if self.out.exists() and not resume:
            raise UsageError(f"--out {self.out} exists and is not a sweep; give another folder")
        folder.create_or_resume(asked, resume=resume, overwrite=False, option="--out")
        table = sweep.SweepTable(self.out / "sweep.csv")
        with task.devices.mesh_context():
            sweep.run_all(task, points, table)
        heading = training_report.describe(self.model, config)
        sweep_report.publish(table.read(), heading, config.unit, self.out)

    def _points(self) -> list[sweep.Point]:
        """The points of the grid.

        Raises:
            UsageError: When there is none, one is there twice, or one cannot run.
        """
        seeds = range(self.seed, self.seed + self.seeds)
        points = sweep.grid(self._rates(), self.weight_decay, seeds)
        if not points:
            raise UsageError("there is nothing to run; give --optimizers and --weight-decay values")
        for point in points:
            if points.count(point) > 1:
                raise UsageError(f"{point.setting} is asked for twice; give each value once")
            _ = point.trial  # refuses numbers that it cannot run at
        return points

    def _rates(self) -> dict[str, sweep.Rates]:
        """Learning rates by optimizer.

        Raises:
            UsageError: When something else than the rates of these optimizers is set.
        """
        given = assignments(self.overrides)
        accepted = [
            f"{name}.{key}"
            for name in self.optimizers
            for key in optimizer(name).accepts
            if key != "weight_decay"
        ]
        for target in (f"{name}.{key}" for name, numbers in given.items() for key in numbers):
            if target not in accepted:
                raise UsageError(
                    f"--set has {target}; sweep takes {', '.join(accepted)}, and --weight-decay "
                    "for all of them"
                )
        return {
            optimizer(name).name: {"lr": self._default_rates(name), **given.get(name, {})}
            for name in self.optimizers
        }

    def _default_rates(self, name: str) -> tuple[float, ...]:
        peak = hyper_params(name, self.row.hyper_params).lr
        return tuple(ratio * peak for ratio in RATIOS)
