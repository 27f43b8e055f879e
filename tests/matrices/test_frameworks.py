"""Trees as MaxText and Levanter make them, of stand-ins with the attributes of their classes.

MaxText: `MuonDimensionNumbers` of src/maxtext/optimizers/muon.py, made by
`get_muon_weight_dimension_numbers` of src/maxtext/utils/muon_utils.py. Levanter: the layers of
haliax (src/haliax/nn/linear.py, conv.py, embedding.py, normalization.py, scan.py), of which its
models are made, and `map_flattened_linear_layers` of src/levanter/optim/util.py.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon import compat
from optax_muon.matrices.assign import assign, label

# ---- MaxText -------------------------------------------------------------------------------------


class MuonDimensionNumbers(NamedTuple):
    reduction_axis: Any = 0
    output_axis: Any = 1
    sharding: NamedSharding | None = None


def dimension_numbers(path: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """The table of MaxText, for the paths below."""
    if any(name in part for part in path for name in ("scale", "embedding", "logits_dense")):
        return None
    if "MoeBlock_0" in path and {"wi_0", "wi_1", "wo"} & set(path):
        return MuonDimensionNumbers((-2,), (-1,))
    if "self_attention" in path and "out" in path:
        return MuonDimensionNumbers((0, -2), (-1,))
    if "self_attention" in path and {"query", "key", "value"} & set(path):
        return MuonDimensionNumbers((0,), (-2, -1))
    return MuonDimensionNumbers((0,), (-1,))


def mixtral():
    """Mixtral in MaxText, layers scanned along axis 1: width 16, 3 layers, 4 experts."""

    def leaf(*shape):
        return jnp.asarray(np.random.default_rng(math.prod(shape)).normal(size=shape), jnp.float32)

    layers = {
        "MoeBlock_0": {
            "gate": {"kernel": leaf(16, 3, 4)},
            "wi_0": leaf(4, 3, 16, 24),
            "wi_1": leaf(4, 3, 16, 24),
            "wo": leaf(4, 3, 24, 16),
        },
        "pre_self_attention_layer_norm": {"scale": leaf(16, 3)},
        "self_attention": {
            "key": {"kernel": leaf(16, 3, 2, 8)},
            "out": {"kernel": leaf(4, 3, 8, 16)},
            "query": {"kernel": leaf(16, 3, 4, 8)},
            "value": {"kernel": leaf(16, 3, 2, 8)},
        },
    }
    decoder = {"layers": layers, "logits_dense": {"kernel": leaf(16, 64)}}
    return {"params": {"decoder": decoder, "token_embedder": {"embedding": leaf(64, 16)}}}


def numbers_of(params, **fields):
    def numbers(path, _):
        found = dimension_numbers(tuple(key.key for key in path))
        return None if found is None else found._replace(**fields)

    return jax.tree_util.tree_map_with_path(numbers, params)


def axes_of(view, shape):
    return None if view is None else (view.bind(shape).row_axes, view.bind(shape).col_axes)


@pytest.mark.parametrize("wrap", [lambda tree: tree, nnx.State], ids=["linen", "nnx.State"])
def test_dimension_numbers_of_maxtext_say_what_the_tree_says(wrap):
    params = mixtral()
    shapes = {row.path: row.shape for row in label(params).rows}
    theirs, ours = assign(params, wrap(numbers_of(params))), assign(params)
    for path, shape in shapes.items():
        assert axes_of(theirs[path], shape) == axes_of(ours[path], shape), path


def experts():
    """One leaf of theirs, and its sharding on eight devices with Auto axes."""
    wi = mixtral()["params"]["decoder"]["layers"]["MoeBlock_0"]["wi_0"]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    return {"MoeBlock_0": {"wi_0": wi}}, NamedSharding(mesh, P(None, None, None, "fsdp"))


def test_the_plan_takes_the_sharding_from_dimension_numbers():
    tree, sharding = experts()
    planned = str(optax_muon.plan(tree, views=numbers_of(tree, sharding=sharding)))
    assert planned == str(optax_muon.plan(tree, views=numbers_of(tree), shardings=sharding))
    assert planned != str(optax_muon.plan(tree, views=numbers_of(tree)))


@pytest.mark.parametrize(
    "link", [lambda views: optax_muon.muon(0.1, views=views),
             lambda views: optax_muon.scale_by_muon(views=views),
             lambda views: optax_muon.orthogonalize(views=views),
             lambda views: compat.muon(0.1, muon_weight_dimension_numbers=views),
             lambda views: compat.muon(0.1, muon_weight_dimension_numbers=lambda _: views),
             lambda views: compat.scale_by_muon(weight_dimension_numbers=views)],
    ids=["muon", "scale_by_muon", "orthogonalize", "compat", "compat, function", "compat, link"],
)  # fmt: skip
def test_an_update_takes_the_sharding_from_dimension_numbers(link):
    tree, sharding = experts()
    tx = link(numbers_of(tree, sharding=sharding))
    placed = jax.device_put(tree, sharding)
    # On Auto axes an update that does not know its shardings warns, which is an error here.
    updates, _ = jax.jit(tx.update)(placed, tx.init(placed), placed)
    alone = link(numbers_of(tree))
    expected, _ = jax.jit(alone.update)(tree, alone.init(tree), tree)
    # float32 Newton-Schulz, of which the law allows 1e-5 between layouts
    chex.assert_trees_all_close(jax.device_get(updates), jax.device_get(expected), atol=1e-5)


# ---- Levanter ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Axis:
    name: str
    size: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NamedArray:
    array: Any
    axes: tuple[Axis, ...]

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], axes)


class Linear(eqx.Module):
    weight: NamedArray
    bias: NamedArray | None
    In: Any = eqx.field(static=True)
    Out: Any = eqx.field(static=True)


class MoELinear(eqx.Module):
    weight: NamedArray
    bias: NamedArray | None
    Experts: Axis = eqx.field(static=True)
    In: Axis = eqx.field(static=True)
    Out: Axis = eqx.field(static=True)


class Conv(eqx.Module):
    Spatial: Any = eqx.field(static=True)
    In: Axis = eqx.field(static=True)
    Out: Axis = eqx.field(static=True)
    weight: NamedArray
    bias: NamedArray | None


class Embedding(eqx.Module):
    weight: NamedArray
    Vocab: Axis = eqx.field(static=True)
    Embed: Axis = eqx.field(static=True)


class RmsNorm(eqx.Module):
    axis: Axis = eqx.field(static=True)
    weight: NamedArray
    bias: NamedArray | None


class Stacked(eqx.Module):
    stacked: Any
    Block: Axis = eqx.field(static=True)


D, HEADS, KV, GROUP, SIZE = (
    Axis("embed", 16), Axis("heads", 4), Axis("kv_head", 2), Axis("q_heads_per_group", 2),
    Axis("head_size", 8),
)  # fmt: skip
MLP, EXPERTS, QKV, RANK = Axis("mlp", 24), Axis("experts", 4), Axis("qkv", 3), Axis("LORA_R", 2)
VOCAB, DEPTH = Axis("vocab", 64), Axis("depth", 3)


def array(*axes):
    shape = tuple(axis.size for axis in axes)
    values = np.random.default_rng(math.prod(shape)).normal(size=shape)
    return NamedArray(jnp.asarray(values, jnp.float32), axes)


def several(axes):
    return axes if isinstance(axes, tuple) else (axes,)


def linear(fan_in, fan_out, *, out_first=True, bias=False, block=(DEPTH,)):
    ins, outs = several(fan_in), several(fan_out)
    axes = (*outs, *ins) if out_first else (*ins, *outs)
    return Linear(array(*block, *axes), array(*block, *outs) if bias else None, fan_in, fan_out)


def layers():
    """The layers of a block, stacked along an axis whose name says nothing."""
    moe = MoELinear(array(DEPTH, EXPERTS, D, MLP), array(DEPTH, MLP), EXPERTS, D, MLP)
    return {
        "q_proj": linear(D, (KV, GROUP, SIZE), bias=True),
        "k_proj": linear(D, (KV, SIZE)),
        "o_proj": linear((HEADS, SIZE), D),
        "c_attn": linear(D, (QKV, HEADS, SIZE), out_first=False, bias=True),
        "gate": linear(D, EXPERTS),
        "w1": moe,
        "lora_A": linear((HEADS, SIZE), RANK),
        "lora_B": linear(RANK, (HEADS, SIZE)),
        "zeta": linear(D, (MLP,), out_first=False),
        "norm": RmsNorm(D, array(DEPTH, D), None),
    }


def model():
    taps, in_one = (Axis("width", 5),), Axis("embed", 1)
    return {
        "transformer": Stacked(layers(), DEPTH),
        "conv": Conv({"width": None}, D, MLP, array(MLP, D, *taps), array(MLP)),
        "depthwise": Conv(("width",), D, MLP, array(MLP, in_one, *taps), None),
        "norm": RmsNorm(D, array(D), None),
        "embeddings": Embedding(array(VOCAB, D), VOCAB, D),
        "lm_head": linear(D, VOCAB, block=()),
    }


IN_A_BLOCK = {
    "q_proj": ((4,), (1, 2, 3)),
    "k_proj": ((3,), (1, 2)),
    "o_proj": ((2, 3), (1,)),
    "c_attn": ((1,), (3, 4)),  # queries, keys and values are matrices of their own
    "gate": ((2,), (1,)),
    "w1": ((2,), (3,)),
    "lora_A": ((2, 3), (1,)),
    "lora_B": ((3,), (1, 2)),
    "zeta": ((1,), (2,)),
}


def test_the_layers_of_levanter_say_which_axes_they_contract_and_produce():
    rows = label(model()).rows
    found = {row.path: axes_of(row.view, row.shape) for row in rows if row.view is not None}
    stacked = {f"transformer/stacked/{name}/weight/0": axes for name, axes in IN_A_BLOCK.items()}
    assert found == {**stacked, "conv/weight/0": ((1, 2), (0,))}


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: jax.eval_shape(lambda: tree),
        lambda tree: {"zeta": {"alder": tree}},
        lambda tree: optax.tree.zeros_like(tree),
    ],
    ids=["shapes", "renamed", "gradients"],
)
def test_the_layers_of_levanter_are_read_alike_wherever_they_are(change):
    views = list(assign(model()).values())
    assert list(assign(change(model())).values()) == views


def flattened(layer, block):
    """A weight as Levanter's Muon flattens it: `[layers, outputs, inputs]`, in numpy."""
    names = [axis.name for axis in layer.weight.axes]
    order = [names.index(axis.name) for axis in (*block, *several(layer.Out), *several(layer.In))]
    outs = math.prod(axis.size for axis in several(layer.Out))
    return np.asarray(layer.weight.array, np.float64).transpose(order).reshape(DEPTH.size, outs, -1)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj", "gate", "lora_A", "zeta"])
def test_the_matrices_are_those_that_levanter_orthogonalizes(name):
    layer = layers()[name]
    tree = {"transformer": Stacked({name: layer}, DEPTH)}
    link = optax_muon.orthogonalize(optax_muon.polar_svd)
    updates, _ = jax.jit(link.update)(tree, link.init(tree))
    u, _, v = np.linalg.svd(flattened(layer, (DEPTH,)), full_matrices=False)
    found = flattened(updates["transformer"].stacked[name], (DEPTH,))
    # float32 SVD of matrices of at most 32 x 16 with condition numbers below 100
    chex.assert_trees_all_close(found, u @ v, atol=1e-4)


def test_a_layer_onto_one_output_is_a_vector():
    one = linear(D, Axis("mlp", 1), block=())
    assert assign({"value": one}) == {"value/weight/0": None}
