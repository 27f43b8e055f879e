"""Options and checks that several commands share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from optax_muon.errors import UsageError
from optax_muon.models.spec import Model
from optax_muon.training import distributed
from optax_muon.training.devices import Devices, parse_mesh
from optax_muon.training.profile import NO_PROFILE, Profile
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.trackers import TRACKERS, check_installed

MOST = 2**63 - 1
"""The largest whole number that an option may be; a seed is a number of 64 bits."""


def at_least(least: float, name: str, value: float | None) -> None:
    """Check that an option is neither too small nor infinite; None is one that is not given.

    Raises:
        UsageError: With the option as it is typed.

    >>> at_least(1, "eval_every", 20)
    >>> at_least(0, "temperature", float("nan"))
    Traceback (most recent call last):
      ...
    optax_muon.errors.UsageError: --temperature is nan; it must be at least 0 and finite
    """
    if value is None or least <= value <= MOST:
        return
    option = name.replace("_", "-")
    if math.isfinite(value):
        bound = f"at least {least}" if value < least else f"at most {MOST}"
    else:
        bound = f"at least {least} and finite"
    raise UsageError(f"--{option} is {value}; it must be {bound}")


def assignments(words: Sequence[str]) -> dict[str, dict[str, tuple[float, ...]]]:
    """The hyperparameters of `--set`, by optimizer and name.

    Raises:
        UsageError: When a word is not `OPTIMIZER.HYPERPARAMETER=NUMBER[,NUMBER...]`.

    >>> assignments(["muon.lr=1e-3,2e-3", "muon.weight_decay=0.1"])
    {'muon': {'lr': (0.001, 0.002), 'weight_decay': (0.1,)}}
    """
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for word in words:
        target, _, numbers = word.partition("=")
        optimizer, _, name = target.rpartition(".")
        try:
            values = tuple(map(float, numbers.split(",")))
        except ValueError:
            values = ()
        if not (optimizer and name and values):
            raise UsageError(
                f"--set {word} is not OPTIMIZER.HYPERPARAMETER=NUMBER, such as muon.lr=1.2e-2"
            )
        if name in found.setdefault(optimizer, {}):
            raise UsageError(f"--set has {target} twice; give it once")
        found[optimizer][name] = values
    return found


def single_values(words: Sequence[str]) -> dict[str, dict[str, float]]:
    """As `assignments`, one number each.

    Raises:
        UsageError: As `assignments`, or when there are several numbers.

    >>> single_values(["muon.lr=1e-3"])
    {'muon': {'lr': 0.001}}
    """
    found = assignments(words)
    for optimizer, named in found.items():
        for name, values in named.items():
            if len(values) > 1:
                raise UsageError(
                    f"--set {optimizer}.{name} has {len(values)} numbers; only sweep takes several"
                )
    return {
        optimizer: {name: values[0] for name, values in named.items()}
        for optimizer, named in found.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where steps are computed."""

    mesh: str | None = None
    """Device mesh, as axes and sizes: data=2,fsdp=2,expert=2. data replicates the parameters, fsdp
    shards them, expert shards the experts, tensor shards heads and hidden units. The product of the
    sizes is the number of devices. One device by default."""
    accumulate: int = 1
    """Number of micro-batches that the batch of a step is split into, to save memory; the result is
    the same."""

    def devices(self, model: Model, batch: int) -> Devices:
        """The devices; initializes them, so call it after `distributed.start`.

        Raises:
            UsageError: When the mesh does not fit the devices, or something does not divide.
        """
        at_least(1, "accumulate", self.accumulate)
        devices = Devices(None if self.mesh is None else parse_mesh(self.mesh), self.accumulate)
        devices.check(model, batch)
        return devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(DeviceOptions):
    """Where a run is written, and how it starts."""

    runs: Path = Path("runs")
    """Folder of all runs."""
    distributed: bool = False
    """Start as one of several processes that train together. The environment describes them (TPU
    pods, SLURM, Open MPI, Kubernetes). Needs --mesh."""
    resume: bool = False
    """Resume the run in the folder, bit for bit as if it had never stopped; with another --mesh or
    --accumulate, up to rounding."""
    overwrite: bool = False
    """Delete the run in the folder and start again."""
    profile: int | None = None
    """Number of steps of each trial to trace with jax.profiler, after its first two. The traces are
    written to the folder profile of the run, for xprof and TensorBoard."""

    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Also send the metrics to experiment trackers; metrics.jsonl always holds them. Each needs
    the extra of its name: pip install 'optax-muon[tensorboard]'. TensorBoard's files are written to
    the folder tensorboard of the run."""

    def check_run(self) -> None:
        """Check that the options do not contradict each other.

        Raises:
            UsageError: When they do.
            MissingExtraError: When a tracker is not installed.
        """
        at_least(1, "accumulate", self.accumulate)
        at_least(1, "profile", self.profile)
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite are mutually exclusive")
        if self.distributed and self.mesh is None:
            raise UsageError("--distributed needs --mesh, which says how devices share the work")
        check_installed(self.track)

    @property
    def traced(self) -> Profile:
        """The steps that are traced."""
        return NO_PROFILE if self.profile is None else Profile(self.profile)

    def folder(self, name: str) -> RunFolder:
        """The folder of a run.

        Raises:
            UsageError: When the name leads out of `--runs`, or is that folder.
        """
        path = self.runs / name
        if self.runs.resolve() not in path.resolve().parents:
            raise UsageError(f"--name is {name!r}, it must name a folder inside --runs {self.runs}")
        return RunFolder(path)

    def tracker_hints(self, folder: RunFolder) -> str:
        """Where each tracker shows the run, a line each."""
        shown = (f"{name}: {TRACKERS[name].hint.format(folder=folder.path)}" for name in self.track)
        return "".join(f"\n{line}" for line in shown)

    def start(self) -> None:
        """Connect to the other processes, if there are any."""
        if self.distributed:
            distributed.start()
