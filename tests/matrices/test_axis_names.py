"""Axis names, as Flax, nnx, haliax and trees of logical names carry them."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from optax_muon.matrices.assign import assign
from optax_muon.matrices.views import View

NAMES = ("heads", "layers", "kv", "embed")
SHAPE = (4, 3, 8, 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class NamedArray:
    """An array with named axes, by the attributes of haliax's."""

    array: jax.Array
    axes: tuple = dataclasses.field(metadata={"static": True})


def named_array(array):
    axes = zip(NAMES, SHAPE, strict=True)
    return NamedArray(array, tuple(types.SimpleNamespace(name=n, size=s) for n, s in axes))


@pytest.mark.parametrize(
    "box",
    [
        lambda x: nn.Partitioned(x, names=NAMES),
        lambda x: nn.LogicallyPartitioned(x, names=NAMES),
        lambda x: nnx.Param(x, out_sharding=NAMES, eager_sharding=False),
        named_array,
    ],
    ids=["Partitioned", "LogicallyPartitioned", "nnx", "haliax"],
)
def test_a_parameter_with_named_axes_needs_no_name_of_its_own(box):
    (view,) = assign({"zeta": box(jnp.zeros(SHAPE))}).values()
    assert view == View((-4, -2), -1)


@pytest.mark.parametrize("names", [NAMES, jax.sharding.PartitionSpec(*NAMES)])
def test_names_may_lie_in_a_tree_beside(names):
    assert assign({"zeta": jnp.zeros(SHAPE)}, {"zeta": names}) == {"zeta": View((-4, -2), -1)}


def test_dimension_numbers_of_any_package_are_views():
    numbers = types.SimpleNamespace(reduction_axis=(0, 2), output_axis=3, sharding=None)
    assert assign({"zeta": jnp.zeros(SHAPE)}, {"zeta": numbers}) == {"zeta": View((0, 2), 3)}


@pytest.mark.parametrize("names", [("fsdp", "tensor"), ("data", None), ("a", "b")])
def test_names_of_a_mesh_decide_nothing(names):
    box = nn.Partitioned(jnp.zeros((8, 16)), names=names)
    with pytest.raises(ValueError, match="'codebook'"):
        assign({"codebook": box})


def test_names_that_do_not_fit_the_rank_decide_nothing():
    box = nn.Partitioned(jnp.zeros((8, 16)), names=NAMES)
    assert assign({"up": {"kernel": box}}) == {"up/kernel": View(-2, -1)}
