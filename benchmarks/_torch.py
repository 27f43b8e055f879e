"""torch.optim.Muon as a peer: unmodified, in float32, and compiled.

Its Newton-Schulz always casts to bfloat16. "In float32" means the same function with that cast
replaced by a copy.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
from torch.optim import _muon

from optax_muon.matrices import assign, paths

COEFFICIENTS = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C)
torch.set_num_threads(len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def float32() -> Iterator[None]:
    """Within this context, casts to bfloat16 are copies."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        yield


@contextlib.contextmanager
def compiled() -> Iterator[None]:
    """Within this context, the Newton-Schulz of torch.optim.Muon is compiled."""
    with mock.patch.object(_muon, "_zeropower_via_newtonschulz", _compiled()):
        yield


def can_compile() -> bool:
    """Whether the C++ compiler that torch.compile needs is installed."""
    return shutil.which("c++") is not None


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    torch._dynamo.config.recompile_limit = 64  # one program per shape
    return torch.compile(_zeropower, dynamic=False)


_zeropower = _muon._zeropower_via_newtonschulz

Setting = Callable[[], contextlib.AbstractContextManager[None]]
"""`float32`, `compiled`, or `contextlib.nullcontext` for unmodified torch."""


def newton_schulz(matrices: np.ndarray, setting: Setting, device: str = "cpu") -> Any:
    """An implementation that orthogonalizes `[B, m, n]`, one matrix after the other."""
    stack = torch.from_numpy(np.array(matrices)).to(device)

    @torch.no_grad()
    def run() -> Any:
        with setting():
            for matrix in stack:
                _zeropower(matrix, COEFFICIENTS, 5, 1e-7)
        _wait(device)

    return run


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Update:
    """torch.optim.Muon on the matrices of a tree, each a parameter, and AdamW on the others."""

    def __init__(self, params: Any, grads: Any, setting: Setting, device: str = "cpu"):
        self.matrices, others = _split(params, grads, device)
        self._setting, self._device = setting, device
        self._optimizers = [
            torch.optim.Muon(self.matrices, 1e-3, 0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, 1e-3, betas=(0.9, 0.95), foreach=True),
        ]
        self()  # creates the state, and compiles

    def __call__(self) -> None:
        """Take one step."""
        with self._setting():
            for optimizer in self._optimizers:
                optimizer.step()
        _wait(self._device)


def _split(
    params: Any, grads: Any, device: str
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The matrices `[n, m]` as torch lays them out, and the other leaves."""
    views = assign.assign(params)
    matrices, others = [], []
    named = paths.named_leaves(jax.tree.map(lambda *pair: pair, params, grads), _is_pair)
    for path, (leaf, grad) in named.items():
        if views[path] is None:
            others.append(_parameter(device, leaf, grad))
            continue
        stacks = (views[path].bind(leaf.shape).to_matrices(x) for x in (leaf, grad))
        for leaf_stack, grad_stack in zip(*stacks, strict=True):
            # torch.nn.Linear stores [out, in].
            matrices += map(functools.partial(_parameter, device), leaf_stack.mT, grad_stack.mT)
    return matrices, others


def _is_pair(node: Any) -> bool:
    return isinstance(node, tuple)


def _parameter(device: str, leaf: jax.Array, grad: jax.Array) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.from_numpy(np.array(leaf)).to(device))
    parameter.grad = torch.from_numpy(np.array(grad)).to(device)
    return parameter
