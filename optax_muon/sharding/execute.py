"""Execution of a plan, inside one `shard_map`.

    shards -> stacks -> buckets -> travel -> orthogonalize -> travel back -> stacks -> shards

The layout of each assignment decides how its tiles travel (`exchange.py`, `gather.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from optax_muon.platforms import get_device
from optax_muon.sharding import cpu, tpu
from optax_muon.sharding.assignment import Assignment, Orthogonalizer, Step
from optax_muon.sharding.bucket_plan import BucketPlan
from optax_muon.sharding.buckets import Bucket, Stacks
from optax_muon.sharding.device_groups import exchange
from optax_muon.sharding.mesh import (
    AnyMesh,
    Spec,
    axis_sizes,
    explicit_spec,
    keep_explicit,
    manual_axes,
    taken_axes,
)
from optax_muon.sharding.plan import Plan
from optax_muon.sharding.shards import LeafShard

__all__ = ["Orthogonalizer", "execute"]

_BucketRun = Generator[list[jax.Array], list[jax.Array], list[jax.Array]]
"""Yields what arrives first for a bucket, is sent it back, and returns the finished matrices."""


def execute(
    plan: Plan, leaves: Mapping[str, jax.Array], orthogonalizer: jax.tree_util.Partial
) -> dict[str, jax.Array]:
    """Orthogonalize the matrices of all leaves of the plan, and keep the leaves' shardings.

    Outside of jit it is compiled once, and then found by its plan.

    Args:
        plan: Made for leaves of these shapes, dtypes and shardings.
        leaves: Path to array, for the leaves of the plan.
        orthogonalizer: The function that each device applies to the matrices that it works on, with
            the arrays that it has of its own.

    Returns:
        Path to array.

    Raises:
        ValueError: A leaf is not sharded as planned, on mesh axes of type Explicit; or devices have
            values of their own along an axis that the plan uses.
    """
    try:
        return _execute(plan, leaves, orthogonalizer)
    except ValueError as error:
        if "spmd_axis_name" not in str(error):
            raise
        raise ValueError(
            "vmap(spmd_axis_name=...) maps over mesh axes along which the plan shares work; use"
            " jax.shard_map over them in its place, or make them Explicit and leave out the name."
        ) from error


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _execute(
    plan: Plan, leaves: Mapping[str, jax.Array], orthogonalizer: jax.tree_util.Partial
) -> dict[str, jax.Array]:
    if plan.mesh is None:
        return _run_shards(plan, orthogonalizer, leaves)
    _check_axes(plan, plan.mesh)
    for leaf in plan.leaves:
        _check_sharding(leaf, leaves[leaf.path], plan.mesh)
    specs = {leaf.path: _partition_spec(leaf.spec) for leaf in plan.leaves}
    shared = _shared_auto_axes(plan, plan.mesh)

    def run_shards(
        orthogonalizer: jax.tree_util.Partial, shards: Mapping[str, jax.Array], named: jax.Array
    ) -> dict[str, jax.Array]:
        del named
        return _run_shards(plan, orthogonalizer, shards)

    run = jax.shard_map(
        run_shards,
        mesh=plan.mesh,
        axis_names={*plan.mesh_axes},
        # JAX refuses `vmap(spmd_axis_name=...)` over axes that a spec names. No leaf's spec names
        # the axes of copies, along which the mapped values would be mixed.
        in_specs=(PartitionSpec(), specs, PartitionSpec(shared)),
        out_specs=specs,
        # The result of an all-gather over replicas is the same on all of them; JAX cannot see it.
        check_vma=False,
    )
    named = jnp.zeros(math.prod(plan.mesh_axes[axis] for axis in shared), jnp.int8)
    padded = {p.path: _pad(leaves[p.path], p.shape) for p in plan.leaves}
    done = run(orthogonalizer, padded, named)
    return {path: _trim(done[path], leaves[path].shape) for path in done}


def _check_axes(plan: Plan, mesh: AnyMesh) -> None:
    """Check that where this is traced the plan can use its axes."""
    here = jax.sharding.get_abstract_mesh()
    free = axis_sizes(mesh if here.empty else here, taken_axes(mesh))
    if missing := [axis for axis in plan.mesh_axes if axis not in free]:
        raise ValueError(
            f"the plan shares work over {', '.join(missing)}, but inside this shard_map, pmap or"
            " vmap devices have values of their own along it; make the plan inside too."
        )
    if plan.mesh_axes and manual_axes(here) and jax.__version_info__ < (0, 10):
        # There a device does not know its place along the axes that are left.
        raise ValueError(
            f"inside a shard_map over {', '.join(manual_axes(here))}, work is shared over"
            f" {', '.join(plan.mesh_axes)} from jax 0.10 on; this is jax {jax.__version__}."
        )


def _shared_auto_axes(plan: Plan, mesh: AnyMesh) -> tuple[str, ...]:
    """The Auto axes whose devices take part in the work on one matrix."""
    assignments = (each for bucket_plan in plan.buckets for each in bucket_plan.assignments)
    axes = {role.axis for assignment in assignments for role in assignment.roles}
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if axis in axes and kind == AxisType.Auto)


def _check_sharding(leaf: LeafShard, x: jax.Array, mesh: AnyMesh) -> None:
    """Check that an array is sharded as planned on Explicit axes; on others XLA reshards it."""
    found, planned = explicit_spec(x, mesh), keep_explicit(leaf.spec, mesh)
    if found != planned:
        raise ValueError(
            f"{leaf.path} is sharded {_partition_spec(found)} on the Explicit axes of the mesh, but"
            f" the plan was made for {_partition_spec(planned)}; plan again for these parameters,"
            " or reshard them."
        )


def _partition_spec(spec: Spec) -> PartitionSpec:
    return PartitionSpec(*(over or None for over in spec))


def _run_shards(
    plan: Plan, orthogonalizer: jax.tree_util.Partial, shards: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """All buckets on the shards of one device; each one's messages travel under others' work."""
    stacks = {}
    tile = get_device(plan.device).memory_tile
    for leaf in plan.leaves:
        payload = shards[leaf.path].astype(plan.payload(shards[leaf.path].dtype))
        # Without this barrier XLA fuses the cast into the concatenation and can no longer reuse
        # the momentum's buffer.
        payload = tpu.row_major(lax.optimization_barrier(payload), tile)
        stacks[leaf.path] = leaf.bound.to_matrices(_reshard_axis(leaf, payload))
    done: dict[tuple[str, int], jax.Array] = {}
    for bucket_plan, parts in _run_buckets(plan, orthogonalizer, stacks):
        done |= bucket_plan.bucket.unpack(parts)
    return {leaf.path: _restore(leaf, done, shards[leaf.path].dtype, tile) for leaf in plan.leaves}


def _run_buckets(
    plan: Plan, orthogonalizer: jax.tree_util.Partial, stacks: Stacks
) -> Iterator[tuple[BucketPlan, list[jax.Array]]]:
    """Orthogonalize the stacks of all buckets, those that receive the least first.

    The work on a bucket waits until the next one is packed. Otherwise a compiler packs as late as
    it can, and has nothing to do while the first bucket is under way.
    """
    under_way: list[tuple[BucketPlan, _BucketRun, list[jax.Array]]] = []
    for bucket_plan in plan.in_order:
        tiles = [_pack(each, bucket_plan.bucket, stacks) for each in bucket_plan.assignments]
        if under_way:
            previous, run, arrived = under_way.pop()
            if previous.cost.traffic.inward.total:
                tiles, arrived = lax.optimization_barrier((tiles, arrived))
            yield previous, _finish(run, arrived)
        scheduled: Orthogonalizer = orthogonalizer
        if not plan.unknown_shardings:
            scheduled = cpu.schedule(orthogonalizer, bucket_plan.only_transposed)
        run = _run_bucket(bucket_plan, scheduled, tiles)
        under_way.append((bucket_plan, run, next(run)))
    for last, run, arrived in under_way:
        yield last, _finish(run, arrived)


def _finish(run: _BucketRun, arrived: list[jax.Array]) -> list[jax.Array]:
    """The result of a bucket whose first messages have arrived."""
    try:
        run.send(arrived)
    except StopIteration as finished:
        parts: list[jax.Array] = finished.value
        return parts
    raise AssertionError("a bucket waits for its first messages only")


def _restore(
    leaf: LeafShard,
    done: Mapping[tuple[str, int], jax.Array],
    dtype: jnp.dtype,
    tile: tpu.MemoryTile,
) -> jax.Array:
    """A parameter's shard from its finished matrices."""
    blocks = [done[leaf.path, index] for index in range(len(leaf.bound.blocks))]
    shard = _reshard_axis(leaf, leaf.bound.from_matrices(blocks), back=True)
    # Without this barrier XLA casts before it transposes, and holds one more float32 copy.
    return tpu.row_major(lax.optimization_barrier(shard), tile).astype(dtype)


