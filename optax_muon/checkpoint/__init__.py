"""Checkpoints of a state trained by Muon: saved with a description, and checked against it.

Orbax restores leaves by name and accepts mismatches that Muon must not: a parameter that moved from
Muon to AdamW between saving and restoring silently gets None for its moments. So a description of
the state (`describe`) is saved with its arrays, in the same step, and compared (`check`) before any
array is read:

>>> import jax.numpy as jnp, optax_muon, pathlib, tempfile
>>> params = {"embed": jnp.ones((16, 4)), "up": jnp.ones((4, 8)), "head": jnp.ones((4, 16))}
>>> def state(views):
...     return {"params": params, "opt_state": optax_muon.muon(3e-4, views=views).init(params)}
>>> rows = optax_muon.View(0, 1)
>>> path = pathlib.Path(tempfile.mkdtemp()) / "state"
>>> save(path, state({"embed": None, "up": rows, "head": None}), {"beta": 0.95})
>>> restore(path, state({"embed": None, "up": rows, "head": rows}), {"beta": 0.9})
Traceback (most recent call last):
  ...
ValueError: .../state does not fit what is to be restored:
  head was trained by AdamW and is now trained by Muon
  beta is 0.95 in the checkpoint and 0.9 now

With an `ocp.CheckpointManager` of your own:

    manager.save(step, args=checkpoint.save_args(items, settings))

    saved = manager.restore(step, args=checkpoint.description_args())["description"]
    checkpoint.check(saved, checkpoint.describe(like, settings))
    found = manager.restore(step, args=checkpoint.restore_args(like))
    items = checkpoint.restored_items(found, like)
"""

from optax_muon.checkpoint.description import check, describe, to_json
from optax_muon.checkpoint.orbax import (
    description_args,
    reading,
    restore,
    restore_args,
    restored_items,
    save,
    save_args,
)
from optax_muon.sharding.state import state_shardings, zero1_shardings

__all__ = [
    "check",
    "describe",
    "description_args",
    "reading",
    "restore",
    "restore_args",
    "restored_items",
    "save",
    "save_args",
    "state_shardings",
    "to_json",
    "zero1_shardings",
]
