"""Inside a user's `shard_map`, `pmap` or `vmap`, every device updates the values that it has."""

import contextlib
import functools

import jax
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import (
    View,
    muon,
    orthogonalize,
    plan,
    scale_by_muon,
    state_shardings,
    zero1_shardings,
)
from optax_muon.hlo import collectives
from optax_muon.sharding.cost import CostModel

REPLICAS, SHARDS = 4, 2
SHAPES = {"a": (16, 32), "b": (16, 32), "c": (16, 32), "d": (16, 32), "tall": (32, 16)}
"""One replica's parameters."""
VIEWS = dict.fromkeys(SHAPES, View(0, 1))
INSIDE = {path: P(None, "fsdp") if path != "tall" else P("fsdp", None) for path in SHAPES}
"""How a replica's parameters are cut."""
STEPS = 3
OLD = jax.__version_info__ < (0, 10)
SOME_AXES = pytest.mark.skipif(OLD, reason="jax 0.9 cannot: a device does not know its place")
MANUAL = [pytest.param(("data",), marks=SOME_AXES, id="data"), ("data", "fsdp")]
"""The axes of the `shard_map` around: some of the mesh, and all."""


@pytest.fixture(autouse=True)
def work_is_worth_sharing(monkeypatch):
    """These matrices are small; with costly messages no device would share them."""
    monkeypatch.setattr(CostModel, "for_platform", lambda *_, **__: meshes.FREE_MESSAGES)


def mesh(kind):
    return jax.make_mesh((REPLICAS, SHARDS), ("data", "fsdp"), axis_types=meshes.AXES[kind][:2])


def replicas(seed=0):
    """Other values for every replica, `[replicas, ...]`."""
    rng = np.random.default_rng(seed)
    return {
        path: rng.standard_normal((REPLICAS, *shape), np.float32) for path, shape in SHAPES.items()
    }


def replica(i, tree):
    return jax.tree.map(lambda x: x[i], tree)


@functools.cache
def one_by_one():
    """The updates of the replicas, one after the other on one device."""
    link = orthogonalize(views=VIEWS)
    update = jax.jit(lambda gradient: link.update(gradient, ())[0])
    each = [jax.tree.map(np.asarray, update(replica(i, replicas()))) for i in range(REPLICAS)]
    return jax.tree.map(lambda *updates: np.stack(updates), *each)


def on_replica(function):
    """A function of one replica's trees as one of shards `[1, ...]`."""

    def wrapped(*trees):
        done = function(*replica(0, trees))
        return jax.tree.map(lambda x: x[None], done)

    return wrapped