def _run_bucket(
    bucket_plan: BucketPlan, orthogonalizer: Orthogonalizer, packed: Sequence[jax.Array]
) -> _BucketRun:
    """All assignments of a bucket; those done in one chunk share their messages."""
    tiles = {each.start: x for each, x in zip(bucket_plan.assignments, packed, strict=True)}
    at_once = [each for each in bucket_plan.assignments if each.chunks == 1]
    trips = _Trips([(each, tiles[each.start]) for each in at_once], orthogonalizer)
    piped = [each for each in bucket_plan.assignments if each.pipelined]
    pipes = [_Pipeline(each, orthogonalizer, tiles[each.start]) for each in piped]
    arrived = yield [*trips.arrived, *(pipe.arrived for pipe in pipes)]
    trips.arrived = arrived[: len(at_once)]
    parts = {each.start: part for each, part in zip(at_once, trips.finish(), strict=True)}
    for each, pipe, first in zip(piped, pipes, arrived[len(at_once) :], strict=True):
        parts[each.start] = pipe.finish(first)
    for each in bucket_plan.assignments:
        if each.start not in parts:
            parts[each.start] = _run_chunks(each, orthogonalizer, tiles[each.start])
    return [parts[each.start][: each.count] for each in bucket_plan.assignments]


def _pack(assignment: Assignment, bucket: Bucket, stacks: Stacks) -> jax.Array:
    """The tiles of an assignment, padded with zero matrices, which stay zero."""
    tiles = bucket.pack(stacks, assignment.start, assignment.count)
    return _pad(tiles, (assignment.count + assignment.padding, *tiles.shape[1:]))


