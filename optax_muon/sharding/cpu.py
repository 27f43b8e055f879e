"""Workarounds for XLA's CPU backend; programs for accelerators contain none of them.

Timings are for two cores; `benchmarks/update_speed.py` and `benchmarks/compile_time.py` measure
whole updates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from optax_muon.sharding.assignment import Orthogonalizer
from optax_muon.sharding.device_groups import Group


def opaque_ints(numbers: Sequence[int], x: jax.Array) -> tuple[jax.Array, ...]:
    """Return the numbers as int32 `[]` that the compiler cannot fold into constants.

    They come from a conditional on `x` with two equal branches. If they were constants, XLA would
    compile one kernel for every offset of a slice, and take a branch as it compiles.

    >>> [int(number) for number in opaque_ints((3, 5), jnp.ones((2, 2, 2)))]
    [3, 5]
    """

    def same() -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(number, jnp.int32) for number in numbers)

    found: tuple[jax.Array, ...] = lax.cond(jnp.isfinite(x[(0,) * x.ndim]), same, same)
    return found


def split(stack: jax.Array, lengths: Sequence[int]) -> Sequence[jax.Array]:
    """Split `[sum of lengths, m, n]` into pieces of these lengths.

    >>> [piece.shape for piece in split(jnp.ones((5, 2, 3)), [2, 3])]
    [(2, 2, 3), (3, 2, 3)]
    """
    if len(lengths) == 1:
        return [stack]
    ends = [*itertools.accumulate(lengths[:-1])]
    default = functools.partial(jnp.split, indices_or_sections=ends)
    on_cpu = functools.partial(_split_by_one_kernel, lengths)
    pieces: Sequence[jax.Array] = lax.platform_dependent(stack, cpu=on_cpu, default=default)
    return pieces


def schedule(orthogonalizer: jax.tree_util.Partial, transposed: bool) -> Orthogonalizer:
    """Give an accelerator the whole batch, and a CPU a few matrices at a time.

    Args:
        orthogonalizer: Orthogonalizes matrices `[B, m, n]`. Where its attribute `supports_platform`
            is true it is told what it is traced for, and need not be traced for other platforms.
        transposed: Whether a transpose is all that happens to the matrices before.
    """
    cpu, gpu, tpu = (_traced_for(each, orthogonalizer) for each in ("cpu", "gpu", "tpu"))

    def scheduled(x: jax.Array, **column_shards: Group) -> jax.Array:
        if column_shards or (x.shape[0] == 1 and not transposed):
            return orthogonalizer(x, **column_shards)
        entries = x.shape[1] * x.shape[2]
        if entries < 2**16 and x.size <= 2**19 and not transposed:
            few = functools.partial(_in_batches, cpu)
        else:
            few = functools.partial(_few_at_a_time, cpu, transposed)
        done: jax.Array = lax.platform_dependent(x, tpu=tpu, cuda=gpu, rocm=gpu, default=few)
        return done

    return scheduled


def _traced_for(platform: str, orthogonalizer: jax.tree_util.Partial) -> Orthogonalizer:
    """The orthogonalizer on one platform, if it can be told."""
    supports = getattr(orthogonalizer.func, "supports_platform", False)
    return functools.partial(orthogonalizer, platform=platform) if supports else orthogonalizer


def _split_by_one_kernel(lengths: Sequence[int], stack: jax.Array) -> list[jax.Array]:
    """Split with one kernel for all pieces of a length.

    XLA's CPU backend compiles equal kernels once, but slices at different constant offsets are
    different kernels: 12 of 13 ms of compilation per parameter.
    """
    starts = opaque_ints([*itertools.accumulate(lengths[:-1], initial=0)], stack)
    pieces = zip(starts, lengths, strict=True)
    return [lax.dynamic_slice_in_dim(stack, start, length) for start, length in pieces]


def _in_batches(orthogonalizer: Orthogonalizer, x: jax.Array) -> jax.Array:
    """Work on a small stack `[B, m, n]` of small matrices in two batches.

    No product of such matrices keeps two cores busy, and independent batches do: 0.9 to 1.0 of the
    time of one batch alone, and where the cores are not idle otherwise 0.85 of that of a loop for
    the stacks of a Llama of width 128. Three batches gain no more, and equal batches are compiled
    once: 1.1 s of processor time for 112 scanned matrices, 1.4 s in three. In a loop the stack
    would be changed in place; here it is at most 2 MB.
    """
    one = jax.jit(orthogonalizer)  # traced once for each size
    together = -(-x.shape[0] // 2)
    starts = range(0, x.shape[0], together)
    return jnp.concatenate([one(x[start : start + together]) for start in starts])


def _few_at_a_time(orthogonalizer: Orthogonalizer, transposed: bool, x: jax.Array) -> jax.Array:
    """Work on matrices `[B, m, n]` one, two or three at a time, in a loop.

    XLA's CPU backend runs a batched product matrix by matrix, each on all cores: 24 x (256 x 1024)
    take 1.2 times as long as in a loop, 1000 x (128 x 256) 2.2 times. Two or three independent
    chains per iteration keep both cores busy between 256 x 256 and 512 x 512: 0.9 of the time in
    float32, 0.8 in bfloat16; outside this range they gain nothing.

    If a transpose is all that precedes (`transposed`), XLA fuses it into every product instead of
    computing it once: 1.4 times as long for one 4096 x 1024 in float32, 3.5 times in bfloat16. A
    loop makes XLA store the transposed matrix; where it would run once, and XLA would unroll it, a
    branch does. A loop of a length that is not known has no derivative in reverse.
    """
    count, rows, cols = x.shape
    middling = 2**16 <= rows * cols < 2**19
    together = next(n for n in ((2, 3, 1) if middling else (1,)) if count % n == 0)
    one = jax.jit(orthogonalizer)  # traced once, for all of them

    def each(some: jax.Array) -> jax.Array:
        return jnp.concatenate([one(some[i : i + 1]) for i in range(together)])

    def body(index: jax.Array, x: jax.Array) -> jax.Array:
        start = index * together
        some = lax.dynamic_slice_in_dim(x, start, together)
        return lax.dynamic_update_slice_in_dim(x, each(some), start, 0)

    done: jax.Array
    if transposed and count == together:
        [always] = opaque_ints([1], x)
        done = lax.cond(always == 1, each, lambda x: x, x)
    else:
        # In place: `lax.map` would fill a second stack with zeros, and copy the first to slice it.
        done = lax.fori_loop(0, count // together, body, x)
    return done