def crossed(text):
    """Collectives between devices of different replicas; device `2 i + j` is part of replica i."""
    return [
        each for each in collectives(text) for g in each.groups if len({i // SHARDS for i in g}) > 1
    ]


def compiled(function, manual, given, kind="explicit", check_vma=True):
    """A function of replicas, inside a `shard_map` over some axes; `given` is placed first."""
    there = mesh(kind)
    whole = manual == {"data", "fsdp"}
    specs = {path: P("data") if whole else P("data", *INSIDE[path]) for path in SHAPES}
    placed = {path: NamedSharding(there, spec) for path, spec in specs.items()}
    mapped = jax.shard_map(
        on_replica(function),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names=manual,
        check_vma=check_vma,
    )
    with jax.set_mesh(there):
        given = [jax.device_put(tree, placed) for tree in given]
        program = jax.jit(mapped, out_shardings=placed).lower(*given).compile()
        return program(*given), program.as_text()


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", ["explicit", "auto", "mixed"])
@pytest.mark.parametrize("shardings", [None, "given"])
@pytest.mark.parametrize("manual", MANUAL)
class TestShardMap:
    def test_replicas_are_updated_as_alone_and_exchange_nothing(
        self, manual, shardings, kind, check_vma
    ):
        given = None
        if shardings:
            given = {path: NamedSharding(mesh(kind), spec) for path, spec in INSIDE.items()}
        link = orthogonalize(views=VIEWS, shardings=given)
        hidden = kind == "auto" and manual == ("data",) and not shardings
        with pytest.warns(UserWarning, match="cannot see") if hidden else contextlib.nullcontext():
            updates, text = compiled(
                lambda gradient: link.update(gradient, ())[0],
                {*manual},
                [replicas()],
                kind,
                check_vma,
            )
        assert meshes.error(updates, one_by_one()) < 1e-5
        assert crossed(text) == []


@pytest.mark.parametrize("manual", MANUAL)
def test_a_plan_that_is_made_inside_uses_the_other_axes_alone(manual):
    found = []

    def update(gradient):
        found.append(plan(gradient, views=VIEWS))
        link = orthogonalize(views=VIEWS, plan=found[-1])
        return link.update(gradient, ())[0]

    updates, text = compiled(update, {*manual}, [replicas()])
    assert meshes.error(updates, one_by_one()) < 1e-5
    assert crossed(text) == []
    assert found[-1].mesh_axes == ({} if "fsdp" in manual else {"fsdp": SHARDS})
    roles = {r.axis for each in found[-1].buckets for a in each.assignments for r in a.roles}
    assert roles == set(found[-1].mesh_axes)


@pytest.mark.skipif(not OLD, reason="from jax 0.10 on the work is shared")
def test_jax_0_9_shares_no_work_beside_a_shard_map():
    with pytest.raises(ValueError, match=r"shared over fsdp from jax 0\.10 on; this is jax 0\.9"):
        compiled(
            lambda gradient: orthogonalize(views=VIEWS).update(gradient, ())[0],
            {"data"},
            [replicas()],
        )


def test_a_plan_for_a_mesh_with_manual_axes_leaves_them_alone():
    kinds = (AxisType.Manual, AxisType.Explicit)
    there = AbstractMesh((REPLICAS, SHARDS), ("data", "fsdp"), axis_types=kinds)
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
    found = plan(shapes, views=VIEWS, shardings=INSIDE, mesh=there)
    assert found.mesh_axes == {"fsdp": SHARDS}
    same = plan(shapes, views=VIEWS, shardings=INSIDE, mesh=AbstractMesh((SHARDS,), ("fsdp",)))
    assert found.buckets == same.buckets


def test_a_plan_from_outside_is_refused():
    there = mesh("explicit")
    outside = plan(
        {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()},
        views=VIEWS,
        shardings={path: NamedSharding(there, spec) for path, spec in INSIDE.items()},
    )
    link = orthogonalize(views=VIEWS, plan=outside)

    def update(gradient):
        return link.update(gradient, ())[0]

    with pytest.raises(
        ValueError, match="shares work over data, but inside this shard_map, pmap or vmap"
    ):
        compiled(update, {"data"}, [replicas()])
    with pytest.raises(
        ValueError, match="shares work over data, but inside this shard_map, pmap or vmap"
    ):
        jax.jit(jax.vmap(update))(jax.device_put(replicas(), NamedSharding(there, P("data"))))
    with pytest.raises(
        ValueError, match="shares work over data, fsdp, but inside this shard_map, pmap or vmap"
    ):
        jax.pmap(update)(replicas())


@SOME_AXES
def test_replicas_train_apart():
    """Local SGD: momentum, decay and AdamW included, several steps without a word in between."""
    views = VIEWS | {"a": None}
    params, gradients = replicas(1), [replicas(2 + step) for step in range(STEPS)]

    def train(params, *gradients):
        tx = muon(1e-2, views=views)
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    found, text = compiled(train, {"data"}, [params, *gradients])
    for i in range(REPLICAS):
        truth = jax.jit(train)(*replica(i, [params, *gradients]))
        truth = jax.tree.map(np.asarray, truth)
        assert meshes.error(replica(i, jax.tree.map(np.asarray, found)), truth) < 1e-5
    assert crossed(text) == []


def test_pmap():
    link = orthogonalize(views=VIEWS)
    planned = []

    def update(gradient):
        planned.append(plan(gradient, views=VIEWS).mesh_axes)
        return link.update(gradient, ())[0]

    mapped = jax.pmap(update, axis_name="replicas")
    assert meshes.error(mapped(replicas()), one_by_one()) < 1e-5
    assert collectives(mapped.lower(replicas()).compile().as_text()) == []
    assert {} in planned
    assert {*map(len, planned)} == {0}


def test_a_shard_map_that_is_not_compiled():
    link = orthogonalize(views=VIEWS)
    update = on_replica(lambda gradient: link.update(gradient, ())[0])
    with jax.set_mesh(jax.make_mesh((REPLICAS,), ("data",))):
        mapped = jax.shard_map(update, in_specs=P("data"), out_specs=P("data"))
        updates = mapped(jax.device_put(replicas(), P("data")))
    assert meshes.error(updates, one_by_one()) < 1e-5


@pytest.mark.parametrize("ambient", [True, False])
@pytest.mark.parametrize("inner", [lambda f: f, jax.jit], ids=["one program", "a program inside"])
def test_a_vmap_over_explicit_axes(inner, ambient):
    there = mesh("explicit")
    link = orthogonalize(views=VIEWS)
    planned = []

    def update(gradient):
        planned.append(plan(gradient, views=VIEWS).mesh_axes)
        return link.update(gradient, ())[0]

    placed = {path: NamedSharding(there, P("data", *INSIDE[path])) for path in SHAPES}
    gradients = jax.device_put(replicas(), placed)
    with jax.set_mesh(there) if ambient else contextlib.nullcontext():
        updates = jax.jit(jax.vmap(inner(update)))(gradients)
    assert meshes.error(updates, one_by_one()) < 1e-5
    assert planned == [{"fsdp": SHARDS}]
    assert {path: x.sharding for path, x in updates.items()} == placed


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older reshapes refuse the trips")
@pytest.mark.parametrize("chunked", [False, True])
def test_a_vmap_over_explicit_axes_of_what_travels_in_tiles_of_memory(chunked):
    shape = (64, 64, 512)
    x = np.random.default_rng(0).standard_normal((REPLICAS, *shape), np.float32)
    stack = jax.device_put(x, NamedSharding(mesh("explicit"), P("data", None, "fsdp")))
    views = {"stack": View(1, 2)}
    options = {"memory": 2**21, "layout": "home"} if chunked else {}

    def update(x):
        planned = plan({"stack": x}, views=views, platform="TPU v5", **options)
        [assignment] = planned.buckets[0].assignments
        assert assignment.mechanism.memory_tile == (8, 128)
        assert (assignment.layout, assignment.pipelined) == ("home", chunked)
        return orthogonalize(views=views, plan=planned).update({"stack": x}, ())[0]["stack"]

    found = jax.jit(jax.vmap(update))(stack)
    alone = orthogonalize(views={"stack": View(2, 3)})
    expected = jax.jit(lambda x: alone.update({"stack": x}, ())[0]["stack"])(x)
    # What travels is rounded to bfloat16, 2**-9.
    assert meshes.error({"stack": found}, {"stack": np.asarray(expected)}) < 1e-2


def test_a_vmap_over_all_axes():
    there = jax.make_mesh((REPLICAS,), ("data",))
    link = orthogonalize(views=VIEWS)
    update = jax.jit(jax.vmap(lambda gradient: link.update(gradient, ())[0]))
    gradients = jax.device_put(replicas(), NamedSharding(there, P("data")))
    assert meshes.error(update(gradients), one_by_one()) < 1e-5
    assert collectives(update.lower(gradients).compile().as_text()) == []


class TestVmapWithAnSpmdAxisName:
    """On Auto axes nobody tells what a `vmap` maps over, but the values must not be mixed."""

    def program(self, inside, inner=lambda f: f):
        there = mesh("auto")
        given = {path: NamedSharding(there, spec) for path, spec in inside.items()}
        link = orthogonalize(views=VIEWS, shardings=given)
        placed = {path: NamedSharding(there, P("data", *spec)) for path, spec in inside.items()}
        mapped = jax.vmap(inner(lambda g: link.update(g, ())[0]), spmd_axis_name="data")
        return jax.jit(mapped, out_shardings=placed), jax.device_put(replicas(), placed)

    def test_over_copies_that_would_share_work_it_is_refused(self):
        update, gradients = self.program(INSIDE)
        with pytest.raises(ValueError, match=r"^vmap\(spmd_axis_name=\.\.\.\) maps over mesh axes"):
            update(gradients)

    def test_of_a_program_inside_jax_refuses_it(self):
        update, gradients = self.program(INSIDE, jax.jit)
        with pytest.raises(ValueError, match="spmd_axis_name cannot appear in shard_map in_specs"):
            update(gradients)

    def test_where_no_copies_share_work_it_changes_nothing(self, monkeypatch):
        costly = CostModel(flops=1e15, bandwidth=1.0, latency=1.0)
        monkeypatch.setattr(CostModel, "for_platform", lambda *_, **__: costly)
        update, gradients = self.program(INSIDE)
        assert meshes.error(update(gradients), one_by_one()) < 1e-5
        assert crossed(update.lower(gradients).compile().as_text()) == []


def test_a_state_is_not_cut_over_manual_axes():
    kinds = (AxisType.Manual, AxisType.Explicit)
    there = AbstractMesh((REPLICAS, SHARDS), ("data", "fsdp"), axis_types=kinds)
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
    replicated = NamedSharding(there, P())
    tx = scale_by_muon(views=VIEWS)
    found = state_shardings(tx, shapes, replicated, zero1="fsdp")
    cut = {path: NamedSharding(there, P("fsdp", None)) for path in SHAPES}
    assert optax.tree.get(found, "mu") == cut
    with pytest.raises(ValueError, match="no axis 'data' to cut a over; its mesh has fsdp"):
        zero1_shardings(shapes, replicated, axes="data")


@SOME_AXES
def test_a_state_made_inside_lies_as_its_parameters_do():
    tx = scale_by_muon(views=VIEWS)
    found = []

    def momentum(params):
        found.append(
            state_shardings(tx, params, jax.tree.map(lambda x: jax.typeof(x).sharding, params))
        )
        return jax.tree.map(lambda p, m: p + m, params, optax.tree.get(tx.init(params), "mu"))

    made, _ = compiled(momentum, {"data"}, [replicas()])
    assert meshes.error(made, replicas()) == 0
    specs = {path: s.spec for path, s in optax.tree.get(found[-1], "mu").items()}
    assert specs == {"tall": P("fsdp", None)} | {p: P(None, "fsdp") for p in "abcd"}
