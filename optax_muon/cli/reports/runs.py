"""The comparison of finished runs: held-out curves on one picture, final losses in one table.

Trials that differ in their seed alone are repetitions: they are one curve and one row, with the
mean and its 95% interval by Student's t. The first row is the baseline.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from optax_muon.cli.reports import pictures
from optax_muon.cli.reports.tables import markdown_table
from optax_muon.cli.reports.training import crossing
from optax_muon.errors import UsageError
from optax_muon.training.config import unit_of
from optax_muon.training.optimizers import REGISTRY
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.statistics import half_width
from optax_muon.training.styles import Style, nth

HEADINGS = ("optimizer", "runs", "lr", "decay", "steps", "seeds", "loss", "95%", "reached")


@dataclasses.dataclass(frozen=True)
class RunTrial:
    """One trial of a run, as its folder records it."""

    path: Path
    """Folder of the run."""
    name: str
    """Name of the optimizer."""
    title: str
    """Its name in tables."""
    hyper_params: Mapping[str, float]
    """Its hyperparameters."""
    training: Mapping[str, Any]
    """What all trials of the run share, but for the seed."""
    seed: int
    """Seed of the parameters and of the data's order."""
    text: str
    """Hash of the data."""
    source: tuple[str | None, str | None]
    """The run that it started from and the trial of that run, as its config records them."""
    curve: Sequence[tuple[int, float]]
    """Steps and held-out losses."""

    @property
    def run(self) -> str:
        """Name of the run's folder."""
        return self.path.resolve().name

    @property
    def key(self) -> str:
        """Equal for trials that differ in their seed alone."""
        same = [self.name, self.hyper_params, self.training, self.text, self.source]
        return json.dumps(same, sort_keys=True, default=str)

    @property
    def is_finished(self) -> bool:
        """Whether it has taken all its steps."""
        return bool(self.curve[-1][0] == self.training["steps"])


