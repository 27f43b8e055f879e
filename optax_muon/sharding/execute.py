"""The work: what the plan says, inside one `shard_map`.

    shards -> stacks -> pool -> bring home -> orthogonalize -> bring back -> unpool -> shards

A lot travels in one all-to-all over the tuple of its mesh axes, which moves exactly what is
missing: a tile `[owner, k, m / r, n / c]` goes out and `[source, k, m / r, n / c]` comes in, and a
local transpose makes `[k, m, n]` of it. Copies are not moved in: each device takes its share of
what it has, and all gather the results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from optax_muon.sharding.cpu import opaque_ints
from optax_muon.sharding.device_groups import Group
from optax_muon.sharding.exchange import Route
from optax_muon.sharding.mesh import AnyMesh, Spec, explicit, on_explicit
from optax_muon.sharding.plan import BucketPlan, Plan
from optax_muon.sharding.search import GATHER, SPLIT, Assignment
from optax_muon.sharding.shards import Leaf

Orthogonalizer = Callable[..., jax.Array]
"""`[..., m, n] -> [..., m, n]`; takes `column_shards=Group` where the plan splits."""


def execute(
    plan: Plan, leaves: Mapping[str, jax.Array], orthogonalizer: Orthogonalizer
) -> dict[str, jax.Array]:
    """Orthogonalize the matrices of all leaves that the plan knows; the shardings stay.

    Args:
      plan: made for leaves of these shapes, dtypes and shardings.
      leaves: path to array.
      orthogonalizer: the function that each device applies to the whole matrices that it owns; a
        `jax.tree_util.Partial` where it has arrays of its own, so that they reach every device.

    Returns:
      Path to array, for the leaves of the plan.

    Raises:
      ValueError: a leaf is sharded otherwise than planned, where shardings are types.
    """
    if plan.mesh is None:
        return _on_shards(plan, orthogonalizer, {p.path: leaves[p.path] for p in plan.leaves})
    for leaf in plan.leaves:
        _check_sharding(leaf, leaves[leaf.path], plan.mesh)
    specs = {leaf.path: _spec(leaf.spec) for leaf in plan.leaves}
    if not isinstance(orthogonalizer, jax.tree_util.Partial):
        orthogonalizer = jax.tree_util.Partial(orthogonalizer)
    work = jax.shard_map(
        functools.partial(_on_shards, plan),
        mesh=plan.mesh,
        in_specs=(PartitionSpec(), specs),
        out_specs=specs,
        check_vma=False,  # an all-gather over copies is equal on all of them, which XLA cannot see
    )
    grown = {p.path: _grow(leaves[p.path], p.shape) for p in plan.leaves}
    done = work(orthogonalizer, grown)
    return {path: _cut_to(done[path], leaves[path].shape) for path in done}


def _check_sharding(leaf: Leaf, x: jax.Array, mesh: AnyMesh) -> None:
    """Where axes are Explicit, the array has to lie as planned; elsewhere the compiler moves it."""
    here, there = explicit(x, mesh), on_explicit(leaf.spec, mesh)
    if here != there:
        raise ValueError(
            f"{leaf.path} is sharded {_spec(here)} on the Explicit axes of the mesh, and the plan"
            f" was made for {_spec(there)}; make a plan of these parameters, or reshard them."
        )


def _spec(spec: Spec) -> PartitionSpec:
    return PartitionSpec(*(over or None for over in spec))


def _on_shards(
    plan: Plan, orthogonalizer: Orthogonalizer, shards: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """All buckets, one after the other, on the shards of one device."""
    stacks = {}
    for leaf in plan.leaves:
        payload = shards[leaf.path].astype(plan.payload(shards[leaf.path].dtype))
        # Unfenced, XLA pools as it casts, and can no longer write the momentum where it was.
        payload = lax.optimization_barrier(payload)
        stacks[leaf.path] = leaf.bound.to_matrices(_turn(leaf, payload))
    done: dict[tuple[str, int], jax.Array] = {}
    for bucket_plan in plan.buckets:
        pooled = bucket_plan.bucket.pack(stacks)
        scheduled = (
            orthogonalizer
            if plan.unknown_shardings
            else _scheduled(orthogonalizer, bucket_plan.turned)
        )
        done |= bucket_plan.bucket.unpack(_deal(bucket_plan, scheduled, pooled))
    joined = {}
    for leaf in plan.leaves:
        blocks = [done[leaf.path, index] for index in range(len(leaf.bound.blocks))]
        back = _turn(leaf, leaf.bound.from_matrices(blocks), back=True)
        # Unfenced, XLA casts first and then turns, and holds another float32 copy.
        joined[leaf.path] = lax.optimization_barrier(back).astype(shards[leaf.path].dtype)
    return joined


def _deal(bucket_plan: BucketPlan, orthogonalizer: Orthogonalizer, pooled: jax.Array) -> jax.Array:
    """All lots of a bucket `[B, m / r, n / c]`: those done at once share their trips."""
    at_once = [assignment for assignment in bucket_plan.assignments if assignment.rounds == 1]
    together = _bring_home(
        at_once, orthogonalizer, [_take(assignment, pooled) for assignment in at_once]
    )
    parts = {assignment.start: part for assignment, part in zip(at_once, together, strict=True)}
    for assignment in bucket_plan.assignments:
        if assignment.rounds > 1:
            parts[assignment.start] = _in_turns(
                assignment, orthogonalizer, _take(assignment, pooled)
            )
    ordered = [
        parts[assignment.start][: assignment.count] for assignment in bucket_plan.assignments
    ]
    return ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered)


def _take(assignment: Assignment, pooled: jax.Array) -> jax.Array:
    """The lot's tiles, filled up with zero matrices, which stay zero."""
    tiles = lax.slice_in_dim(pooled, assignment.start, assignment.start + assignment.count)
    return _grow(tiles, (assignment.count + assignment.padding, *tiles.shape[1:]))


