"""The checkpoints of a run: its states by step, saved by orbax in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers as policies

from optax_muon import checkpoint
from optax_muon.errors import UsageError
from optax_muon.training.state import State

_POSITION = "position"
"""The item that holds the position in the data: for people and other programs."""

_DROPPED = "dropped"
"""The folder that a step is moved to before its files are deleted one by one: a kill meanwhile
would otherwise leave an incomplete step among the whole ones."""


@dataclasses.dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints are kept: the newest, and every n-th step for good."""

    last: int = 2
    """Number of newest checkpoints that are kept."""
    every: int | None = None
    """Steps divisible by this are kept for good, as the paper's intermediate ones; None: none."""

    def __post_init__(self) -> None:
        """Refuse a policy that keeps nothing."""
        for name in ("last", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"RetentionPolicy: {name} is {value}; it must be at least 1")

    @property
    def policy(self) -> policies.PreservationPolicy:
        """As orbax takes it."""
        newest = [policies.LatestN(self.last)]
        others = [policies.EveryNSteps(self.every)] if self.every else []
        return policies.AnyPreservationPolicy([*newest, *others])


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The saved states of one trial, by step, each with its description and its position.

    Saving runs in the background; leaving the context waits for it. A step is complete or absent,
    however the process ends.

    Args:
        path: The folder of the steps.
        keep: Which steps are kept.
        settings: What must be the same to resume, as `optax_muon.checkpoint.describe` takes it;
            None compares nothing.
    """

    def __init__(
        self,
        path: Path,
        keep: RetentionPolicy | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.path = path.absolute()
        self._settings = settings
        options = ocp.CheckpointManagerOptions(
            preservation_policy=(keep or RetentionPolicy()).policy, todelete_subdir=_DROPPED
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)
        self._has_written = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_written:
            self._clear()
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

    def save(self, step: int, state: State, position: Mapping[str, Any] | None = None) -> None:
        """Start saving the state after `step` steps, unless it is saved already.

        Args:
            step: Steps done.
            state: What training changes; it may be donated as soon as this returns.
            position: Where the run is in its data, as `describe` takes settings: tokens seen, the
                seed or key that data and randomness come from.
        """
        if step not in self._manager.all_steps():
            self._clear()
            self._has_written = True
            args = checkpoint.save_args(state._asdict(), self._settings)
            place = ocp.args.JsonSave(checkpoint.to_json({"step": step, **(position or {})}))
            args = ocp.args.Composite(**dict(args.items()), **{_POSITION: place})
            # Without force, orbax silently skips steps older than the newest.
            self._manager.save(step, args=args, force=True)

    def restore(self, like: State, step: int | None = None) -> State:
        """A saved state, bit for bit, with the structure and shardings of `like`.

        Args:
            like: A state of the same shapes and dtypes, of arrays or `ShapeDtypeStruct`s, on any
                mesh.
            step: Step of the checkpoint; None is the newest.

        Raises:
            UsageError: When there is no such step, its files are damaged, or it was made by another
                optimizer, model or other settings; the message says what differs.
        """
        return type(like)(**self._restore(like._asdict(), self._step(step)))

    def params(self, step: int | None = None, like: optax.Params | None = None) -> optax.Params:
        """The parameters alone.

        Args:
            step: Step of the checkpoint; None is the newest.
            like: Where to put them, as `restore` takes it; None is the first device.

        Raises:
            UsageError: As `restore`.
        """
        step = self._step(step)
        shapes = like if like is not None else _tree(self.shapes(step)["params"])
        return self._restore({"params": shapes}, step)["params"]

    def restore_items(self, like: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
        """Restore some parts of a state alone, such as its parameters and router biases.

        Args:
            like: Each part by its name in the state, as `restore` takes it.
            step: Step of the checkpoint; None is the newest.

        Raises:
            UsageError: As `restore`.
        """
        return self._restore(like, self._step(step))

    def shapes(self, step: int | None = None) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shape and dtype of every array, by part of the state and path in it.

        Raises:
            UsageError: As `restore`.
        """
        leaves = self._description(self._step(step))["leaves"]
        return {
            part: {path: jax.ShapeDtypeStruct(**leaf) for path, leaf in named.items()}
            for part, named in leaves.items()
        }

    def array(self, part: str, path: str, step: int | None = None) -> np.ndarray:
        """Read one array alone, to the host; it takes about as much memory as the array.

        Args:
            part: Part of the state, such as `params`.
            path: Path of the leaf in that part; empty if the part is a single array.
            step: Step of the checkpoint; None is the newest.

        Raises:
            UsageError: As `restore`.
        """
        step = self._step(step)
        shape, leaf = self.shapes(step)[part][path], ocp.RestoreArgs(restore_type=np.ndarray)
        if not math.prod(shape.shape):
            return np.zeros(shape.shape, shape.dtype)  # `checkpoint` saves no array of zero size
        tree, restore = _tree({path: shape}), _tree({path: leaf})
        args = ocp.args.PyTreeRestore(tree, restore_args=restore, partial_restore=True)
        with self._one_error(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(self.path / str(step) / part, args=args)
        return jax.tree.leaves(found)[0]

    def position(self, step: int | None = None) -> dict[str, Any]:
        """The position in the data: what `save` was given, and `step`; None is the newest.

        Raises:
            UsageError: As `restore`.
        """
        args = ocp.args.Composite(**{_POSITION: ocp.args.JsonRestore()})
        return self._read(self._step(step), args)[_POSITION]

    def _clear(self) -> None:
        """Delete steps that are not kept, and incomplete ones of a killed process.

        Only a writer may: to a reader, an incomplete step may be one that is being written.
        """
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            for path in (
                self.path / _DROPPED,
                *self.path.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"),
            ):
                shutil.rmtree(path, ignore_errors=True)

    def _restore(self, like: Mapping[str, Any], step: int) -> dict[str, Any]:
        here = checkpoint.describe(like, self._settings)
        try:
            checkpoint.check(self._description(step), here, str(self.path / str(step)))
        except ValueError as error:
            raise UsageError(str(error)) from error
        return checkpoint.restored_items(self._read(step, checkpoint.restore_args(like)), like)

    def _description(self, step: int) -> dict[str, Any]:
        return self._read(step, checkpoint.description_args())["description"]

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        with self._one_error(step):
            return self._manager.restore(step, args=args)

    @contextlib.contextmanager
    def _one_error(self, step: int) -> Iterator[None]:
        """Report damaged files of a step as a `UsageError` that names the other steps."""
        try:
            with checkpoint.reading(self.path / str(step)):
                yield
        except ValueError as error:
            others = ", ".join(str(other) for other in self.steps if other != step)
            way = f"; delete that folder to resume from one of {others}" if others else ""
            raise UsageError(f"{error}{way}") from error

    def _step(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise UsageError(f"{self.path} has no checkpoint")
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps))
            raise UsageError(f"{self.path} has no checkpoint of step {step}; it has {there}")
        return steps[-1] if step is None else step


def _tree(leaves: Mapping[str, Any]) -> Any:
    """The tree that paths spell; a lone array is saved in a list."""
    if "" in leaves:
        return [leaves[""]]
    return traverse_util.unflatten_dict(leaves, sep="/")  # type: ignore[no-untyped-call]
