"""Equinox: a GRU tells which way a spiral turns; the optimizer takes the model filtered or whole.

Filtered is Equinox's usual way: `init` and `update` see arrays only. Unfiltered, `init` takes the
module as it is; its functions and settings have no state. Both do the same.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_muon

LENGTH, HIDDEN, BATCH = 16, 32, 64


class Classifier(eqx.Module):
    """The last state of a GRU, and a linear layer on it."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, *, key):
        cell_key, head_key = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(2, HIDDEN, key=cell_key)
        self.head = eqx.nn.Linear(HIDDEN, 1, key=head_key)

    def __call__(self, path):
        """`[length, 2]` to a logit `[1]`."""

        def advance(state, point):
            return self.cell(point, state), None

        state, _ = jax.lax.scan(advance, jnp.zeros(HIDDEN), path)
        return self.head(state)


def spirals(steps):
    """Batches of paths `[batch, length, 2]`, and 1 for those that turn counterclockwise."""
    rng, time = np.random.default_rng(0), np.linspace(0.0, 1.0, LENGTH)
    for _ in range(steps):
        turns = rng.integers(2, size=(BATCH, 1))
        angle = rng.uniform(0, 2 * np.pi, (BATCH, 1)) + 6.0 * (2 * turns - 1) * time
        paths = np.stack([time * np.cos(angle), time * np.sin(angle)], axis=-1)
        yield np.float32(paths + rng.normal(0, 0.05, paths.shape)), np.float32(turns)


def arrays(tree):
    """The tree with None for all that is not trained."""
    return eqx.filter(tree, eqx.is_inexact_array)


def main(steps: int) -> None:
    """Train twice, and print what Muon was given, what was learned and whether both agree."""
    tx = optax_muon.muon(0.03)

    @eqx.filter_jit
    def train_step(model, opt_state, paths, turns, seen):
        def loss_fn(model):
            logits = jax.vmap(model)(paths)
            return optax.sigmoid_binary_cross_entropy(logits, turns).mean()

        loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
        updates, opt_state = tx.update(grads, opt_state, seen(model))
        return eqx.apply_updates(model, updates), opt_state, loss

    def train(seen):
        model = Classifier(key=jax.random.key(0))
        opt_state = tx.init(seen(model))
        for step, batch in enumerate(spirals(steps)):
            model, opt_state, loss = train_step(model, opt_state, *batch, seen)
            if step % 20 == 0:
                print(f"step {step}: loss {loss:.3f}")
        return model, loss

    print(optax_muon.label(Classifier(key=jax.random.key(0))))
    filtered, loss = train(arrays)
    whole, _ = train(lambda model: model)
    same = eqx.tree_equal(arrays(filtered), arrays(whole))
    print(f"filtered and whole give the same model: {bool(same)}")
    print(f"final loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
