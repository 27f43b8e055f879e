"""The checkpoints of a run: what training changes, by step, saved by orbax in the background."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from optax_muon.models.stops import UsageError
from optax_muon.models.training.train import State


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest, and every n-th step for good.

    Attributes:
        last: how many of the newest stay.
        every: steps divisible by it stay, as the paper's intermediate checkpoints; None: no others.
    """

    last: int = 2
    every: int | None = None

    def __post_init__(self) -> None:
        """Refuse what keeps nothing."""
        for name in ("last", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"Keep: {name} is {value}, it must be at least 1")

    @property
    def policy(self) -> policies.PreservationPolicy:
        """As orbax wants it."""
        newest = [policies.LatestN(self.last)]
        others = [policies.EveryNSteps(self.every)] if self.every else []
        return policies.AnyPreservationPolicy([*newest, *others])


class Checkpoints:
    """The saved states of one contestant, by step.

    Saving goes on in the background; leaving the context waits for it. A step is there whole or not
    at all, however the process ends.

    Args:
        path: the folder of the steps.
        keep: which steps stay.
        settings: what has to be the same to go on.
    """

    def __init__(
        self, path: Path, keep: Keep | None = None, settings: Mapping[str, Any] | None = None
    ):
        self.path = path.absolute()
        self._settings = settings or {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=(keep or Keep()).policy, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int:
        """The newest saved step; 0 when there is none."""
        return self._manager.latest_step() or 0

    @property
    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State) -> None:
        """Save the state after `step` steps, if it is not saved yet."""
        if step not in self._manager.all_steps():
            save = ocp.args.StandardSave
            items = {name: save(item) for name, item in state._asdict().items()}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: State, step: int | None = None) -> State:
        """A saved state, with the structure, dtypes and shardings of `like`.

        Args:
            like: a state of the same shapes, on any mesh.
            step: which one; None is the newest.

        Raises:
            UsageError: when there is no such step.
        """
        restore = ocp.args.StandardRestore
        items = {name: restore(item) for name, item in like._asdict().items()}
        saved = self._manager.restore(self._step(step), args=ocp.args.Composite(**items))
        return State(**{name: saved[name] for name in items})

    def params(self, step: int | None = None, like: optax.Params | None = None) -> optax.Params:
        """The parameters alone of a step; None is the newest. On the shardings of `like`, if given.

        Raises:
            UsageError: when there is no such step.
        """
        args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self._manager.restore(self._step(step), args=args)["params"]

    def _step(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise UsageError(f"{self.path} has no checkpoint")
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps))
            raise UsageError(f"{self.path} has no checkpoint of step {step}; it has {there}")
        return steps[-1] if step is None else step
