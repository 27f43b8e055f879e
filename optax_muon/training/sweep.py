"""The sweep that tunes optimizers with the same budget: learning rate times weight decay.

Every point of a grid is one whole training run, judged by its final held-out loss. Points of one
seed start from the same parameters and see the same batches; points that differ in the seed alone
are one setting, judged by the mean. The grids must be equally long, so every optimizer gets the
same budget. Each finished point is written to `sweep.csv` at once; the same command continues after
the last one. The best settings belong in the preset's row in `presets.py`; the report is made by
`cli/reports/sweep.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import statistics
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
    adamw_lr: float | None = None
    """Peak learning rate of the parameters that Muon leaves to AdamW; None is `lr`."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""

    @property
    def title(self) -> str:
        """Its name in reports; different for each point."""
        return f"{self.setting} seed {self.seed}"

    @property
    def setting(self) -> str:
        """Its name without the seed."""
        apart = "" if self.adamw_lr is None else f" adamw_lr {self.adamw_lr:g}"
        return f"{self.optimizer} lr {self.lr:g}{apart} decay {self.weight_decay:g}"

    @property
    def trial(self) -> Trial:
        """The optimizer at these hyperparameters."""
        numbers = HyperParams(self.lr, self.weight_decay, self.adamw_lr)
        return Trial(optimizer(self.optimizer), numbers)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The points that differ in their seeds alone."""

    points: tuple[Point, ...]
    """One for each seed."""

    @property
    def first(self) -> Point:
        """The point of the first seed, for its hyperparameters."""
        return self.points[0]

    @property
    def losses(self) -> list[float]:
        """The final held-out losses of the seeds."""
        return [point.val_loss for point in self.points]

    @property
    def loss(self) -> float:
        """Their mean; NaN if a seed diverged."""
        return statistics.fmean(self.losses)


class SweepTable:
    """The finished points, in a CSV file that grows by a line per run."""

    FIELDS = tuple(field.name for field in dataclasses.fields(Point))

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[Point]:
        """All finished points, in the order of their runs.

        Raises:
            UsageError: When a line is not a point.
        """
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [self._point(number, row) for number, row in enumerate(csv.DictReader(file), 2)]

    def _point(self, number: int, row: Mapping[str, str]) -> Point:
        try:
            return Point(
                row["optimizer"],
                lr=float(row["lr"]),
                weight_decay=float(row["weight_decay"]),
                val_loss=float(row["val_loss"]),
                adamw_lr=float(row["adamw_lr"]) if row["adamw_lr"] else None,
                seed=int(row["seed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            columns = ", ".join(self.FIELDS)
            raise UsageError(
                f"{self.path}, line {number} is not a point of a sweep, with {columns}; delete it"
            ) from error

    def append(self, point: Point) -> None:
        """Add one finished point."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            # A process that was killed may have left the file without a header.
            header = [] if file.tell() else [self.FIELDS]
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([*header, dataclasses.astuple(point)])


Rates = Mapping[str, Sequence[float]]
"""Learning rates to try, by the names of the fields of `HyperParams`: `lr`, and perhaps
`adamw_lr`."""


def grid(
    rates: Mapping[str, Rates], decays: Sequence[float], seeds: Sequence[int] = (0,)
) -> list[Point]:
    """All points, without losses.

    Args:
        rates: Learning rates by optimizer, equally many combinations for each.
        decays: Weight decays, the same for all.
        seeds: Seeds, the same for all.

    Raises:
        UsageError: When the optimizers' budgets differ.

    >>> rates = {"adamw": {"lr": (1e-3, 2e-3)}, "muon": {"lr": (2e-3,), "adamw_lr": (1e-3, 2e-3)}}
    >>> [(p.lr, p.adamw_lr) for p in grid(rates, (0.1,))]
    [(0.001, None), (0.002, None), (0.002, 0.001), (0.002, 0.002)]
    """
    pairs = {
        name: [*itertools.product(each.get("adamw_lr", (None,)), each["lr"])]
        for name, each in rates.items()
    }
    if len({len(values) for values in pairs.values()}) > 1:
        counts = ", ".join(f"{len(values)} for {name}" for name, values in pairs.items())
        raise UsageError(
            f"every optimizer gets the same budget, but the numbers of learning rates are {counts}"
        )
    return [
        Point(name, lr, decay, adamw_lr=adamw_lr, seed=seed)
        for name, values in pairs.items()
        for seed, decay, (adamw_lr, lr) in itertools.product(seeds, decays, values)
    ]


def settings(points: Iterable[Point]) -> list[Setting]:
    """The points by setting, in the order of their first ones."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.setting, []).append(point)
    return [Setting(tuple(each)) for each in found.values()]


def best(points: Iterable[Point], name: str) -> Setting | None:
    """The setting of an optimizer with the lowest mean loss; None when all have diverged.

    >>> best([Point("muon", 1.0, 0.1, 2.5), Point("muon", 2.0, 0.1, 2.4)], "muon").first.lr
    2.0
    """
    mine = [each for each in settings(points) if each.first.optimizer == name]
    finite = [each for each in mine if math.isfinite(each.loss)]
    return min(finite, key=lambda setting: setting.loss, default=None)


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
    config = dataclasses.replace(task.config, seed=point.seed)
    task, trial = dataclasses.replace(task, config=config), point.trial
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
