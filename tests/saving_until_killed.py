"""A process that saves step after step until it is killed: `python saving_until_killed.py FOLDER`.

Every number of a state is a function of its step, so whoever reads one back knows what it has to
be. A step is written down as soon as it is begun to be saved.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from optax_muon.models.training.checkpoints import Checkpoints, Keep
from optax_muon.models.training.train import State

SHAPES = {"up": (64, 96), "down": (96, 64), "scale": (64,)}


@jax.jit
def state_at(step):
    """The state after so many steps."""
    params = {name: jnp.full(shape, step, jnp.float32) for name, shape in SHAPES.items()}
    return State(params, jax.tree.map(lambda p: -p, params), jnp.full((2, 4), 0.5 * step))


def main(folder):
    """Go on from the newest step, for ever."""
    with Checkpoints(folder / "steps", Keep(last=2, every=10)) as checkpoints:
        step = checkpoints.latest
        while True:
            step += 1
            checkpoints.save(step, state_at(step), {"tokens": 1000 * step})
            with (folder / "begun").open("a") as file:
                file.write(f"{step}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
