"""Flax nnx on a mesh of devices: JAX_NUM_CPU_DEVICES=8 python nnx_mesh.py.

FSDP and tensor parallel. The kernels say how they are sharded, `muon` takes their shardings, and
its momenta follow. A teacher of the same form gives the targets, so the loss can fall to zero.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import optax_muon

WIDTH, LAYERS, BATCH = 64, 4, 256


class Block(nnx.Module):
    """A residual block; its up projection is sharded by columns, its down projection by rows."""

    def __init__(self, *, rngs: nnx.Rngs):
        def kernel_init(*names):
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(
            WIDTH, 4 * WIDTH, kernel_init=kernel_init("fsdp", "tensor"), use_bias=False, rngs=rngs
        )
        self.down = nnx.Linear(
            4 * WIDTH, WIDTH, kernel_init=kernel_init("tensor", "fsdp"), use_bias=False, rngs=rngs
        )

    def __call__(self, x):
        """`[batch, width]` in, the same out."""
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


@nnx.jit
def create(key: jax.Array) -> nnx.Module:
    """Made in `jit`, so that no kernel is ever whole on one device."""
    rngs = nnx.Rngs(key)
    return nnx.Sequential(*[Block(rngs=rngs) for _ in range(LAYERS)])


@nnx.jit
def train_step(model, teacher, optimizer, x):
    """One step; returns the mean squared error, 1 for a student that hands on its input."""
    target = teacher(x)

    def loss_fn(model):
        return jnp.mean((model(x) - target) ** 2) / jnp.mean((target - x) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main(steps: int) -> None:
    """Train the student, and print what Muon was given and what was learned."""
    tensor = 2 if jax.device_count() % 2 == 0 else 1
    shape = (jax.device_count() // tensor, tensor)
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        teacher, model = create(jax.random.key(0)), create(jax.random.key(1))
        params = nnx.state(model, nnx.Param)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        tx = optax_muon.muon(0.02, weight_decay=0.0, shardings=shardings)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        print(optax_muon.label(params))
        print(optax_muon.plan(params, shardings=shardings))

        rng, batch = np.random.default_rng(0), jax.NamedSharding(mesh, jax.P("fsdp"))
        for step in range(steps):
            x = jax.device_put(np.float32(rng.normal(size=(BATCH, WIDTH))), batch)
            loss = train_step(model, teacher, optimizer, x)
            if step % 20 == 0:
                print(f"step {step}: loss {loss:.3f}")
        momentum = nnx.state(optimizer)["opt_state"]
    sharded = [x for x in jax.tree.leaves(momentum) if not x.sharding.is_fully_replicated]
    print(f"{len(sharded)} momenta are sharded like their kernels")
    print(f"final loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
