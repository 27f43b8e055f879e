"""What the user sees while a command works: a bar per task with loss, speed and time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

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


class Progress:
    """A bar per trial.

    Args:
        titles: of the trials.
        setup: what they share.
        hidden: shows nothing, as in all processes but one.
    """

    def __init__(self, titles: Sequence[str], setup: TrainConfig, *, hidden: bool = False):
        self._setup = setup
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
                title, total=setup.steps, start=False, loss="-", val_loss="-", speed="-"
            )
            for title in titles
        }

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def begin(self, title: str, done: int) -> None:
        """Start a task's clock, `done` steps in."""
        self._bars.start_task(self._tasks[title])
        self._bars.update(self._tasks[title], completed=done)

    def step(self, title: str, record: StepMetrics) -> None:
        """Show a step."""
        task = self._tasks[title]
        speed = f"{self._setup.tokens_at(record.step) / record.seconds:,.0f}"
        self._bars.update(task, completed=record.step, loss=f"{record.loss:.3f}", speed=speed)
        if record.val_loss is not None:
            self._bars.update(task, val_loss=f"{record.val_loss:.3f}")
