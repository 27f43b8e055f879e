"""What the plan promises, the compiled program keeps: collectives, bytes, operations, numbers."""

import math

import meshes
import pytest
from jax.sharding import PartitionSpec as P
from meshes import TABLE

from optax_muon.hlo import collective_bytes, collective_counts, collectives
from optax_muon.polar import KELLER, Plain

KINDS = ("explicit", "auto")

ONLY = {
    "rows": {"all-to-all": 2},
    "columns": {"all-to-all": 2},
    "half of each, half of them tall": {"all-to-all": 4},
    "two axes": {"all-to-all": 2},
    "stack by rows": {"all-to-all": 2},
    "stack by both": {"all-to-all": 2},
    "stack by layer": {},
    "replicas": {"all-to-all": 2, "all-gather": 1},
    "experts": {"all-to-all": 2},
    "qkv whole": {"all-to-all": 2},
    "qkv per head": {"all-to-all": 2},
}
"""All collectives of the program, where each matrix is whole on one device: in, and out."""

HEAVY = ("stack by rows", "stack by both", "nine", "twelve copies", "experts", "three")
"""Rows of more than a hundred GFLOP."""


def rows(names):
    """Test parameters for rows of the table, the heavy ones marked."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in HEAVY else []) for n in names]


def whole_matrices(case, kind):
    """Bytes that have to arrive at a device, counted from the layout alone, in float32.

    A device owns `count / devices` matrices, has a tile of each, lacks the rest; back home it lacks
    the tiles of all matrices but those it owns.
    """
    planned = case.plan(kind)
    total = 0.0
    for bucket_plan in planned.buckets:
        bucket, sizes = bucket_plan.bucket, dict(case.mesh)
        pieces = math.prod(sizes[axis] for axis in (*bucket.rows_over, *bucket.cols_over))
        shared = planned.devices / bucket_plan.copies
        owned = bucket.size / shared
        lacks = owned * (1 - 1 / pieces) + (bucket.size / pieces - owned / pieces)
        total += lacks * bucket.rows * bucket.cols * 4
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", rows(TABLE))
class TestTable:
    def test_the_updates_are_those_of_one_device(self, name, kind):
        case = TABLE[name]
        layouts = {
            assignment.layout
            for bucket_plan in case.plan(kind).buckets
            for assignment in bucket_plan.assignments
        }
        # Whole matrices see the same products in another order; shared ones sum in pieces.
        tolerance = 1e-4 if "split" in layouts else 1e-5
        error = meshes.error(meshes.run(case, kind).matrices, meshes.alone_of(case))
        assert error <= tolerance

    def test_the_updates_lie_as_the_gradients_do(self, name, kind):
        case = TABLE[name]
        found = {path: x.sharding for path, x in meshes.run(case, kind).updates.items()}
        assert found == case.shardings(kind)

    def test_the_program_moves_the_bytes_that_the_plan_states(self, name, kind):
        case = TABLE[name]
        assert collective_bytes(meshes.run(case, kind).text) == pytest.approx(
            case.plan(kind).cost.collective_bytes, rel=0.02
        )

    def test_the_program_does_the_operations_that_the_plan_states(self, name, kind):
        case = TABLE[name]
        # Every product is counted; a share of an odd matrix is rounded down.
        assert meshes.run(case, kind).flops == pytest.approx(case.plan(kind).cost.flops, rel=1e-3)

    def test_devices_share_the_operations_evenly(self, name, kind):
        plan = TABLE[name].plan(kind)
        # Three matrices on eight devices: one home of four stands idle, and what the Gram form does
        # on the small side is done by both devices of a home. It is still less than an even share
        # of the plain form.
        even = plain_share(plan) if name == "three" else even_share(plan)
        assert meshes.run(TABLE[name], kind).flops <= 1.15 * even


def even_share(plan):
    """Operations per device if the matrices were spread evenly, each in the form chosen for it.

    Devices that share a matrix may take the plain form where one device alone takes another: forms
    are chosen by time, messages included.
    """
    total = 0
    for d in plan.buckets:
        plain = Plain().count(d.bucket.rows, d.bucket.cols, KELLER.rows).flops
        for assignment in d.assignments:
            one = plain if assignment.form == "plain" else d.matrix_cost.flops
            total += assignment.count * d.copies * one
    return total / plan.devices


def plain_share(plan):
    """Operations per device if all matrices took the plain form, spread evenly."""
    whole = [
        d.bucket.size * d.copies * Plain().count(d.bucket.rows, d.bucket.cols, KELLER.rows).flops
        for d in plan.buckets
    ]
    return sum(whole) / plan.devices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", rows(ONLY))
def test_the_program_has_the_promised_collectives_and_no_other(name, kind):
    assert collective_counts(meshes.run(TABLE[name], kind).text) == ONLY[name]


@pytest.mark.parametrize("name", rows(ONLY))
def test_what_arrives_is_what_was_missing(name):
    cost = TABLE[name].plan().cost
    bound = whole_matrices(TABLE[name], "explicit")
    assert cost.min_received_bytes == pytest.approx(bound, rel=1e-6)
    assert cost.received_bytes <= 1.1 * bound


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_cut_over_two_axes_travel_in_one_all_to_all(kind):
    found = collectives(meshes.run(TABLE["two axes"], kind).text)
    assert [len(each.groups[0]) for each in found] == [8, 8]
    assert sum(each.bytes for each in found) == 2 * 16 * 256 * 512 * 4 // 8  # 2.1 MB


@pytest.mark.parametrize("kind", KINDS)
def test_heads_do_not_travel_between_devices_that_have_other_heads(kind):
    found = collectives(meshes.run(TABLE["qkv per head"], kind).text)
    # Device 2 i + j has part i of the rows and half j of the heads.
    assert [each.groups for each in found] == [((0, 2, 4, 6), (1, 3, 5, 7))] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_copies_are_worked_on_once_and_gathered_once(kind):
    found = collectives(meshes.run(TABLE["twelve copies"], kind).text)
    gathered = [each.bytes for each in found if each.kind == "all-gather"]
    assert gathered.count(12 * 512 * 2048 * 4) == 1
    gram = 512 * 512 * 4
    assert all(size <= 2 * gram for size in gathered if size != 12 * 512 * 2048 * 4)
    # Two devices that share a matrix swap their sums.
    assert {each.kind for each in found} == {"all-gather", "collective-permute"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_few_matrices_are_shared_by_columns_and_never_gathered_whole(kind):
    case = TABLE["three"]
    found = collectives(meshes.run(case, kind).text)
    assignments = [
        assignment
        for bucket_plan in case.plan(kind).buckets
        for assignment in bucket_plan.assignments
    ]
    assert {assignment.layout for assignment in assignments} == {"split"}
    assert sum(each.times for each in found if each.kind == "all-to-all") == 2
    gram = 1024 * 1024 * 4
    assert all(each.bytes <= gram for each in found if each.kind == "all-gather")
    seconds = case.plan(kind).buckets[0].seconds
    assert seconds["chosen"] < min(seconds["home"], seconds["gather"])


@pytest.mark.slow
def test_the_ninth_matrix_is_shared():
    [bucket_plan] = TABLE["nine"].plan().buckets
    assert [
        (assignment.layout, assignment.count, assignment.sharing)
        for assignment in bucket_plan.assignments
    ] == [
        ("home", 8, 1),
        ("split", 1, 8),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_may_name_an_axis_of_one_device(kind):
    case = meshes.case({"fsdp": 8, "tensor": 1}, meshes.layers(8, (64, 128), P("fsdp", "tensor")))
    found = meshes.run(case, kind)
    assert meshes.error(found.matrices, meshes.alone_of(case)) <= 1e-5
    assert {path: x.sharding for path, x in found.updates.items()} == case.shardings(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P()])
def test_the_whole_mesh_may_be_one_device(spec, kind):
    case = meshes.case({"fsdp": 1}, meshes.layers(3, (64, 128), spec))
    found = meshes.run(case, kind)
    assert meshes.error(found.matrices, meshes.alone_of(case)) <= 1e-5
    assert {path: x.sharding for path, x in found.updates.items()} == case.shardings(kind)
