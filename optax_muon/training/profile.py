"""Traces of some steps by `jax.profiler`: what the devices do, and when they wait for the host."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

WARM_UP = 2
"""Steps before a trace: the first one includes the compilation."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """How many steps of each trial are traced."""

    steps: int = 0
    """So many, after the first `WARM_UP` that are taken; 0 traces nothing."""

    @contextlib.contextmanager
    def trace(self, path: Path) -> Iterator[Trace]:
        """A context whose steps are traced, into a folder that `xprof` and TensorBoard read.

        Args:
            path: The folder; nothing is written if the run ends before the steps begin.
        """
        trace = Trace(path, self.steps)
        try:
            yield trace
        finally:
            trace.stop()


NO_PROFILE = Profile()
"""Traces nothing."""


class Trace:
    """A trace that begins and ends by the number of steps.

    Args:
        path: The folder that it is written to.
        steps: How many are traced; 0 for none.
    """

    def __init__(self, path: Path, steps: int):
        self._path, self._first, self._end = path, WARM_UP, WARM_UP + steps
        self._seen, self._is_running = 0, False

    def step(self) -> None:
        """Count a step that is done."""
        self._seen += 1
        if self._seen == self._first and self._end > self._first:
            jax.profiler.start_trace(self._path)
            self._is_running = True
        elif self._seen == self._end:
            self.stop()

    def stop(self) -> None:
        """Write what was traced, if a trace is running."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
