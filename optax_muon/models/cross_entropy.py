"""Cross-entropy of a large vocabulary, without its logits in memory.

For 8192 tokens and Moonlight's vocabulary of 163840 the logits alone are 5 GiB in float32, and
their gradient as much again. `cross_entropy` computes them for `BLOCK` tokens at a time, and again
in the backward pass, from the features and the output head:

    loss_i = log sum_v exp(z_iv) - z_i[target_i],     z = x W
    dz_iv  = (exp(z_iv - log sum_v exp(z_iv)) - [v = target_i]) dloss_i,   dx = dz W^T,  dW = x^T dz
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from optax_muon.models.mesh import BATCH, FSDP_AXES, mark_varying, present_axes

BLOCK = 1024
"""Tokens of a device whose logits are in memory at once: 640 MiB of float32 for Moonlight."""


def cross_entropy(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, block: int = BLOCK
) -> jax.Array:
    """Cross-entropy of every token under the logits `x @ kernel`, in nats.

    Args:
        x: Features, `[b, t, hidden_size]`; on a mesh sharded over `mesh.BATCH`.
        kernel: Weights of the head, `[hidden_size, vocab_size]` in the dtype of `x`; on a mesh the
            rows are sharded over `mesh.FSDP_AXES`, the columns over `tensor`.
        targets: Tokens, `[b, t]` int32.
        block: Tokens of a device whose logits, `[block, vocab_size]` float32, are in memory
            at once.

    Returns:
        `[b, t]` float32, sharded as `targets`. Logits are float32, and so is the kernel's gradient
        while it is summed over the tokens of a device.

    >>> x, kernel, targets = jnp.ones([1, 3, 2]), jnp.zeros([2, 8]), jnp.array([[1, 7, 0]])
    >>> cross_entropy(x, kernel, targets) / jnp.log(8)
    Array([[1., 1., 1.]], dtype=float32)
    """
    apply = functools.partial(_on_a_device, block=block)
    if not jax.sharding.get_abstract_mesh().empty:
        tokens = P(present_axes(BATCH))
        head = P(present_axes(FSDP_AXES), present_axes("tensor"))
        apply = jax.shard_map(apply, in_specs=(tokens, head, tokens), out_specs=tokens)
    return apply(x, kernel, targets)


def _on_a_device(x: jax.Array, kernel: jax.Array, targets: jax.Array, *, block: int) -> jax.Array:
    """The losses of a device's tokens; the kernel's gradient is summed over devices once."""
    if rows := present_axes(FSDP_AXES):
        kernel = jax.lax.all_gather(kernel, rows, axis=0, tiled=True)
    kernel, x = mark_varying(kernel, "data"), mark_varying(x, "tensor")
    block = min(block, targets.size)
    parts = -(-targets.size // block)

    def cut(y: jax.Array) -> jax.Array:
        y = y.reshape(targets.size, *y.shape[2:])
        y = jnp.pad(y, [(0, parts * block - targets.size)] + [(0, 0)] * (y.ndim - 1))
        return y.reshape(parts, block, *y.shape[1:])

    losses = _losses(cut(x), kernel, cut(targets)).reshape(-1)
    return losses[: targets.size].reshape(targets.shape)


Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def _losses(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    """Losses `[parts, block]` of `x`, `[parts, block, hidden_size]`."""
    return _forward(x, kernel, targets)[0]


def _forward(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> tuple[jax.Array, Saved]:
    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, hit = _logits(*part, kernel)
        largest = _over_tensor(jax.lax.pmax, z.max(axis=-1))
        total = _over_tensor(jax.lax.psum, jnp.exp(z - largest[:, None]).sum(axis=-1))
        own = _over_tensor(jax.lax.psum, jnp.where(hit, z, 0).sum(axis=-1))
        log_total = largest + jnp.log(total)
        return log_total - own, log_total

    losses, log_totals = jax.lax.map(one, (x, targets))
    return losses, (x, kernel, targets, log_totals)


def _backward(saved: Saved, d_losses: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, targets, log_totals = saved

    def one(
        d_kernel: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        x, targets, log_total, d_loss = part
        z, hit = _logits(x, targets, kernel)
        dz = (jnp.exp(z - log_total[:, None]) - hit.astype(jnp.float32)) * d_loss[:, None]
        dz = dz.astype(x.dtype)
        add = jnp.einsum("nd,nv->dv", x, dz, preferred_element_type=jnp.float32)
        return d_kernel + add, jnp.einsum("nv,dv->nd", dz, kernel)

    zero = jnp.zeros_like(kernel, jnp.float32)
    d_kernel, dx = jax.lax.scan(one, zero, (x, targets, log_totals, d_losses))
    return dx, d_kernel.astype(kernel.dtype), None


_losses.defvjp(_forward, _backward)


def _logits(x: jax.Array, targets: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of a device's part of the vocabulary, and a mask of the targets' own logits."""
    z = jnp.einsum("nd,dv->nv", x, kernel, preferred_element_type=jnp.float32)
    first = jax.lax.axis_index("tensor") * z.shape[-1] if present_axes("tensor") else 0
    return z, (targets - first)[:, None] == jnp.arange(z.shape[-1])[None]


def _over_tensor(reduce: Callable[[jax.Array, str], jax.Array], x: jax.Array) -> jax.Array:
    return reduce(x, "tensor") if present_axes("tensor") else x
