"""Several processes that train together: who writes, and what they have to agree on.

Each runs the same program on its own devices. The first one alone writes what is not an array; what
only one can know, such as whether a folder is free, it tells the others. With one process none of
it does anything.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from optax_muon.errors import UsageError


def start() -> None:
    """Find the other processes; before anything asks for devices.

    On a TPU pod and under SLURM the environment says who they are; elsewhere
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` do.

    Raises:
        UsageError: when the environment does not say, or the others do not come.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--distributed cannot start: {error}".replace("\n", " ")) from error


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def first(action: Callable[[], None]) -> None:
    """Let the first process act while the others wait; its refusal is everybody's.

    Raises:
        UsageError: what the first process raised, or that it raised.
    """
    refusal = None
    if is_first():
        try:
            action()
        except UsageError as error:
            refusal = error
    if any_of(refusal is not None):
        raise refusal or UsageError("the first process has refused; its message says why")


def any_of(said: bool) -> bool:
    """Whether any process says so; all must ask."""
    if jax.process_count() == 1:
        return said
    return bool(np.any(multihost_utils.process_allgather(np.array(said))))
