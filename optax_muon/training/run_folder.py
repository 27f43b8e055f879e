"""A run's folder: what it holds, who may write into it, and how a run goes on in it.

What a run leaves behind:

    runs/NAME/config.json      what was asked for; a resumed run must ask for the same
    runs/NAME/metrics.jsonl    a line per trial and step
    runs/NAME/checkpoints/     per trial: parameters and optimizer state, by orbax
    runs/NAME/loss.png         the held-out curves
    runs/NAME/summary.md       the outcome (`commands/report.py`)
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optax_muon.errors import UsageError, usage_errors
from optax_muon.models.safetensors_io import folder_at_once
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.loop import StepMetrics


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths inside `runs/NAME`."""

    path: Path

    @property
    def config(self) -> Path:
        """What was asked for."""
        return self.path / "config.json"

    @property
    def journal(self) -> Journal:
        """A line per trial and step."""
        return Journal(self.path / "metrics.jsonl")

    def checkpoints(self, trial: str) -> Path:
        """The folder of one trial's checkpoints."""
        return self.path / "checkpoints" / trial

    def claim(self, config: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make the folder this run's own, or refuse.

        Args:
            config: what is asked for, as JSON can hold it.
            resume: go on with the run that is there; its config must be the same.
            overwrite: delete the run that is there.

        Raises:
            UsageError: when the folder holds a run and neither is asked for, when there is nothing
                to resume, or when the run there has another config.
        """
        if resume:
            return self._same_config(config)
        if self.path.exists():
            self._clear(overwrite)
        with usage_errors(), folder_at_once(self.path) as draft:
            RunFolder(draft).config.write_text(json.dumps(config, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The config of the run that is here.

        Raises:
            UsageError: when there is none.
        """
        if not self.config.exists():
            raise UsageError(f"there is no run in {self.path}")
        config: dict[str, Any] = json.loads(self.config.read_text())
        return config

    def trained(self, trials: Sequence[str]) -> Path:
        """The checkpoints of the last of these trials that has any.

        Raises:
            UsageError: when none has.
        """
        for path in map(self.checkpoints, reversed(trials)):
            if path.exists():
                with Checkpoints(path) as checkpoints:
                    if checkpoints.latest:
                        return path
        raise UsageError(f"{self.path} has no checkpoint of {' or '.join(trials)}")

    def trained_by(self, trial: str | None) -> Path:
        """The checkpoints of a trial of this run; None is the last one that has any.

        Raises:
            UsageError: when there is no such trial, or it has none.
        """
        names = [each["name"] for each in self.read_config()["trials"]]
        if trial not in (None, *names):
            raise UsageError(f"{self.path} has no trial {trial!r}; it has {', '.join(names)}")
        return self.trained(names if trial is None else [trial])

    def _same_config(self, config: dict[str, Any]) -> None:
        there, here = dict(_flat(self.read_config())), dict(_flat(json.loads(json.dumps(config))))
        for key in there | here:
            if there.get(key) != here.get(key):
                raise UsageError(
                    f"{self.path} was made with another config: {key} is {there.get(key)} there "
                    f"and {here.get(key)} here; ask for the same, or give another --name"
                )

    def _clear(self, overwrite: bool) -> None:
        if not overwrite:
            raise UsageError(
                f"{self.path} exists; --resume goes on with it, --overwrite deletes it, "
                "--name makes another"
            )
        self.read_config()  # nothing but a run is ever deleted
        with tempfile.TemporaryDirectory(
            prefix=f".{self.path.name}.", dir=self.path.parent
        ) as gone:
            self.path.rename(Path(gone) / self.path.name)  # all at once, should it be interrupted


class Journal:
    """`metrics.jsonl`: one JSON object per trial and step, written as it happens."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, trial: str, record: StepMetrics) -> None:
        """Add a step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"run": trial, **dataclasses.asdict(record)}) + "\n")

    def read(self, trial: str) -> list[StepMetrics]:
        """The steps of one trial, in order."""
        rows = (json.loads(line) for line in self._lines())
        return [
            StepMetrics(**{key: value for key, value in row.items() if key != "run"})
            for row in rows
            if row["run"] == trial
        ]

    def forget(self, trial: str, after: int) -> None:
        """Drop the steps of a trial past its checkpoint: they are about to be done again."""
        kept = [line for line in self._lines() if not _is_past(json.loads(line), trial, after)]
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(kept))
        draft.replace(self.path)

    def _lines(self) -> list[str]:
        """Whole lines only: a killed process may have left half a one."""
        text = self.path.read_text() if self.path.exists() else ""
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _is_past(row: dict[str, Any], trial: str, step: int) -> bool:
    return bool(row["run"] == trial and row["step"] > step)


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested JSON with dotted names."""
    if not isinstance(tree, dict | list):
        yield prefix, tree
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
