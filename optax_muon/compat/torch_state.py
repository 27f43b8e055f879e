"""Convert the state of a torch Muon into a state of `optax_muon.muon`.

Three programs use one name for the momentum, with two meanings:

    torch.optim.Muon        momentum_buffer.lerp_(grad, 1 - momentum)      an average
    Keller Jordan's Muon    momentum.lerp_(grad, 1 - beta)                 an average
    Moonlight's toy_train   buf.mul_(momentum).add_(g)                     a sum

This package keeps the paper's sum, so an average is divided by `1 - beta`. The direction is the
same in both; the weight of the next gradient differs. Torch stores matrices `[out, in]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from optax_muon.compat.optax_state import filled, set_counts

MOMENTUM = ("momentum_buffer",)
"""Names of the momentum in a torch Muon's state."""

MOMENTS = {"mu": ("exp_avg", "moment1"), "nu": ("exp_avg_sq", "moment2")}
"""Names of AdamW's moments: torch's and Keller Jordan's, Moonlight's toy_train's."""


@dataclasses.dataclass(frozen=True)
class MomentumForm:
    """What a momentum buffer of another package means.

    >>> MomentumForm.average(0.75).factor, MomentumForm.sum().factor
    (4.0, 1.0)
    """

    factor: float
    """Multiplied by this, the buffer is the paper's sum."""

    @classmethod
    def average(cls, beta: float = 0.95) -> MomentumForm:
        """`M <- beta M + (1 - beta) g`, as in `torch.optim.Muon` and Keller Jordan's Muon.

        Args:
            beta: The momentum of the run that made the state.
        """
        return cls(1 / (1 - beta))

    @classmethod
    def sum(cls) -> MomentumForm:
        """`M <- beta M + g`, as in the paper and in Moonlight's `toy_train.py`."""
        return cls(1.0)


def to_in_out(path: str, array: np.ndarray) -> np.ndarray:
    """Transpose torch's `[out, in]` to flax's `[in, out]`; embeddings are `[vocab, width]` in both.

    Args:
        path: The path of the parameter; its last name tells an embedding.
        array: Torch's array; arrays of fewer than two axes stay as they are.

    >>> to_in_out("mlp/up_proj/kernel", np.ones((8, 4))).shape
    (4, 8)
    """
    return array if array.ndim < 2 or path.split("/")[-1] == "embedding" else array.mT


def from_torch(
    state: Mapping[str, Mapping[str, Any]],
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    form: MomentumForm,
    count: int,
    transpose: Callable[[str, np.ndarray], np.ndarray] = to_in_out,
) -> optax.OptState:
    """Convert the state of a torch Muon, and of the AdamW used with it, into a state of `tx`.

    Args:
        state: What torch keeps, by parameter: `{path: optimizer.state[parameter]}`, of both
            optimizers, with our paths (`optax_muon.label(params)` prints them); arrays, or tensors
            on the CPU in a dtype that numpy has.
        tx: The `optax_muon.muon(...)` that continues, sending the same parameters to Muon.
        params: The parameters.
        form: What `momentum_buffer` means: `MomentumForm.average(0.95)` for `torch.optim.Muon` and
            Keller Jordan's Muon, `MomentumForm.sum()` for Moonlight's `toy_train.py`.
        count: Steps done so far.
        transpose: `(path, torch's array) -> ours`, for every buffer; the default transposes all
            matrices but embeddings.

    Returns:
        The state `tx.init(params)` would have, with torch's momenta, Adam's moments and step count.

    Raises:
        ValueError: a buffer that is missing, misshapen or left over, or another count in it; the
            message names the parameter.

    >>> import jax.numpy as jnp
    >>> from optax_muon.muon import muon
    >>> params = {"embedding": jnp.ones((16, 4)), "up": {"kernel": jnp.ones((4, 8))}}
    >>> buffers = {
    ...     "embedding": {"exp_avg": np.ones((16, 4)), "exp_avg_sq": np.ones((16, 4)), "step": 7},
    ...     "up/kernel": {"momentum_buffer": np.full((8, 4), 0.05)},
    ... }
    >>> state = from_torch(buffers, muon(1e-3), params, form=MomentumForm.average(0.95), count=7)
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
            found = ", ".join(buffers) or "nothing"
            raise ValueError(
                f"{path} is in the {group} group and torch's state has {found} for it, not"
                f" {names[0]}; pass muon(views=...) that assigns it as torch did."
            )
        array = transpose(path, np.asarray(buffers[name]))
        if array.shape != leaf.shape:
            raise ValueError(
                f"{path}: {name} is {list(array.shape)} after transposing and must be"
                f" {list(leaf.shape)}; pass transpose= a function that gives this shape."
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
    return set_counts(found, count)
