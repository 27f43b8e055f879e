"""Haiku with state: a convolutional network with batch norm, in the form of Haiku's own examples.

The images are noisy copies of ten random patterns; guessing has a loss of log(10) = 2.30.
"""

import argparse
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_muon

SIZE, CLASSES, BATCH = 8, 10, 64


class TrainingState(NamedTuple):
    """All that a step changes."""

    params: hk.MutableParams
    stats: hk.MutableState
    opt_state: optax.OptState


def forward(images, is_training):
    """`[batch, height, width, 3]` images to `[batch, classes]` logits."""
    x = hk.Conv2D(16, 3, name="conv")(images)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    x = hk.avg_pool(jax.nn.relu(x), (2, 2, 1), (2, 2, 1), "VALID")
    x = jax.nn.relu(hk.Linear(64, name="hidden")(hk.Flatten()(x)))
    return hk.Linear(CLASSES, name="logits")(x)


network = hk.without_apply_rng(hk.transform_with_state(forward))
optimizer = optax_muon.muon(0.02)


def batches(steps, seed):
    """Noisy patterns `[batch, height, width, 3]` and which they are."""
    patterns = np.random.default_rng(7).normal(size=(CLASSES, SIZE, SIZE, 3))
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        labels = rng.integers(CLASSES, size=BATCH)
        images = patterns[labels] + 2.0 * rng.normal(size=(BATCH, SIZE, SIZE, 3))
        yield np.float32(images), labels


@jax.jit
def update(state, images, labels):
    """One step; returns the loss."""

    def loss_fn(params):
        logits, stats = network.apply(params, state.stats, images, is_training=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, stats

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainingState(optax.apply_updates(state.params, updates), stats, opt_state), loss


@jax.jit
def accuracy(state, images, labels):
    """The share of images that the network names, with the averages of batch norm."""
    logits, _ = network.apply(state.params, state.stats, images, is_training=False)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def main(steps: int) -> None:
    """Train the network, and print what Muon was given and what was learned."""
    init = jax.jit(network.init, static_argnums=2)
    params, stats = init(jax.random.key(1), jnp.zeros((BATCH, SIZE, SIZE, 3)), True)
    state = TrainingState(params, stats, optimizer.init(params))
    print(optax_muon.label(params))
    for step, batch in enumerate(batches(steps, seed=0)):
        state, loss = update(state, *batch)
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}")
    (fresh,) = batches(1, seed=1)
    print(f"accuracy on fresh images {accuracy(state, *fresh):.3f}")
    print(f"final loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