def _in_turns(
    assignment: Assignment, orthogonalizer: Orthogonalizer, tiles: jax.Array
) -> jax.Array:
    """A lot too large to be held at once."""
    turns = tiles.reshape(assignment.rounds, -1, *tiles.shape[1:])
    done: jax.Array = lax.map(
        lambda some: _bring_home([assignment], orthogonalizer, [some])[0], turns
    )
    return done.reshape(tiles.shape)


def _bring_home(
    assignments: Sequence[Assignment], orthogonalizer: Orthogonalizer, tiles: Sequence[jax.Array]
) -> list[jax.Array]:
    """Lots of tiles `[k, m / r, n / c]`, to their homes, through the orthogonalizer, and back."""
    routes = [Route(assignment, x.shape) for assignment, x in zip(assignments, tiles, strict=True)]
    shares = [route.my_share(x) for route, x in zip(routes, tiles, strict=True)]
    sent = [route.address(x) for route, x in zip(routes, shares, strict=True)]
    arrived = _exchange(routes, sent)
    whole = [route.assemble(x) for route, x in zip(routes, arrived, strict=True)]
    polar = [
        _polar(assignment, orthogonalizer, x)
        for assignment, x in zip(assignments, whole, strict=True)
    ]
    parts = [route.take_apart(x) for route, x in zip(routes, polar, strict=True)]
    back = _exchange(routes, parts, back=True)
    done = [route.deliver(x) for route, x in zip(routes, back, strict=True)]
    published = _publish(assignments, done)
    return [route.join(x) for route, x in zip(routes, published, strict=True)]


def _polar(assignment: Assignment, orthogonalizer: Orthogonalizer, x: jax.Array) -> jax.Array:
    # Unfenced, XLA moves the orthogonalizer's casts across the transposes of the trips, and these
    # then transpose float32.
    x = lax.optimization_barrier(x)
    polar = (
        orthogonalizer(x, column_shards=assignment.columns)
        if assignment.layout == SPLIT
        else orthogonalizer(x)
    )
    done: jax.Array = lax.optimization_barrier(polar)
    return done


def _scheduled(orthogonalizer: Orthogonalizer, turned: bool) -> Orthogonalizer:
    """Give an accelerator the batch, and the cores of a CPU a few matrices at a time."""

    def scheduled(x: jax.Array, **column_shards: Group) -> jax.Array:
        if column_shards or (x.shape[0] == 1 and not turned):
            return orthogonalizer(x, **column_shards)
        few = functools.partial(_few_at_a_time, orthogonalizer, turned)
        done: jax.Array = lax.platform_dependent(x, cpu=few, default=orthogonalizer)
        return done

    return scheduled


