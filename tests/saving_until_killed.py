"""A process that forks for each folder it reads a child that saves step after step, until killed.

Every number of a state is a function of its step, so whoever reads one back knows what it has to
be. A step is written down as soon as it is begun to be saved. The parent imports, and starts
nothing of JAX: a child is at work within a fraction of a second.
"""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from optax_muon.training.checkpoints import Checkpoints, RetentionPolicy
from optax_muon.training.state import State

SHAPES = {"up": (64, 96), "down": (96, 64), "scale": (64,)}


@jax.jit
def state_at(step):
    """The state after so many steps."""
    params = {name: jnp.full(shape, step, jnp.float32) for name, shape in SHAPES.items()}
    return State(params, jax.tree.map(lambda p: -p, params), jnp.full((2, 4), 0.5 * step))


def save_on(folder):
    """Go on from the newest step, for ever."""
    with Checkpoints(folder / "steps", RetentionPolicy(last=2, every=10)) as checkpoints:
        step = checkpoints.latest
        while True:
            step += 1
            checkpoints.save(step, state_at(step), {"tokens": 1000 * step})
            with (folder / "begun").open("a") as file:
                file.write(f"{step}\n")


def main():
    """Answer every folder with the child's number, and with its signal once it has ended."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            save_on(Path(line.strip()))
        answer(child)
        answer(os.WTERMSIG(os.waitpid(child, 0)[1]))


def answer(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
