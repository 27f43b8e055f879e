"""Gradient accumulation, clipping and an average of the weights around one optax chain.

Four micro-batches make a step, so Muon orthogonalizes the mean of their gradients. The gradients
are clipped by their global norm, and an exponential moving average of the weights is kept. The
targets are noisy: the average of the weights comes closer to the noiseless ones than the weights.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_muon

IN, HIDDEN, OUT, BATCH, MICRO_BATCHES, EMA_DECAY = 16, 64, 8, 32, 4, 0.95


def init(seed):
    """A network with two hidden layers, `[in, out]` kernels."""
    rng = np.random.default_rng(seed)

    def kernel(rows, cols):
        return jnp.asarray(rng.normal(size=(rows, cols)) / np.sqrt(rows), jnp.float32)

    return {
        "first": {"kernel": kernel(IN, HIDDEN), "bias": jnp.zeros(HIDDEN)},
        "second": {"kernel": kernel(HIDDEN, HIDDEN), "bias": jnp.zeros(HIDDEN)},
        "head": {"kernel": kernel(HIDDEN, OUT)},
    }


def apply(params, x):
    """`[batch, in]` to `[batch, out]`."""
    for layer in (params["first"], params["second"]):
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]["kernel"]


tx = optax.MultiSteps(
    optax.chain(optax.clip_by_global_norm(1.0), optax_muon.muon(0.02, weight_decay=0.0)),
    every_k_schedule=MICRO_BATCHES,
)


@jax.jit
def micro_step(params, opt_state, average, x, target):
    """Add one micro-batch; every fourth changes the parameters and their average."""

    def loss_fn(params):
        return jnp.mean((apply(params, x) - target) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    updated = optax.incremental_update(params, average, step_size=1 - EMA_DECAY)
    average = optax.tree.where(tx.has_updated(opt_state), updated, average)
    return params, opt_state, average, loss


def main(steps: int) -> None:
    """Train on a teacher's noisy answers, and print what the weights and their average learned."""
    teacher, params = init(0), init(1)
    average, opt_state = params, tx.init(params)
    print(optax_muon.label(params))
    rng = np.random.default_rng(2)
    answer = jax.jit(apply)
    for step in range(MICRO_BATCHES * steps):
        x = np.float32(rng.normal(size=(BATCH, IN)))
        target = answer(teacher, x) + np.float32(0.5 * rng.normal(size=(BATCH, OUT)))
        params, opt_state, average, loss = micro_step(params, opt_state, average, x, target)
        if step % (20 * MICRO_BATCHES) == 0:
            print(f"step {step // MICRO_BATCHES}: loss {loss:.3f}")

    x = np.float32(rng.normal(size=(4096, IN)))
    truth = answer(teacher, x)
    errors = [float(jnp.var(answer(p, x) - truth) / jnp.var(truth)) for p in (params, average)]
    print(f"steps of the optimizer: {int(opt_state.gradient_step)}")
    print(f"error of the weights {errors[0]:.4f}, of their average {errors[1]:.4f}")
    print(f"final loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
