"""Orbax's `CheckpointManager` in one's own loop: stop, start again, and get the same run.

`optax_muon.checkpoint` gives the arguments for the manager. A description is saved beside the
arrays and compared before they are read, so a state that does not fit is refused.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_muon
from optax_muon import checkpoint

WIDTH, LAYERS, BATCH, EVERY = 32, 4, 64, 20
SETTINGS = {"beta": 0.95}  # what may not change between saving and restoring
tx = optax_muon.muon(0.02, beta=SETTINGS["beta"], weight_decay=0.0)


def init(seed):
    """A stack of residual layers `[layer, width, width]`."""
    kernel = np.random.default_rng(seed).normal(size=(LAYERS, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return {
        "layers": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros((LAYERS, WIDTH))}
    }


def apply(params, x):
    """`[batch, width]` in, the same out."""

    def layer(x, weights):
        return x + jnp.tanh(x @ weights["kernel"] + weights["bias"]), None

    return jax.lax.scan(layer, x, params["layers"])[0]


@jax.jit
def train_step(state, teacher, x):
    """One step; returns the loss."""

    def loss_fn(params):
        return jnp.mean((apply(params, x) - apply(teacher, x)) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, loss


def train(folder, steps):
    """Train to `steps`, from the latest checkpoint in the folder if there is one."""
    params = init(1)
    state, first, teacher = {"params": params, "opt_state": tx.init(params)}, 0, init(0)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=EVERY)
    with ocp.CheckpointManager(folder, options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            saved = manager.restore(latest, args=checkpoint.description_args())["description"]
            checkpoint.check(saved, checkpoint.describe(state, SETTINGS))
            found = manager.restore(latest, args=checkpoint.restore_args(state))
            state, first = checkpoint.restored_items(found, state), latest
            print(f"restored step {latest}")
        for step in range(first, steps):
            x = np.float32(np.random.default_rng(step).normal(size=(BATCH, WIDTH)))
            state, loss = train_step(state, teacher, x)
            if step % EVERY == 0:
                print(f"step {step}: loss {loss:.3f}")
            manager.save(step + 1, args=checkpoint.save_args(state, SETTINGS))
    return state, loss


def main(steps: int) -> None:
    """Train at once and with a stop in between; print what Muon was given and what was learned."""
    print(optax_muon.label(init(0)))
    with tempfile.TemporaryDirectory() as folder:
        at_once, loss = train(Path(folder) / "at_once", steps)
        train(Path(folder) / "stopped", steps // 2)
        resumed, _ = train(Path(folder) / "stopped", steps)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), at_once, resumed)
    print(f"the resumed run is the same, bit for bit: {all(jax.tree.leaves(same))}")
    print(f"final loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
