"""A layout from outside: one class, and one color for its picture."""

import dataclasses
import io

import jax.numpy as jnp
import matplotlib.image
import meshes
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_muon.cli.reports import plan as picture
from optax_muon.hlo import collective_bytes, collective_counts
from optax_muon.sharding import plan_picture
from optax_muon.sharding.assignment import Assignment, Role
from optax_muon.sharding.cost import Cost, Received, Traffic
from optax_muon.sharding.device_groups import Group, Message


@dataclasses.dataclass(frozen=True)
class Summed:
    """Matrices cut by rows over one axis: all devices add up their parts, and work on the whole."""

    roles: tuple[Role, ...]
    name = "summed"
    homes = ()
    sharing = 1

    @classmethod
    def assign(cls, search, count):
        [(axis, size)] = search.geometry.rows_over
        rows, cols = search.geometry.rows, search.geometry.cols
        work = search.work.work_of(rows, cols)
        one = search.work.cost(work, rows, cols)
        summed = count * rows * cols * search.work.itemsize
        cost = Cost(
            flops=count * one.flops,
            collective_bytes=summed,
            traffic=Traffic(inward=Received(all_reduce=2 * summed * (size - 1) // size)),
            min_received_bytes=summed * (size - 1) // size,
            collectives=1,
            memory=count * one.memory,
        )
        yield (Assignment(cls((Role(axis, size, "rows", 1),)), count, cost, form=work.form),)

    def describe(self, copies):
        return "every device, after a sum"

    def steps(self, tiles, orthogonalizer):
        group, (count, rows, cols) = Group((self.roles[0].sharers,)), tiles

        def start():
            return 0, group.index() * rows, 0

        def depart(x):
            whole = jnp.zeros((count, rows * group.size, cols), x.dtype)
            return Message(group, Group.psum, lax.dynamic_update_slice(whole, x, start()))

        def work(arrived):
            return lax.dynamic_slice(orthogonalizer(arrived), start(), tiles)

        return depart, work


CASE = meshes.case({"fsdp": 8}, meshes.layers(4, (64, 128), P("fsdp")), layout=Summed)


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_it_runs_and_gives_the_updates_of_one_device(kind):
    found = meshes.run(CASE, kind)
    assert meshes.error(found.matrices, meshes.alone_of(CASE)) <= 1e-5
    assert collective_counts(found.text) == {"all-reduce": 1}


def test_the_program_moves_the_bytes_that_its_cost_states():
    found = meshes.run(CASE, "explicit")
    assert collective_bytes(found.text) == CASE.plan().cost.collective_bytes == 4 * 64 * 128 * 4


def test_it_is_printed_and_written():
    found = CASE.plan()
    assert "summed  every device, after a sum" in str(found)
    [bucket] = found.to_dict()["buckets"]
    assert [each["layout"] for each in bucket["assignments"]] == ["summed"]


def test_it_is_drawn_in_its_color(monkeypatch):
    monkeypatch.setitem(plan_picture.TINTS, "summed", ("#ff00ff",))
    image = matplotlib.image.imread(io.BytesIO(picture.png(CASE.plan(), dpi=40)))
    assert (np.abs(image[..., :3] - (1, 0, 1)).max(axis=-1) < 0.05).any()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="layout 'ring' is unknown; use 'home', 'gather'"):
        meshes.case({"fsdp": 8}, meshes.layers(1, (8, 8), P()), layout="ring").plan()
