"""A run's folder: what it holds, when it may be written, and how a run is resumed in it.

runs/NAME/config.json      the `RunConfig`; a resumed run must have the same
runs/NAME/metrics.jsonl    a line per trial and step
runs/NAME/checkpoints/     per trial: parameters and optimizer state, by orbax
runs/NAME/tokenizer/       the tokenizer of its tokens, if they are not bytes
runs/NAME/profile/         per trial: the steps that --profile has traced
runs/NAME/tensorboard/     per trial: the metrics, for TensorBoard (`trackers.py`)
runs/NAME/tracking/        per trial: its name on the services that --track reports to
runs/NAME/loss.png         the held-out curves
runs/NAME/summary.md       the outcome (`cli/reports/training.py`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from optax_muon import checkpoint
from optax_muon.errors import UsageError
from optax_muon.models import huggingface
from optax_muon.models.safetensors_io import folder_at_once
from optax_muon.notebook import html_table
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.data import tokenizer as tokenizers
from optax_muon.training.loop import StepMetrics


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths inside `runs/NAME`."""

    path: Path

    @property
    def config(self) -> Path:
        """The file of the run's configuration."""
        return self.path / "config.json"

    @property
    def journal(self) -> Journal:
        """The metrics, a line per trial and step."""
        return Journal(self.path / "metrics.jsonl")

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer, if it has one."""
        return self.path / "tokenizer"

    @property
    def has_tokenizer(self) -> bool:
        """Whether its tokens are those of a tokenizer in its folder."""
        return tokenizers.is_in(self.tokenizer)

    def checkpoints(self, trial: str) -> Path:
        """The folder of one trial's checkpoints."""
        return self.path / "checkpoints" / trial

    def profile(self, trial: str) -> Path:
        """The folder of one trial's trace."""
        return self.path / "profile" / trial

    def create_or_resume(
        self,
        config: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        source: Path | None = None,
        option: str = "--name",
    ) -> None:
        """Create the folder with its `config.json`, or check that its run can be resumed.

        Args:
            config: The configuration asked for, as JSON can hold it.
            resume: Continue the run in the folder; its config must be the same.
            overwrite: Delete the run in the folder.
            source: Folder of the run that the new one starts from, which is never deleted.
            option: The option that names the folder, for messages.

        Raises:
            UsageError: When the folder holds a run and neither is asked for, when what it holds
                must not be deleted, when there is no run to resume, or when that run has another
                config.
        """
        if resume:
            return self._check_same(config, option)
        if self.path.exists():
            self._clear(overwrite, source)
        with usage_errors(), folder_at_once(self.path) as draft:
            RunFolder(draft).config.write_text(
                json.dumps(config, indent=2) + "\n", encoding="utf-8"
            )

    def read_config(self) -> dict[str, Any]:
        """The config of the run that is here.

        Raises:
            UsageError: When there is none, or it cannot be read.
        """
        if not self.config.exists():
            raise UsageError(f"there is no run in {self.path}")
        with usage_errors():
            return huggingface.read_json(self.config)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """The trials of the run that is here, each with its name at least.

        Raises:
            UsageError: When the config records none.
        """
        trials = self.read_config().get("trials")
        if _are_trials(trials):
            return trials
        raise UsageError(
            f"{self.config} has no list of trials with their names; train and finetune make such a"
            " run"
        )

    @property
    def is_training_run(self) -> bool:
        """Whether it was trained here; an import has neither trials nor steps."""
        return "trials" in self.read_config()

    def sizes(self) -> dict[str, Any]:
        """The part of the config with the sizes of the model, as `spec.model_of` takes it.

        Raises:
            UsageError: When it is no mapping.
        """
        config = self.read_config()
        sizes = config.get("training", config)
        if not isinstance(sizes, dict):
            raise UsageError(f"{self.config} has no sizes of a model under training")
        return sizes

    def _repr_html_(self) -> str:
        """Its trials and how far they have come, for notebooks."""
        rows = [["optimizer", "lr", "decay", "step", "loss", "held-out loss"]]
        for trial in self.trials:
            steps, numbers = self.journal.read(trial["name"]), trial.get("hyper_params", {})
            losses = [each.val_loss for each in steps if each.val_loss is not None]
            shown = (trial.get("title", trial["name"]), *(numbers.get(k) for k in _TUNED))
            last = (steps[-1].step, f"{steps[-1].loss:.4f}") if steps else (0, "-")
            held_out = f"{losses[-1]:.4f}" if losses else "-"
            rows.append([*map(str, (*shown, *last)), held_out])
        return html_table(rows, str(self.path))

    def trained(self, trials: Sequence[str]) -> Path:
        """The checkpoints of the last of these trials that has any.

        Raises:
            UsageError: When none has.
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
            UsageError: When there is no such trial, or it has none.
        """
        names = [each["name"] for each in self.trials]
        if trial not in (None, *names):
            raise UsageError(f"{self.path} has no trial {trial!r}; it has {', '.join(names)}")
        return self.trained(names if trial is None else [trial])

    def _check_same(self, config: dict[str, Any], option: str) -> None:
        saved, here = (checkpoint.describe({}, each) for each in (self.read_config(), config))
        try:
            checkpoint.check(saved, here, str(self.path))
        except ValueError as error:
            differences = " ".join(str(error).split())
            raise UsageError(
                f"{differences}; give the same options, or another {option}"
            ) from error

    def _clear(self, overwrite: bool, source: Path | None) -> None:
        if not overwrite:
            raise UsageError(
                f"{self.path} exists; --resume continues it, --overwrite deletes it, "
                "--name makes another"
            )
        config = self.read_config()
        if not (_are_trials(config.get("trials")) and isinstance(config.get("training"), dict)):
            raise UsageError(
                f"{self.path} is no run of train or finetune, and --overwrite deletes nothing "
                "else; --name makes another"
            )
        if source is not None and (_is_in(source, self.path) or _is_in(self.path, source)):
            raise UsageError(
                f"--overwrite would delete {self.path}, and --from {source} is that folder, in it "
                "or around it; --name makes another"
            )
        parent, prefix = self.path.parent, f".{self.path.name}."
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as trash:
            self.path.rename(Path(trash) / self.path.name)  # atomic, should it be interrupted


