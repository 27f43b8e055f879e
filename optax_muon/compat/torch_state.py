"""Continue a run of a torch Muon as one of `optax_muon.muon`: its state, moved over.

Three programs, one name in the state, two meanings of it:

    torch.optim.Muon        momentum_buffer.lerp_(grad, 1 - momentum)      an average
    Keller Jordan's Muon    momentum.lerp_(grad, 1 - beta)                 an average
    Moonlight's toy_train   buf.mul_(momentum).add_(g)                     a sum

This package keeps the paper's sum, so an average is divided by `1 - beta`. The direction is the
same in both; what differs is how much the next gradient weighs. Torch stores matrices `[out, in]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_muon.compat.optax_state import filled

MOMENTUM = ("momentum_buffer",)
"""Names of the momentum in a torch Muon's state."""

MOMENTS = {"mu": ("exp_avg", "moment1"), "nu": ("exp_avg_sq", "moment2")}
"""Names of AdamW's moments: torch's and Keller Jordan's, Moonlight's toy_train's."""


@dataclasses.dataclass(frozen=True)
class Average:
    """Momentum as `torch.optim.Muon` and Keller Jordan keep it: `M <- beta M + (1 - beta) g`."""

    beta: float = 0.95
    """The momentum of the run that made the state."""

    @property
    def factor(self) -> float:
        """What makes a sum of it."""
        return 1 / (1 - self.beta)


@dataclasses.dataclass(frozen=True)
class Sum:
    """Momentum as the paper and Moonlight's `toy_train.py` keep it: `M <- beta M + g`."""

    factor = 1.0
    """What makes a sum of it."""


def turned(path: str, array: np.ndarray) -> np.ndarray:
    """From torch's `[out, in]` to flax's `[in, out]`; an embedding is `[vocab, width]` in both.

    >>> turned("mlp/up_proj/kernel", np.ones((8, 4))).shape
    (4, 8)
    """
    return array if array.ndim < 2 or path.split("/")[-1] == "embedding" else array.mT


def from_torch(
    state: Mapping[str, Mapping[str, Any]],
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    form: Average | Sum,
    count: int,
    turn: Callable[[str, np.ndarray], np.ndarray] = turned,
) -> optax.OptState:
    """Turn the state of a torch Muon, and of the AdamW beside it, into a state of `tx`.

    Args:
      state: what torch keeps, by parameter: `{path: optimizer.state[parameter]}`, of both
        optimizers, with our paths (`optax_muon.label(params)` prints them); arrays, or tensors on
        the CPU in a dtype that numpy has.
      tx: the `optax_muon.muon(...)` that continues, sending the same parameters to Muon.
      params: the parameters.
      form: what `momentum_buffer` means: `Average(0.95)` of `torch.optim.Muon` and Keller Jordan's
        Muon, `Sum()` of Moonlight's `toy_train.py`.
      count: steps done.
      turn: `(path, torch's array) -> ours`, for every buffer; the default transposes all matrices
        but embeddings.

    Returns:
      The state `tx.init(params)` would have, with torch's momenta, Adam's moments and the count.

    Raises:
      ValueError: a buffer that is missing, misshapen or left over, or another count in it; the
        message names the parameter.

    >>> from optax_muon.muon import muon
    >>> params = {"embedding": jnp.ones((16, 4)), "up": {"kernel": jnp.ones((4, 8))}}
    >>> buffers = {
    ...     "embedding": {"exp_avg": np.ones((16, 4)), "exp_avg_sq": np.ones((16, 4)), "step": 7},
    ...     "up/kernel": {"momentum_buffer": np.full((8, 4), 0.05)},
    ... }
    >>> state = from_torch(buffers, muon(1e-3), params, form=Average(0.95), count=7)
    >>> print(optax.tree.get(state, "MomentumState").mu["up"]["kernel"][0, :3])
    [1. 1. 1.]

    Source: torch 2.13, `torch.optim.Muon`; github.com/KellerJordan/Muon, `muon.py`;
    github.com/MoonshotAI/Moonlight, `examples/toy_train.py`.
    """
    used = set()

    def take(path: str, leaf: jax.Array, names: Sequence[str], group: str) -> jax.Array:
        used.add(path)
        buffers = state.get(path, {})
        name = next((name for name in names if name in buffers), None)
        if name is None:
            there = ", ".join(buffers) or "nothing"
            raise ValueError(
                f"{path} is in the {group} group here and torch's state has {there} for it, not"
                f" {names[0]}; pass muon(views=...) that sends it where it was."
            )
        array = turn(path, np.asarray(buffers[name]))
        if array.shape != leaf.shape:
            raise ValueError(
                f"{path}: {name} is {list(array.shape)} after turning and must be"
                f" {list(leaf.shape)}; pass turn= a function that brings it there."
            )
        if int(buffers.get("step", count)) != count:
            raise ValueError(
                f"{path} has done {int(buffers['step'])} steps in torch and count is {count}."
            )
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    found = filled(
        tx.init(params),
        momentum=lambda path, leaf: form.factor * take(path, leaf, MOMENTUM, "Muon"),
        moment=lambda kind, path, leaf: take(path, leaf, MOMENTS[kind], "Adam"),
    )
    left = [path for path in state if path not in used]
    if left:
        raise ValueError(
            f"torch's state has {', '.join(state[left[0]])} for {left[0]!r}, and the new optimizer"
            " keeps nothing of that path; give the state our paths, those of its parameters only."
        )
    return optax.tree.set(found, count=jnp.asarray(count, jnp.int32))
