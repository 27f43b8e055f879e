"""A trial whose learning rate becomes infinite."""

import jax.numpy as jnp
import optax

from optax_muon.training.optimizers import HyperParams, OptimizerSpec, Trial
from optax_muon.training.styles import STYLES


def explosive_trial(steps):
    """A trial that goes well for so many steps."""

    def explode(schedule, hyper_params, views):
        return optax.sgd(lambda count: jnp.where(count < steps, 0.1, jnp.inf))

    return Trial(OptimizerSpec("explosive", "Explosive", STYLES[0], explode), HyperParams(0.1, 0.0))
