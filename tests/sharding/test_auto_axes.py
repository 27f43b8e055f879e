"""On Auto axes without `shardings=` the compiler moves what it likes; Explicit ones are planned."""

import functools

import jax
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import View, compat, muon, orthogonalize, plan
from optax_muon.sharding.cost import CostModel

SHAPES = {"a": (3, 16, 32), "b": (3, 16, 32), "tall": (3, 32, 16)}
VIEWS = dict.fromkeys(SHAPES, View(1, 2))
KINDS = {
    "Auto, Explicit": ((AxisType.Auto, AxisType.Explicit), {"fsdp": 2}),
    "Explicit, Auto": ((AxisType.Explicit, AxisType.Auto), {"data": 4}),
    "Auto, Auto": ((AxisType.Auto, AxisType.Auto), {}),
}
"""The types of `data` and `fsdp`, and the axes that are planned over."""
SPECS = {
    "both": P(None, "data", "fsdp"),
    "both, crossed": P(None, "fsdp", "data"),
    "columns": P(None, None, "fsdp"),
    "rows": P(None, "data", None),
    "copies": P(),
}


@pytest.fixture(autouse=True)
def work_is_worth_sharing(monkeypatch):
    """These matrices are small; with costly messages no device would share them."""
    monkeypatch.setattr(CostModel, "for_platform", lambda *_, **__: meshes.FREE_MESSAGES)


def mesh(kinds):
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=kinds)


@functools.cache
def gradients():
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}


@functools.cache
def alone():
    link = orthogonalize(views=VIEWS)
    update = jax.jit(lambda gradient: link.update(gradient, ())[0])
    return jax.tree.map(np.asarray, update(gradients()))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_updates_are_those_of_one_device(kind, spec):
    kinds, planned = KINDS[kind]
    found = []
    link = orthogonalize(views=VIEWS)

    def update(gradient):
        found.append(plan(gradient, views=VIEWS))
        return link.update(gradient, ())[0]

    placed = jax.device_put(gradients(), NamedSharding(mesh(kinds), spec))
    with pytest.warns(UserWarning, match="cannot see how its updates are sharded"):
        updates = jax.jit(update)(placed)
    assert meshes.error(updates, alone()) < 1e-5
    assert [each.mesh_axes for each in found] == [planned]
    assert found[0].unknown_shardings


@pytest.mark.parametrize("make", [muon, compat.muon])
def test_the_warning_points_at_the_call_in_the_users_file(make):
    tx = optax.chain(optax.clip_by_global_norm(1.0), make(1e-2))
    params = {"kernel": np.ones((16, 32), np.float32)}
    placed = jax.device_put(params, NamedSharding(mesh(KINDS["Auto, Auto"][0]), P()))
    step = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
    with pytest.warns(UserWarning, match="cannot see how its updates are sharded") as caught:
        step(placed, placed)
    assert [each.filename for each in caught] == [__file__]
