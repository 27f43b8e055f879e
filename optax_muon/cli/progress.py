"""How far a command has come: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track

from optax_muon.training.progress import Pace

Item = TypeVar("Item")


def tracked(items: Iterable[Item], unit: str) -> Iterable[Item]:
    """The items, with the progress shown on stderr.

    Args:
        items: What is iterated over.
        unit: What they are, in the plural.
    """
    console, known = Console(stderr=True), list(items)
    if console.is_interactive or console.is_jupyter:
        return track(known, unit, console=console, transient=True)
    return with_lines(known, unit, console)


def with_lines(
    items: Sequence[Item],
    unit: str,
    console: Console,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """The items, with a line every few seconds.

    Args:
        items: What is iterated over.
        unit: What they are, in the plural.
        console: Where the lines are written.
        clock: Seconds since any moment.
    """
    pace = Pace(clock)
    for number, item in enumerate(items):
        yield item
        if pace.is_due():
            console.out(f"{number + 1}/{len(items)} {unit}", highlight=False)


def show_progress(
    updates: Iterable[Item], line: Callable[[Item], str], done: Callable[[Item], float]
) -> None:
    """Do work of unknown length, and show on stderr how far it has come.

    Args:
        updates: Does the work, and yields where it is.
        line: What is shown of that.
        done: Which fraction of the work is done.
    """
    console = Console(stderr=True)
    if console.is_interactive or console.is_jupyter:
        columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=1.0)
            for update in updates:
                bar.update(task, completed=done(update), description=line(update))
        return
    pace = Pace()
    for update in updates:
        if pace.is_due():
            console.out(line(update), highlight=False)