def _run_chunks(
    assignment: Assignment, orthogonalizer: Orthogonalizer, tiles: jax.Array
) -> jax.Array:
    """Process an assignment that does not fit in memory at once, chunk by chunk."""
    chunks = tiles.reshape(assignment.chunks, -1, *tiles.shape[1:])
    done: jax.Array = lax.map(
        lambda chunk: _Trips([(assignment, chunk)], orthogonalizer).finish()[0], chunks
    )
    return done.reshape(tiles.shape)


class _Pipeline:
    """An assignment done chunk by chunk: while one is worked on, the next travels, and the last.

    The first chunk's first message is sent at once. The first and the last chunk are outside of the
    loop, so that no iteration sends what nobody needs. By the account of the compiler for a v5p, 2
    of 64 moves of two stacks of Moonlight's experts block, where 63 do in `_run_chunks`; what is
    not a product takes 1.2 times the cycles. Sent in a few large messages, outside of the loops,
    the tiles would leave VMEM, and that would be 1.5 times.
    """

    def __init__(
        self, assignment: Assignment, orthogonalizer: Orthogonalizer, tiles: jax.Array
    ) -> None:
        self._tiles = tiles.shape
        self._chunks = tiles.reshape(assignment.chunks, -1, *tiles.shape[1:])
        self._depart, self._work, *self._rest = assignment.mechanism.steps(
            self._chunks.shape[1:], orthogonalizer
        )
        self.arrived = self._send(0)

    def finish(self, arrived: jax.Array) -> jax.Array:
        """All tiles, given what has arrived of the first chunk."""
        last = len(self._chunks) - 1
        following = self._send(1)
        message = self._work(arrived)

        def back(finished: jax.Array) -> jax.Array:
            [x] = exchange([dataclasses.replace(message, payload=finished)])
            return _finish_steps(self._rest, x)

        def body(
            i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            done, arrived, finished = carry
            following = self._send(i + 1)
            worked = self._work(arrived).payload
            return _put(done, back(finished), i - 1), following, worked

        # Not in place: the compiler for TPUs would copy all chunks in every iteration. Nor into
        # zeros: to write those takes 0.94 million cycles for each stack of Moonlight's experts.
        x = jax.typeof(self._chunks)
        empty = lax.empty(x.shape, x.dtype, out_sharding=x.sharding)
        done, arrived, finished = lax.fori_loop(1, last, body, (empty, following, message.payload))
        worked = self._work(arrived).payload
        done = _put(done, back(finished), last - 1)
        return _put(done, back(worked), last).reshape(self._tiles)

    def _send(self, i: int | jax.Array) -> jax.Array:
        chunk = lax.dynamic_index_in_dim(self._chunks, i, keepdims=False)
        [arrived] = exchange([self._depart(chunk)])
        return arrived


def _put(chunks: jax.Array, chunk: jax.Array, i: int | jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(chunks, chunk, i, 0)


def _finish_steps(steps: Sequence[Step], x: jax.Array) -> jax.Array:
    """The result of the last steps of a trip, given what has arrived."""
    *before, last = steps
    for step in before:
        [x] = exchange([step(x)])
    return last(x)


class _Trips:
    """The trips of several assignments, in lockstep, so that their messages can be joined.

    Their first messages are sent at once; what arrives is in `arrived` until `finish`.
    """

    def __init__(
        self, batch: Sequence[tuple[Assignment, jax.Array]], orthogonalizer: Orthogonalizer
    ) -> None:
        trips = [[*each.mechanism.steps(x.shape, orthogonalizer)] for each, x in batch]
        self._trips = [steps[1:] for steps in trips]
        self.arrived = exchange([steps[0](x) for steps, (_, x) in zip(trips, batch, strict=True)])

    def finish(self) -> list[jax.Array]:
        """Take the steps of all trips until each has given its tiles."""
        done: dict[int, jax.Array] = {}
        arrived = dict(enumerate(self.arrived))
        while arrived:
            given = {i: self._trips[i].pop(0)(x) for i, x in arrived.items()}
            done |= {i: x for i, x in given.items() if not self._trips[i]}
            messages = {i: x for i, x in given.items() if self._trips[i]}
            arrived = dict(zip(messages, exchange([*messages.values()]), strict=True))
        return [done[i] for i in range(len(self._trips))]


def _reshard_axis(leaf: LeafShard, x: jax.Array, back: bool = False) -> jax.Array:
    """Make a fused axis whole and cut another in its place, or the reverse."""
    if leaf.reshard is None:
        return x
    axes = (leaf.reshard.cut, leaf.reshard.whole)
    cut, whole = axes[::-1] if back else axes
    resharded: jax.Array = lax.all_to_all(x, leaf.reshard.axes, cut, whole, tiled=True)
    return resharded


def _pad(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Append zeros along every axis up to a shape."""
    if x.shape == tuple(shape):
        return x
    return jnp.pad(x, [(0, want - have) for want, have in zip(shape, x.shape, strict=True)])


def _trim(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Drop what `_pad` appended."""
    return x if x.shape == tuple(shape) else x[tuple(slice(length) for length in shape)]
