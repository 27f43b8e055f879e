"""The sweep that tunes optimizers with the same budget: learning rate times weight decay.

Every point of a grid is one whole training run from the same initial parameters on the same
batches, judged by its final held-out loss. The grids must be equally long, so every optimizer
gets the same budget. Each finished point is written to `sweep.csv` at once; the same command
continues after the last one. The best points belong in the preset's row in `presets.py`; the report
is made by `cli/reports/sweep.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from optax_muon.errors import Diverged, Interrupted, UsageError
from optax_muon.training.initialize import initial_state
from optax_muon.training.loop import train
from optax_muon.training.optimizers import HyperParams, Trial, optimizer, transformation
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.progress import Progress
from optax_muon.training.trainer import Interrupt


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the sweep."""

    optimizer: str
    """A key of `optimizers.REGISTRY`."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Decoupled weight decay, per unit of learning rate."""
    val_loss: float = math.nan
    """Final held-out loss, nats per token; NaN if the run diverged or is still to come."""

    @property
    def title(self) -> str:
        """Its name in reports; different for each point."""
        return f"{self.optimizer} lr {self.lr:g} decay {self.weight_decay:g}"

    @property
    def trial(self) -> Trial:
        """The optimizer at these hyperparameters."""
        return Trial(optimizer(self.optimizer), HyperParams(self.lr, self.weight_decay))


class SweepTable:
    """The finished points, in a CSV file that grows by a line per run."""

    FIELDS = tuple(field.name for field in dataclasses.fields(Point))

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[Point]:
        """All finished points, in the order of their runs.

        Raises:
            UsageError: When a line is no point.
        """
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [self._point(number, row) for number, row in enumerate(csv.DictReader(file), 2)]

    def _point(self, number: int, row: Mapping[str, str]) -> Point:
        try:
            return Point(row["optimizer"], *(float(row[name]) for name in self.FIELDS[1:]))
        except (KeyError, TypeError, ValueError) as error:
            columns = ", ".join(self.FIELDS)
            raise UsageError(
                f"{self.path}, line {number} is no point of a sweep, with {columns}; delete it"
            ) from error

    def append(self, point: Point) -> None:
        """Add one finished point."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows(([self.FIELDS] if new else []) + [dataclasses.astuple(point)])


def grid(lrs: Mapping[str, Sequence[float]], decays: Sequence[float]) -> list[Point]:
    """All points, without losses.

    Args:
        lrs: Learning rates by optimizer, equally many for each.
        decays: Weight decays, the same for all.

    Raises:
        UsageError: When the optimizers' budgets differ.

    >>> [p.lr for p in grid({"adamw": (1e-3, 2e-3), "muon": (2e-3, 4e-3)}, (0.1,))]
    [0.001, 0.002, 0.002, 0.004]
    """
    if len({len(values) for values in lrs.values()}) > 1:
        counts = ", ".join(f"{len(values)} for {name}" for name, values in lrs.items())
        raise UsageError(
            f"every optimizer gets the same budget, but the numbers of learning rates are {counts}"
        )
    return [
        Point(name, lr, decay)
        for name, values in lrs.items()
        for decay, lr in itertools.product(decays, values)
    ]


def best(points: Iterable[Point], name: str) -> Point | None:
    """The point of an optimizer with the lowest loss; None when all have diverged.

    >>> best([Point("muon", 1.0, 0.1, 2.5), Point("muon", 2.0, 0.1, 2.4)], "muon").lr
    2.0
    """
    mine = [p for p in points if p.optimizer == name and math.isfinite(p.val_loss)]
    return min(mine, key=lambda point: point.val_loss, default=None)


def run_all(task: Pretraining, points: Sequence[Point], table: SweepTable) -> None:
    """Run every point that the table does not hold yet; the mesh of the task is ambient.

    Raises:
        Interrupted: On Ctrl-C; the finished points are in the table.
    """
    finished = {point.title for point in table.read()}
    missing = [point for point in points if point.title not in finished]
    titles = [point.title for point in missing]
    shown = Progress(titles, task.config, task.devices)
    with Interrupt() as interrupt, shown as progress:
        for point in missing:
            table.append(_run(task, point, progress, interrupt))


def _run(task: Pretraining, point: Point, progress: Progress, interrupt: Interrupt) -> Point:
    """The point with its loss."""
    trial, config = point.trial, task.config
    progress.begin(point.title, done=0)
    state = initial_state(config, transformation(trial, config), task.devices.mesh)
    try:
        for metrics, _ in train(config, trial, task, state, ahead=task.devices.steps_ahead):
            progress.step(point.title, metrics)
            if interrupt.pressed:
                raise Interrupted("stopped; the finished points are saved")
    except Diverged:
        return point
    assert metrics.val_loss is not None  # the last step is always evaluated
    return dataclasses.replace(point, val_loss=metrics.val_loss)
