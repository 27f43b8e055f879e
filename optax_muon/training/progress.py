"""The progress of a run: bars on a terminal, elsewhere a line every few seconds.

Under nohup, in SLURM and in CI logs there is no terminal, and bars would show nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from optax_muon.training.config import TrainConfig
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.flops import utilization
from optax_muon.training.loop import StepMetrics

SECONDS = 5.0
"""Time between two lines."""


class Pace:
    """Lines that are `SECONDS` apart.

    Args:
        clock: Seconds since any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()

    def is_due(self) -> bool:
        """Whether it is time for the next line, which is then counted as written."""
        now = self._clock()
        if now - self._last < SECONDS:
            return False
        self._last = now
        return True

    def restart(self) -> None:
        """Wait from now on, as a line was written out of turn."""
        self._last = self._clock()


class Progress(contextlib.AbstractContextManager["Progress"]):
    """The progress of some trials, as it can be shown here.

    Args:
        titles: Titles of the trials.
        config: What the trials share.
        devices: Where they are trained.
        hidden: Show nothing, as in all processes but the main one.
    """

    def __init__(
        self,
        titles: Sequence[str],
        config: TrainConfig,
        devices: Devices = SINGLE_DEVICE,
        *,
        hidden: bool = False,
    ):
        console = Console(stderr=True)
        self.display = Display()
        if not hidden:
            is_drawn = console.is_interactive or console.is_jupyter
            self.display = (
                Bars(titles, config, devices, console)
                if is_drawn
                else Lines(config, devices, console)
            )

    def __enter__(self) -> Progress:
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    def begin(self, title: str, done: int) -> None:
        """Start the clock of a trial of which `done` steps are done."""
        self.display.begin(title, done)

    def step(self, title: str, metrics: StepMetrics) -> None:
        """Show a step."""
        self.display.step(title, metrics)


class Display:
    """Shows nothing; its subclasses do."""

    def start(self) -> None:
        """Begin to draw."""

    def stop(self) -> None:
        """Stop drawing."""

    def begin(self, title: str, done: int) -> None:
        """As `Progress.begin`."""

    def step(self, title: str, metrics: StepMetrics) -> None:
        """As `Progress.step`."""


class Bars(Display):
    """A bar per trial."""

    def __init__(
        self, titles: Sequence[str], config: TrainConfig, devices: Devices, console: Console
    ):
        self._config, self._devices = config, devices
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("val {task.fields[val_loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("MFU {task.fields[mfu]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        start: dict[str, Any] = dict.fromkeys(("loss", "val_loss", "speed", "mfu"), "-")
        self._tasks = {
            title: self._bars.add_task(title, total=config.steps, start=False, **start)
            for title in titles
        }

    def start(self) -> None:
        """Draw the bars."""
        self._bars.start()

    def stop(self) -> None:
        """Leave them as they are."""
        self._bars.stop()

    def begin(self, title: str, done: int) -> None:
        """Start a bar."""
        self._bars.start_task(self._tasks[title])
        self._bars.update(self._tasks[title], completed=done)

    def step(self, title: str, metrics: StepMetrics) -> None:
        """Move a bar."""
        task = self._tasks[title]
        speed = self._config.tokens_at(metrics.step) / metrics.seconds
        self._bars.update(
            task,
            completed=metrics.step,
            loss=f"{metrics.loss:.3f}",
            speed=f"{speed:,.0f}",
            mfu=_spell(utilization(self._config, speed, self._devices)),
        )
        if metrics.val_loss is not None:
            self._bars.update(task, val_loss=f"{metrics.val_loss:.3f}")


class Lines(Display):
    """A line when a trial begins, after its first and its last step, and every few seconds.

    Args:
        config: What the trials share.
        devices: Where they are trained.
        console: Where the lines are written.
        clock: Seconds since any moment.
    """

    def __init__(
        self,
        config: TrainConfig,
        devices: Devices,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._devices, self._console, self._clock = config, devices, console, clock
        self._pace = Pace(clock)
        self._first = self._tokens = 0
        self._since = self._seconds = 0.0
        self._val_loss = "-"

    def begin(self, title: str, done: int) -> None:
        """Say that a trial begins, because its first step is compiled for long."""
        self._first, self._val_loss = done + 1, "-"
        steps = self._config.steps
        state = "done before" if done == steps else "the next one is compiled first"
        self._write(f"{title}: {done}/{steps} steps, {state}")

    def step(self, title: str, metrics: StepMetrics) -> None:
        """Write a line if it is time."""
        now, number, steps = self._clock(), metrics.step, self._config.steps
        if metrics.val_loss is not None:
            self._val_loss = f"{metrics.val_loss:.3f}"
        if number == self._first:  # with the compilation, which says nothing of the others
            self._since, self._tokens, self._seconds = now, 0, 0.0
            speed = f"{metrics.seconds:.1f} s with the compilation"
        else:
            self._tokens += self._config.tokens_at(number)
            self._seconds += metrics.seconds
            if not self._pace.is_due() and number < steps:
                return
            left = (now - self._since) / (number - self._first) * (steps - number)
            speed = f"{self._speed()}, {datetime.timedelta(seconds=round(left))} left"
        losses = f"loss {metrics.loss:.3f}, val {self._val_loss}"
        self._write(f"{title}: {number}/{steps} steps, {losses}, {speed}")

    def _speed(self) -> str:
        """Tokens per second, and how well the devices are used, since the last line."""
        speed = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        return (
            f"{speed:,.0f} tokens/s, MFU {_spell(utilization(self._config, speed, self._devices))}"
        )

    def _write(self, line: str) -> None:
        self._console.out(line, highlight=False)
        self._pace.restart()


def _spell(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
