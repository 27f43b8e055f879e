"""Collectives over mesh axes and pieces of them reach the devices that they are meant for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon.hlo import collective_counts
from optax_muon.sharding.device_groups import Group, Piece, Sharers

FSDP, TP = Piece("fsdp", 4, 4, 1), Piece("tensor", 2, 2, 1)
FAR, NEAR = Piece("fsdp", 4, 2, 2), Piece("fsdp", 4, 2, 1)

GROUPS = {
    "one axis": ((FSDP,), [[0, 2, 4, 6], [1, 3, 5, 7]]),
    "both axes": ((FSDP, TP), [[0, 1, 2, 3, 4, 5, 6, 7]]),
    "both axes, minor first": ((TP, FSDP), [[0, 2, 4, 6, 1, 3, 5, 7]]),
    "far half of an axis": ((FAR,), [[0, 4], [1, 5], [2, 6], [3, 7]]),
    "near half of an axis": ((NEAR,), [[0, 2], [1, 3], [4, 6], [5, 7]]),
    "far half and an axis": ((FAR, TP), [[0, 1, 4, 5], [2, 3, 6, 7]]),
    "an axis and near half": ((TP, NEAR), [[0, 2, 1, 3], [4, 6, 5, 7]]),
}
"""Pieces, and the devices (numbered `2 fsdp + tensor`) of each group, in the group's order."""


@functools.cache
def on_every_device(group, method, length):
    """Run a method on `[device, 100 device + i]`, `i < length`: a result per device."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))

    def work():
        device = 2 * lax.axis_index("fsdp") + lax.axis_index("tensor")
        x = 100 * device + jnp.arange(length, dtype=jnp.int32)
        return jnp.atleast_1d(getattr(group, method)(*[x] * bool(length)))[None]

    out = P(("fsdp", "tensor"))
    mapped = jax.shard_map(work, mesh=mesh, in_specs=(), out_specs=out, check_vma=False)
    return np.asarray(jax.jit(mapped)())


@pytest.mark.parametrize("name", GROUPS)
class TestGroup:
    def test_members_are_numbered_in_order(self, name):
        pieces, members = GROUPS[name]
        numbers = on_every_device(Group(pieces), "index", 0)[:, 0]
        for group in members:
            assert numbers[group].tolist() == list(range(len(group)))

    def test_all_to_all_sends_entry_i_to_member_i(self, name):
        pieces, members = GROUPS[name]
        arrived = on_every_device(Group(pieces), "all_to_all", Group(pieces).size)
        for group in members:
            for me, device in enumerate(group):
                assert arrived[device].tolist() == [100 * other + me for other in group]

    def test_all_gather_collects_by_number(self, name):
        pieces, members = GROUPS[name]
        gathered = on_every_device(Group(pieces), "all_gather", 1)
        for group in members:
            for device in group:
                assert gathered[device, :, 0].tolist() == [100 * other for other in group]

    @pytest.mark.parametrize(("method", "fold"), [("psum", sum), ("pmax", max)])
    def test_sums_and_maxima_run_over_the_members(self, name, method, fold):
        pieces, members = GROUPS[name]
        folded = on_every_device(Group(pieces), method, 1)
        for group in members:
            for device in group:
                assert folded[device, 0] == fold(100 * other for other in group)


@pytest.mark.parametrize("name", GROUPS)
def test_devices_that_swap_sum_and_gather_as_others_do(name):
    pieces, _ = GROUPS[name]
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))

    def work(x):
        found = []
        for swaps in (False, True):
            group = Sharers(pieces, swaps)
            scalar = x[:, :1, :1]
            found.append((group.psum(x), group.psum(scalar), group.pmax(-scalar)))
            found[-1] += (group.all_gather(x),)
        return [jnp.stack(pair)[None] for pair in zip(*found, strict=True)]

    over = P(("fsdp", "tensor"))
    x = np.random.default_rng(0).integers(-99, 99, (8 * 3, 8, 16)).astype(np.float32)
    x = jax.device_put(x, NamedSharding(mesh, over))
    mapped = jax.shard_map(work, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)
    text = jax.jit(mapped).lower(x).compile().as_text()
    rounds = Sharers(pieces).size.bit_length() - 1
    halves = rounds if rounds == 1 else 2 * rounds
    assert collective_counts(text)["collective-permute"] == halves + 3 * rounds
    for both in jax.jit(mapped)(x):
        # Sums of integers are exact in any order.
        np.testing.assert_array_equal(both[:, 0], both[:, 1])


def test_digits_of_one_axis_that_follow_each_other_are_one():
    assert Group((FAR, NEAR)) == Group((FSDP,))
    assert Group((NEAR, FAR)) != Group((FSDP,))


def test_pieces_of_one_device_do_not_count():
    assert Group((FSDP, Piece("tensor", 2, 1, 2))) == Group((FSDP,))
    assert Group(()).size == 1


def test_a_group_of_one_moves_nothing():
    alone, x = Group(()), jnp.ones((1, 3))
    assert alone.all_to_all(x) is alone.psum(x) is alone.pmax(x) is x
    assert alone.all_gather(x).shape == (1, 1, 3)
    assert int(alone.index()) == 0