class Journal:
    """`metrics.jsonl`: one JSON object per trial and step, written as it happens."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, trial: str, metrics: StepMetrics) -> None:
        """Add a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": trial, **dataclasses.asdict(metrics)}) + "\n")

    def read(self, trial: str) -> list[StepMetrics]:
        """The steps of one trial, in order."""
        rows = [row for _, row in self._rows() if row.pop("trial") == trial]
        return [StepMetrics(**row) for row in rows]

    def truncate(self, trial: str, after: int) -> None:
        """Drop the steps of a trial after its checkpoint: they will be repeated."""
        kept = [line for line, row in self._rows() if not _is_past(row, trial, after)]
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(self.path)

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Whole lines only, and what they say: a killed process may have left a partial one.

        Raises:
            UsageError: When a line is none that `write` has written.
        """
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not row.keys() <= _COLUMNS or not row.keys() >= _NEEDED:
                raise UsageError(
                    f"{self.path}, line {number} is not a step of a run; --overwrite begins anew"
                )
            yield line, row


_COLUMNS = {"trial", *(field.name for field in dataclasses.fields(StepMetrics))}
"""The keys of a line of `metrics.jsonl`."""
_NEEDED = _COLUMNS - {"val_loss", "model"}
"""Those that every line has."""


_TUNED = ("lr", "weight_decay")
"""The hyperparameters that are shown."""


def _are_trials(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value
    )


def _is_in(path: Path, folder: Path) -> bool:
    """Whether it is the folder or lies in it, under whatever name: a link, other letters."""
    path = path.resolve()
    return any(each.samefile(folder) for each in (path, *path.parents))


def _is_past(row: dict[str, Any], trial: str, step: int) -> bool:
    return bool(row["trial"] == trial and row["step"] > step)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError about what the user gave, such as a folder, into a `UsageError`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
