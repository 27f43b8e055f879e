"""The checkpoints of a run: what training changes, by step, saved by orbax."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import optax
import orbax.checkpoint as ocp

from optax_muon.models.training.train import State


class Checkpoints:
    """The saved states of one contestant, by step; the newest two are kept."""

    def __init__(self, path: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(path.absolute(), options=options)

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

    def save(self, step: int, state: State) -> None:
        """Save the state after `step` steps, if it is not saved yet."""
        if step != self.latest:
            save = ocp.args.StandardSave
            items = {name: save(item) for name, item in state._asdict().items()}
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: State) -> State:
        """The newest state, with the structure, dtypes and shardings of `like`."""
        restore = ocp.args.StandardRestore
        items = {name: restore(item) for name, item in like._asdict().items()}
        saved = self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        return State(**{name: saved[name] for name in items})

    def params(self) -> optax.Params:
        """The newest parameters alone."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore())
        return self._manager.restore(self.latest, args=args)["params"]
