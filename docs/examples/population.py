"""A population of optimizers under `vmap`: eight learning rates in one compiled program.

`optax.inject_hyperparams` puts the learning rate into the state, and `vmap` gives every member its
own. All see the same data, so their losses can be compared.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_muon

IN, HIDDEN, OUT, BATCH = 16, 64, 8, 128
RATES = np.float32(np.geomspace(1e-4, 0.3, 8))


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


def main(steps: int) -> None:
    """Train the population, and print what Muon was given and which member learned most."""
    params, teacher = init(1), init(0)
    tx = optax.inject_hyperparams(optax_muon.muon)(learning_rate=0.0, weight_decay=0.01)
    print(optax_muon.label(params))

    def create(rate):
        state = tx.init(params)
        state.hyperparams["learning_rate"] = rate
        return params, state

    def train_step(member, x):
        params, state = member

        def loss_fn(params):
            error = apply(params, x) - apply(teacher, x)
            return jnp.mean(error**2) / jnp.mean(apply(teacher, x) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def train(rate, batches):
        return jax.lax.scan(train_step, create(rate), batches)[1]

    batches = np.float32(np.random.default_rng(2).normal(size=(steps, BATCH, IN)))
    losses = jax.jit(jax.vmap(train, in_axes=(0, None)))(RATES, batches)
    final = losses[:, -10:].mean(axis=1)
    for rate, loss in zip(RATES, final, strict=True):
        print(f"learning rate {rate:.4f}: loss {loss:.3f}")
    best = final.argmin()
    print(f"best learning rate {RATES[best]:.4f}")
    print(f"final loss {final[best]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
