"""Checkpoints of a state trained by Muon: where it lies, what it is, and orbax told to look.

Orbax restores by names of leaves and lets pass what Muon cannot: a parameter that went from Muon to
AdamW between saving and restoring gets None for its moments, in silence. So the description of a
state (`describe`) is saved beside its arrays, in the same step, and compared (`check`) before
anything is read:

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
  head was trained by AdamW and is Muon's here
  beta is 0.95 there and 0.9 here

Whoever has an `ocp.CheckpointManager` does the same with it, in the same step of a manager:

    manager.save(step, args=checkpoint.save_args(items, settings))

    saved = manager.restore(step, args=checkpoint.description_args())["description"]
    checkpoint.check(saved, checkpoint.describe(like, settings))
    found = manager.restore(step, args=checkpoint.restore_args(like))
    items = checkpoint.restored(found, like)
"""

from optax_muon.checkpoint.description import check, describe, plain
from optax_muon.checkpoint.orbax import (
    description_args,
    readable,
    restore,
    restore_args,
    restored,
    save,
    save_args,
)
from optax_muon.sharding.state import state_shardings, zero1_shardings

__all__ = [
    "check",
    "describe",
    "description_args",
    "plain",
    "readable",
    "restore",
    "restore_args",
    "restored",
    "save",
    "save_args",
    "state_shardings",
    "zero1_shardings",
]
