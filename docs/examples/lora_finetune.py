"""Fine-tune with LoRA in Flax nnx: Muon trains the factors, and the base model stays as it is.

The new task is the base model and a linear map of rank 2 added to it, which adapters of rank 4 can
learn. Without them the loss is 1.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optax_muon

WIDTH, RANK, BATCH = 32, 4, 128


class Mlp(nnx.Module):
    """Two layers with a residual path that is linear."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        """`[batch, width]` in, the same out."""
        return self.out(x + self.down(nnx.gelu(self.up(x))))


def with_adapters(model, rngs):
    """The model with a LoRA beside every linear layer; the second factor starts at zero."""

    def adapted(_, node):
        if isinstance(node, nnx.Linear):
            shape = (node.in_features, RANK, node.out_features)
            return nnx.LoRA(*shape, base_module=node, rngs=rngs)
        return node

    return nnx.recursive_map(adapted, model)


@nnx.jit
def train_step(model, optimizer, x, target):
    """One step on the adapters alone; returns the loss in units of what the task adds."""

    def loss_fn(model):
        return jnp.mean((model(x) - target) ** 2)

    trained = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=trained)(model)
    optimizer.update(model, grads)
    return loss


def main(steps: int) -> None:
    """Train adapters, and print what Muon was given, what was learned and what stayed."""
    base = nnx.jit(lambda key: Mlp(rngs=nnx.Rngs(key)))(jax.random.key(0))
    answer = nnx.jit(lambda model, x: model(x))
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(WIDTH, 2)), rng.normal(size=(2, WIDTH))
    added = np.float32(left @ right / np.sqrt(2 * WIDTH))  # outputs of unit variance

    model = with_adapters(nnx.clone(base), nnx.Rngs(1))
    adapters = nnx.state(model, nnx.LoRAParam)
    print(optax_muon.label(adapters))
    optimizer = nnx.Optimizer(model, optax_muon.muon(0.03, weight_decay=0.0), wrt=nnx.LoRAParam)
    for step in range(steps):
        x = np.float32(rng.normal(size=(BATCH, WIDTH)))
        loss = train_step(model, optimizer, x, answer(base, x) + x @ added)
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}")

    stays = (model.up.base_module.kernel[...] == base.up.kernel[...]).all()
    print(f"the base model stays as it is: {bool(stays)}")
    print(f"final loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
