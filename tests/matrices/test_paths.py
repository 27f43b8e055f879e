"""Boxes add nothing to a path; a field called `value` does."""

import dataclasses

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_muon
from optax_muon.matrices.paths import map_named, named_leaves


class Attention(eqx.Module):
    query: jax.Array
    key: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Projections:
    value: jax.Array
    out: jax.Array


def array(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


@pytest.fixture
def tree():
    return {
        "norm_attn": Attention(array(8, 8), array(8, 8), array(8, 8)),
        "mix_attn": Projections(array(8, 8), array(8, 8)),
    }


FIELDS = {
    "mix_attn/value", "mix_attn/out", "norm_attn/query", "norm_attn/key", "norm_attn/value",
}  # fmt: skip


def test_a_field_that_is_called_value_keeps_its_name(tree):
    assert set(named_leaves(tree)) == FIELDS
    assert {row.path for row in optax_muon.label(tree).rows if row.optimizer == "muon"} == FIELDS


def test_it_keeps_its_name_where_it_alone_is_left(tree):
    alone = eqx.tree_at(lambda t: (t.query, t.key), tree["norm_attn"], (None, None))
    assert set(named_leaves(alone)) == {"value"}
    masked = dataclasses.replace(tree["mix_attn"], out=optax.MaskedNode())
    assert set(named_leaves(masked)) == {"value"}


def as_dict(tree):
    return {name: dict(vars(module)) for name, module in tree.items()}


@pytest.mark.parametrize(
    "link",
    [
        lambda: optax_muon.muon(0.1, weight_decay_mask={"": True, "norm_attn/value": False}),
        lambda: optax_muon.muon(0.1, post=optax_muon.normuon()),
        lambda: optax_muon.compat.muon(0.1),
    ],
    ids=["mask", "normuon", "compat"],
)
def test_an_update_is_that_of_the_same_tree_of_dicts(tree, link):
    found, _ = link().update(tree, link().init(tree), tree)
    plain = as_dict(tree)
    expected, _ = link().update(plain, link().init(plain), plain)
    chex.assert_trees_all_equal(as_dict(found), expected)


@pytest.mark.parametrize(
    "box",
    [
        nnx.Param,
        lambda x: nn.Partitioned(x, names=("a", "b")),
        lambda x: nn.LogicallyPartitioned(x, names=("a", "b")),
    ],
    ids=["nnx", "linen", "logical"],
)
def test_a_box_adds_nothing_to_a_path(box):
    boxed = {"attn": {"query": box(array(8, 8)), "value": box(array(8, 8))}}
    assert list(named_leaves(boxed)) == ["attn/query", "attn/value"]
    assert list(named_leaves(nnx.State(boxed))) == ["attn/query", "attn/value"]
    masked = jax.tree.map(lambda _: optax.MaskedNode(), boxed)
    kept = named_leaves(masked, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    assert list(kept) == ["attn/query", "attn/value"]
    names = map_named(lambda path, leaf: path, boxed)
    assert jax.tree.leaves(names) == ["attn/query", "attn/value"]


def test_shardings_of_a_state_find_a_field_that_is_called_value(tree):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tx = optax_muon.scale_by_muon()
    shardings = optax_muon.state_shardings(tx, tree, sharding)
    moments = [s for s in jax.tree.leaves(shardings) if s.spec == sharding.spec]
    assert len(moments) == len(FIELDS)