@dataclasses.dataclass(frozen=True)
class Repetitions:
    """Trials that differ in their seed alone."""

    trials: Sequence[RunTrial]
    """Trials of different seeds, the finished ones if there are any."""
    label: str = ""
    """Its name in tables and pictures, different from that of the others."""

    @property
    def first(self) -> RunTrial:
        """What they have in common."""
        return self.trials[0]

    @property
    def runs(self) -> str:
        """The names of their runs."""
        return ", ".join(dict.fromkeys(trial.run for trial in self.trials))

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Steps that all have, and the mean of their held-out losses."""
        return [(step, statistics.fmean(losses)) for step, losses in self.losses.items()]

    @property
    def losses(self) -> dict[int, list[float]]:
        """The held-out losses of all, by the steps that all have."""
        found = [dict(trial.curve) for trial in self.trials]
        common = [step for step in found[0] if all(step in each for each in found)]
        return {step: [each[step] for each in found] for step in common}

    @property
    def loss(self) -> float:
        """Mean of the held-out losses at the last step that all have."""
        return self.curve[-1][1]

    def cells(self, baseline: Repetitions) -> tuple[str, ...]:
        """A row under `HEADINGS`."""
        first, half = self.first, half_width([*self.losses.values()][-1])
        steps = first.training["steps"]
        reached = crossing(self.curve, baseline.loss)
        share = None if reached is None else reached / baseline.first.training["steps"]
        return (
            first.title,
            self.runs,
            f"{first.hyper_params['lr']:g}",
            f"{first.hyper_params['weight_decay']:g}",
            str(steps) if first.is_finished else f"{self.curve[-1][0]} of {steps}",
            str(len(self.trials)),
            f"{self.loss:.4f}",
            "-" if half is None else f"± {half:.4f}",
            "never" if share is None else f"{share:.0%}",
        )


def read(path: Path) -> list[RunTrial]:
    """The trials of a run that have been evaluated.

    Raises:
        UsageError: There is no training run, or it has no evaluation yet.
    """
    folder = RunFolder(path)
    trials = folder.trials
    config = folder.read_config()
    if not _is_whole(config):
        raise UsageError(
            f"{folder.config} does not record how {path} was trained; train and finetune make such "
            "a run"
        )
    training = {name: value for name, value in config["training"].items() if name != "seed"}
    found = []
    for trial in trials:
        steps = folder.journal.read(trial["name"])
        curve = [(each.step, each.val_loss) for each in steps if each.val_loss is not None]
        if curve:
            found.append(
                RunTrial(
                    path,
                    trial["name"],
                    trial.get("title", trial["name"]),
                    trial["hyper_params"],
                    training,
                    config["training"]["seed"],
                    config["fingerprint"],
                    (config.get("pretrained"), config.get("pretrained_trial")),
                    curve,
                )
            )
    if not found:
        raise UsageError(f"{path} has no held-out loss yet; let it train up to an evaluation")
    return found


def _is_whole(config: Mapping[str, Any]) -> bool:
    """Whether a config with trials has all that is compared."""
    training = config.get("training")
    return (
        isinstance(training, dict)
        and {"seed", "steps", "model"} <= training.keys()
        and isinstance(training["model"], dict)
        and "vocab_size" in training["model"]
        and "fingerprint" in config
        and all(_has_numbers(trial) for trial in config["trials"])
    )


def _has_numbers(trial: Mapping[str, Any]) -> bool:
    numbers = trial.get("hyper_params")
    return isinstance(numbers, dict) and {"lr", "weight_decay"} <= numbers.keys()


def grouped(trials: Sequence[RunTrial]) -> list[Repetitions]:
    """The trials by what they have in common, in order, each with a name of its own.

    Raises:
        UsageError: Two runs differ in nothing, not even in the seed.
    """
    by_key: dict[str, list[RunTrial]] = {}
    for trial in trials:
        by_key.setdefault(trial.key, []).append(trial)
    groups = [Repetitions(_comparable(each)) for each in by_key.values()]
    names = next(
        (names for name in _NAMES if len(set(names := [*map(name, groups)])) == len(groups)),
        [f"{number}. {group.first.title}" for number, group in enumerate(groups, 1)],
    )
    return [Repetitions(group.trials, name) for group, name in zip(groups, names, strict=True)]


def _comparable(trials: list[RunTrial]) -> list[RunTrial]:
    """The finished ones, if there are any; each of a seed of its own."""
    trials = [trial for trial in trials if trial.is_finished] or trials
    for one, other in itertools.combinations(trials, 2):
        if one.seed == other.seed:
            raise UsageError(
                f"{one.path} and {other.path} have the same run of {one.title}, with the same seed "
                f"{one.seed}; give one of them"
            )
    return trials


_NAMES: tuple[Callable[[Repetitions], str], ...] = (
    lambda group: group.first.title,
    lambda group: f"{group.first.title}, lr {group.first.hyper_params['lr']:g}",
    lambda group: f"{group.first.title}, {group.runs}",
    lambda group: f"{group.first.title}, {group.runs}, lr {group.first.hyper_params['lr']:g}",
)
"""Names of groups, the shortest first."""


def table(groups: Sequence[Repetitions]) -> list[Sequence[str]]:
    """The heading, and a row for each group."""
    return [HEADINGS, *(group.cells(groups[0]) for group in groups)]


def explain(groups: Sequence[Repetitions]) -> str:
    """How to read the table."""
    unit = unit_of(groups[0].first.training["model"]["vocab_size"])
    words = [
        f"loss: the last on held-out text, nats per {unit}, the mean of the seeds. 95%: half the "
        "width of the mean's interval by Student's t, where there are several seeds. reached: when "
        f"the mean curve is at the final loss of {groups[0].label}, as a fraction of its steps."
    ]
    if len({group.first.text for group in groups}) > 1:
        words.append("The runs have different data: their losses cannot be compared.")
    return " ".join(words)


def markdown(groups: Sequence[Repetitions]) -> str:
    """The table, what it means, and the picture."""
    title = f"# {', '.join(dict.fromkeys(group.runs for group in groups))}"
    alt = pictures.loss_alt((group.label, group.loss) for group in groups)
    parts = [title, markdown_table(table(groups)), explain(groups), f"![{alt}](report.png)"]
    return "\n\n".join(parts) + "\n"


def picture(groups: Sequence[Repetitions]) -> matplotlib.figure.Figure:
    """The mean curves, each with a band of its 95% interval where there are several seeds."""
    figure, axes = pictures.loss_axes(ylabel="held-out loss, nats (log scale)")
    for group, style in zip(groups, _styles(groups), strict=True):
        steps, means = zip(*group.curve, strict=True)
        label = f"{group.loss:.3f}  {group.label}"
        axes.plot(steps, means, **style.curve(len(steps)), linewidth=2, label=label)
        if len(group.trials) > 1:
            mean = np.array(means)
            half = np.array([half_width(losses) for losses in group.losses.values()], float)
            band = mean - half, mean + half
            axes.fill_between(steps, *band, color=style.color, alpha=0.12, linewidth=0)
    axes.legend(frameon=False, title="last held-out loss", handlelength=4)
    return figure


def _styles(groups: Sequence[Repetitions]) -> Iterator[Style]:
    """The optimizer's own style for its first curve; others, in turn, for what has none left."""
    own = [REGISTRY[g.first.name].style if g.first.name in REGISTRY else None for g in groups]
    free = (style for style in map(nth, itertools.count()) if style not in own)
    used: set[Style] = set()
    for style in own:
        chosen = next(free) if style is None or style in used else style
        used.add(chosen)
        yield chosen


def write(trials: Sequence[RunTrial], folder: Path) -> list[Repetitions]:
    """Write report.md, .png, .svg and .csv, the held-out losses of all trials."""
    groups = grouped(trials)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(groups), encoding="utf-8")
    pictures.save(picture(groups), folder / "report.png")
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "optimizer", "lr", "weight_decay", "seed", "step", "val_loss"])
        for trial in trials:
            numbers = [trial.hyper_params[name] for name in ("lr", "weight_decay")]
            for step, loss in trial.curve:
                rows.writerow([trial.run, trial.name, *numbers, trial.seed, step, f"{loss:.6g}"])
    return groups