def _few_at_a_time(orthogonalizer: Orthogonalizer, turned: bool, x: jax.Array) -> jax.Array:
    """Work on matrices `[B, m, n]` two or three side by side, turn after turn.

    A batched product of XLA's CPU backend goes through memory matrix by matrix, and starts each on
    all cores: on two cores a batch of 24 x (256 x 1024) takes 1.2 times as long, of 64 x (128 x
    256) 1.4 times, of 1000 such 2.2 times. Chains side by side keep the cores busy where a product
    is too small for both of them and large enough to be worth a thread: 0.9 of one after the other
    in float32 from 256 x 256 to 512 x 512, 0.8 in bfloat16, nothing gained outside.

    A transpose that is all that comes before (`turned`) is never made but carried through every
    product, which for one matrix of 4096 x 1024 takes 1.4 times as long in float32 and 3.5 times in
    bfloat16. A loop makes it, unless it is known to turn once.
    """
    count, rows, cols = x.shape
    middling = 2**16 <= rows * cols < 2**19
    together = next(n for n in ((2, 3, 1) if middling else (1,)) if count % n == 0)
    one = jax.jit(orthogonalizer)  # traced once, for all of them

    def turn(index: jax.Array, x: jax.Array) -> jax.Array:
        start = index * together
        some = lax.dynamic_slice_in_dim(x, start, together)
        done = [one(some[i : i + 1]) for i in range(together)]
        return lax.dynamic_update_slice_in_dim(x, jnp.concatenate(done), start, 0)

    # In place: `lax.map` would fill a second stack with zeros, and copy the first to cut it.
    turns: int | jax.Array = count // together
    if turned and turns == 1:
        [turns] = opaque_ints([1], x)
    done: jax.Array = lax.fori_loop(0, turns, turn, x)
    return done


def _exchange(
    routes: Sequence[Route], arrays: Sequence[jax.Array], back: bool = False
) -> list[jax.Array]:
    """One all-to-all per group of devices, or the gather of Algorithm 1 and its local return."""
    groups = [route.assignment.exchange for route in routes]
    if routes and routes[0].assignment.layout == GATHER:
        return [
            lax.dynamic_index_in_dim(x, group.index(), keepdims=False)
            if back
            else group.all_gather(x)
            for group, x in zip(groups, arrays, strict=True)
        ]
    return _fused(groups, arrays, Group.all_to_all, lead=1)


def _publish(assignments: Sequence[Assignment], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """One all-gather per group of devices that held copies."""
    return _fused(
        [assignment.replicas for assignment in assignments], arrays, Group.all_gather, lead=0
    )


def _fused(
    groups: Sequence[Group],
    arrays: Sequence[jax.Array],
    move: Callable[[Group, jax.Array], jax.Array],
    lead: int,
) -> list[jax.Array]:
    """Move arrays that go the same way in one message; `lead` axes in front belong to the move."""
    moved: dict[int, jax.Array] = {}
    for group in dict.fromkeys(groups):
        ids = [i for i, other in enumerate(groups) if other == group]
        if len(ids) == 1 or group.size == 1:
            moved |= {i: move(group, arrays[i]) for i in ids}
            continue
        flat = [arrays[i].reshape(*arrays[i].shape[:lead], -1) for i in ids]
        cuts = np.cumsum([x.shape[-1] for x in flat])[:-1].tolist()
        parts = jnp.split(move(group, jnp.concatenate(flat, -1)), cuts, -1)
        for i, part in zip(ids, parts, strict=True):
            moved[i] = part.reshape(*part.shape[:-1], *arrays[i].shape[lead:])
    return [moved[i] for i in range(len(arrays))]


def _turn(leaf: Leaf, x: jax.Array, back: bool = False) -> jax.Array:
    """Make a fused axis whole and cut another in its place, or the other way round."""
    if leaf.turn is None:
        return x
    axes = (leaf.turn.cut, leaf.turn.whole)
    cut, whole = axes[::-1] if back else axes
    turned: jax.Array = lax.all_to_all(x, leaf.turn.axes, cut, whole, tiled=True)
    return turned


def _grow(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Fill up with zeros at the end of every axis."""
    if x.shape == tuple(shape):
        return x
    return jnp.pad(x, [(0, want - have) for want, have in zip(shape, x.shape, strict=True)])


def _cut_to(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Drop what `_grow` added."""
    return x if x.shape == tuple(shape) else x[tuple(slice(length) for length in shape)]
