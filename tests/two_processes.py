"""One of several processes that train together on eight devices: `test_two_processes.py`.

Usage: two_processes.py ADDRESS PROCESSES NUMBER RESULT, with RESULT the `.npz` to write.
"""

import sys

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon

MODEL = {
    "embed/embedding": ((32, 16), P("fsdp", None)),
    "layers/down_proj/kernel": ((5, 32, 16), P(None, "tensor", "fsdp")),
    "layers/up_proj/kernel": ((5, 16, 32), P(None, "fsdp", "tensor")),
    "q_proj/kernel": ((64, 64), P("fsdp", "tensor")),
}
STEPS = 3


def tree(seed):
    """The same numbers in every process."""
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape, np.float32) for path, (shape, _) in MODEL.items()}


def train(params, gradients):
    """The parameters after a few steps."""
    tx = optax_muon.muon(1e-2)

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, update = tx.init(params), jax.jit(step)
    for gradient in gradients:
        params, state = update(params, state, gradient)
    return params


def main(address, processes, number, result):
    """Train, and write the parameters down."""
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.distributed.initialize(address, processes, number)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))

    def placed(seed):
        return {
            path: jax.make_array_from_callback(
                x.shape, NamedSharding(mesh, MODEL[path][1]), x.__getitem__
            )
            for path, x in tree(seed).items()
        }

    with jax.set_mesh(mesh):
        params = train(placed(0), [placed(seed + 1) for seed in range(STEPS)])
        whole = jax.jit(lambda x: jax.sharding.reshard(x, jax.tree.map(lambda _: P(), x)))(params)
    if number == 0:
        np.savez(result, **{path: np.asarray(x.addressable_data(0)) for path, x in whole.items()})
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
