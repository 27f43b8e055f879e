"""Progress bars: one per trial, with loss, speed and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from optax_muon.training.config import TrainConfig
from optax_muon.training.loop import StepMetrics


class Progress(contextlib.AbstractContextManager["Progress"]):
    """A bar per trial.

    Args:
        titles: titles of the trials.
        config: what the trials share.
        hidden: show nothing, as in all processes but the main one.
    """

    def __init__(self, titles: Sequence[str], config: TrainConfig, *, hidden: bool = False):
        self._config = config
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("val {task.fields[val_loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=Console(stderr=True),
            disable=hidden,
        )
        self._tasks = {
            title: self._bars.add_task(
                title, total=config.steps, start=False, loss="-", val_loss="-", speed="-"
            )
            for title in titles
        }

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, title: str, done: int) -> None:
        """Start the clock of a trial of which `done` steps are done."""
        self._bars.start_task(self._tasks[title])
        self._bars.update(self._tasks[title], completed=done)

    def step(self, title: str, metrics: StepMetrics) -> None:
        """Show a step."""
        task = self._tasks[title]
        speed = f"{self._config.tokens_at(metrics.step) / metrics.seconds:,.0f}"
        self._bars.update(task, completed=metrics.step, loss=f"{metrics.loss:.3f}", speed=speed)
        if metrics.val_loss is not None:
            self._bars.update(task, val_loss=f"{metrics.val_loss:.3f}")
