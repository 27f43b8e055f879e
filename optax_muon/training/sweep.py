"""The sweep that tunes AdamW and Muon with the same budget: learning rate times weight decay.

Every point of the two grids is one whole training run from the same initial parameters on the same
batches, and counts by its final held-out loss. The grids must be equally long, so neither optimizer
is searched harder. Each finished point is a line of `sweep.csv` at once; the same command goes on
after the last one. The result belongs into the preset's row in `presets.py`; how it is shown is in
`commands/sweep_report.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from optax_muon.errors import Diverged, Interrupted, UsageError
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import Corpus
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.loop import init, train
from optax_muon.training.optimizers import Trial, transformation
from optax_muon.training.presets import HyperParams
from optax_muon.training.progress import Progress
from optax_muon.training.trainer import Interrupt


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the sweep.

    Attributes:
        optimizer: a key of `trials.OPTIMIZERS`.
        lr: peak learning rate.
        weight_decay: decoupled, per unit of learning rate.
        val_loss: final held-out loss, nats per token; NaN where the run diverged, or is not run.
    """

    optimizer: str
    lr: float
    weight_decay: float
    val_loss: float = math.nan

    @property
    def trial(self) -> Trial:
        """The optimizer at these numbers."""
        title = f"{self.optimizer} lr {self.lr:g} decay {self.weight_decay:g}"
        return Trial(title, title, self.optimizer, HyperParams(self.lr, self.weight_decay))


class Table:
    """The finished points, in a CSV file that grows by a line per run."""

    FIELDS = tuple(field.name for field in dataclasses.fields(Point))

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[Point]:
        """All finished points, in the order they were run."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [
                Point(row["optimizer"], *(float(row[name]) for name in self.FIELDS[1:]))
                for row in csv.DictReader(file)
            ]

    def append(self, point: Point) -> None:
        """Add one finished point."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows(([self.FIELDS] if new else []) + [dataclasses.astuple(point)])


def grid(lrs: Mapping[str, Sequence[float]], decays: Sequence[float]) -> list[Point]:
    """All points, without losses.

    Args:
        lrs: of each optimizer, equally many.
        decays: weight decays, the same for all.

    Raises:
        UsageError: when the optimizers' budgets differ.

    >>> [p.lr for p in grid({"adamw": (1e-3, 2e-3), "muon": (2e-3, 4e-3)}, (0.1,))]
    [0.001, 0.002, 0.002, 0.004]
    """
    if len({len(values) for values in lrs.values()}) > 1:
        counts = ", ".join(f"{len(values)} for {name}" for name, values in lrs.items())
        raise UsageError(f"the optimizers get the same budget, but learning rates are {counts}")
    return [
        Point(name, lr, decay)
        for name, values in lrs.items()
        for decay, lr in itertools.product(decays, values)
    ]


def best(points: Iterable[Point], optimizer: str) -> Point | None:
    """The optimizer's point of the lowest loss; None when all have diverged.

    >>> best([Point("muon", 1.0, 0.1, 2.5), Point("muon", 2.0, 0.1, 2.4)], "muon").lr
    2.0
    """
    mine = [p for p in points if p.optimizer == optimizer and math.isfinite(p.val_loss)]
    return min(mine, key=lambda point: point.val_loss, default=None)


def run_all(
    setup: TrainConfig,
    corpus: Corpus,
    points: Sequence[Point],
    table: Table,
    placement: Devices = SINGLE_DEVICE,
) -> None:
    """Run every point that the table does not hold yet; the placement's mesh is ambient.

    Raises:
        Interrupted: on Ctrl-C; the finished points are in the table.
    """
    finished = {point.trial.title for point in table.read()}
    missing = [point for point in points if point.trial.title not in finished]
    titles = [point.trial.title for point in missing]
    with Interrupt() as interrupt, Progress(titles, setup) as progress:
        for point in missing:
            table.append(_run(setup, corpus, point, progress, interrupt, placement))


def _run(
    setup: TrainConfig,
    corpus: Corpus,
    point: Point,
    progress: Progress,
    interrupt: Interrupt,
    placement: Devices,
) -> Point:
    """The point with its loss."""
    trial = point.trial
    progress.begin(trial.title, done=0)
    state = init(setup, transformation(trial, setup), placement.mesh)
    try:
        for record, _ in train(setup, trial, corpus, state, placement=placement):
            progress.step(trial.title, record)
            if interrupt.pressed:
                raise Interrupted("stopped; the finished points are saved")
    except Diverged:
        return point
    assert record.val_loss is not None  # the last step is always evaluated
    return dataclasses.replace(point, val_loss=record.val_loss)
