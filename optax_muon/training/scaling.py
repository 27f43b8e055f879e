"""A scaling law: every optimizer at every size of a ladder, at its own best learning rate.

The learning rate is searched in factors of two until the best is inside, and the best run is
repeated with other seeds (`search.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import optax

from optax_muon.models import spec
from optax_muon.training import power_law, sweep
from optax_muon.training.flops import run_flops
from optax_muon.training.ladder import Rung
from optax_muon.training.optimizers import hyper_params
from optax_muon.training.power_law import Curve
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.search import tune
from optax_muon.training.state import shapes
from optax_muon.training.sweep import Point, Setting, SweepTable

SEARCHED = 3
"""Runs of the shortest search."""


@dataclasses.dataclass(frozen=True)
class Study:
    """The optimizers that are compared on a ladder, and where their runs are."""

    rungs: Sequence[Rung]
    """The sizes, the smallest first."""
    optimizers: Sequence[str]
    """Keys of `optimizers.REGISTRY`; the first one is the baseline."""
    seeds: int
    """Runs of each best setting."""
    folder: Path
    """Folder of the tables, one for each size."""

    def run(self, task: Callable[[Rung], Pretraining]) -> None:
        """Do all runs that are not in the tables.

        Args:
            task: What is learned at a size.

        Raises:
            Interrupted: On Ctrl-C; the finished runs are in the tables.
        """
        for rung in self.rungs:
            table = self._table(rung)
            table.path.parent.mkdir(parents=True, exist_ok=True)
            while missing := self._missing(rung):
                sweep.run_all(task(rung), missing, table)

    def best(self, rung: Rung, name: str) -> Setting | None:
        """The best setting of an optimizer at a size; None before all of its runs are done."""
        losses = self._losses(rung)
        _, repeats = self._tune(losses, rung, name)
        points = (dataclasses.replace(point, val_loss=losses[point]) for point in repeats)
        return Setting(tuple(points)) if repeats else None

    def results(self) -> dict[str, list[tuple[Rung, Setting]]]:
        """The best settings at the sizes that are done, by optimizer."""
        return {
            name: [(rung, setting) for rung in self.rungs if (setting := self.best(rung, name))]
            for name in self.optimizers
        }

    def _missing(self, rung: Rung) -> list[Point]:
        """The runs to do next."""
        losses = self._losses(rung)
        return [run for name in self.optimizers for run in self._tune(losses, rung, name)[0]]

    def _tune(
        self, losses: Mapping[Point, float], rung: Rung, name: str
    ) -> tuple[list[Point], list[Point]]:
        """The runs to do next, and those that are compared once they are done."""
        numbers = hyper_params(name, dict.fromkeys(("adamw", "muon"), rung.hyper_params))
        seed = rung.config.seed
        start = Point(name, numbers.lr, numbers.weight_decay, seed=seed)
        return tune(losses, start, ["lr"], range(seed + 1, seed + 1 + self.seeds))

    def _losses(self, rung: Rung) -> dict[Point, float]:
        """The losses of the finished runs."""
        # math.nan is one object, so points that have no loss yet are equal.
        return {
            dataclasses.replace(point, val_loss=math.nan): point.val_loss
            for point in self._table(rung).read()
        }

    def _table(self, rung: Rung) -> SweepTable:
        return SweepTable(self.folder / rung.name / "sweep.csv")


def curve(results: Sequence[tuple[Rung, Setting]]) -> Curve:
    """What an optimizer reached, over the operations of model and optimizer, and over 6 N D."""
    return Curve(
        {
            "flops": tuple(flops(rung, setting) for rung, setting in results),
            "model_flops": tuple(rung.flops for rung, _ in results),
        },
        tuple(tuple(setting.losses) for _, setting in results),
    )


@functools.cache
def flops(rung: Rung, setting: Setting) -> float:
    """Operations of a run, the optimizer's included."""
    config = rung.config
    params = shapes(spec.model(config.model), optax.identity()).params
    return run_flops(config, setting.first.trial, params, config.steps)


def ratios(curves: Mapping[str, Curve], baseline: str) -> dict[str, list[power_law.Interval]]:
    """The operations of each optimizer over those that the baseline's fit needs for its losses."""
    return {
        name: [
            power_law.ratio(curves[baseline], mine, place, "flops")
            for place in range(len(mine.losses))
        ]
        for name, mine in curves.items()
        if name != baseline
    }
