"""Several processes that train together: which one writes, and how they agree.

Each runs the same program on its own devices. The main process alone writes what is not an array,
and tells the others what only it can know, such as whether a folder is free. With one process
these functions do nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from optax_muon.errors import UsageError


def start() -> None:
    """Connect to the other processes; call it before anything uses devices.

    The environment describes them on a TPU pod and under SLURM, Open MPI and Kubernetes.

    Raises:
        UsageError: When the environment describes no processes, or they do not connect.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--distributed cannot start: {error}".replace("\n", " ")) from error


def is_main_process() -> bool:
    """Whether this process writes files and the terminal."""
    return jax.process_index() == 0


def on_main_process(action: Callable[[], None]) -> None:
    """Run an action in the main process while the others wait; an error of it ends all of them.

    Raises:
        Exception: What the action raised in the main process.
        UsageError: Elsewhere, that it raised.
    """
    failure = None
    if is_main_process():
        try:
            action()
        except Exception as error:  # of any kind: the others wait until they are told
            failure = error
    if any_process(failure is not None):
        raise failure or UsageError("the main process has failed; its message says why")


def any_process(condition: bool) -> bool:
    """Whether the condition holds in any process; all of them must call this."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.array(condition))))
