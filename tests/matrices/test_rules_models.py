"""The default table on trees that the libraries themselves build: linen, nnx, equinox."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from optax_muon.matrices.assign import assign, label
from optax_muon.matrices.views import View

KEY = jax.random.key(0)


def read(params, views=None):
    """Path to `batch x (rows x cols)`, for the leaves that go to Muon."""
    rows = (row for row in label(params, views).rows if row.optimizer == "muon")
    return {row.path: row.cells[2] for row in rows}


class Block(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, ("embed", "mlp")) if self.boxed else init
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        h = nn.Dense(32, kernel_init=init)(nn.RMSNorm()(x))
        return x + nn.Dense(8)(nn.gelu(h)), None


class Linen(nn.Module):
    scan: bool = False
    boxed: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(16, 8, name="wte")
        x = embed(tokens)
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
            axes |= {"metadata_params": {nn.PARTITION_NAME: "layers"}} if self.boxed else {}
            x, _ = nn.scan(Block, **axes)(self.boxed)(x)
        else:
            for _ in range(2):
                x, _ = Block(self.boxed)(x)
        x = nn.Conv(8, (3,), feature_group_count=8)(x)
        x = nn.Conv(12, (3,))(x)
        return nn.Dense(16, name="lm_head")(x), embed.attend(x[..., :8])


def linen(**options):
    return jax.eval_shape(Linen(**options).init, KEY, jnp.zeros((2, 4), jnp.int32))["params"]


ATTENTION = {
    f"MultiHeadDotProductAttention_0/{name}/kernel": "8 x 8"
    for name in ("key", "out", "query", "value")
}
IN_A_BLOCK = {"Dense_0/kernel": "8 x 32", "Dense_1/kernel": "32 x 8", **ATTENTION}


def test_linen_layers_in_a_loop():
    blocks = {f"Block_{i}/{path}": m for i in range(2) for path, m in IN_A_BLOCK.items()}
    assert read(linen()) == {**blocks, "Conv_1/kernel": "24 x 12"}


def test_linen_layers_in_a_scan_are_batch_and_their_norms_stay_out():
    blocks = {f"ScanBlock_0/{path}": f"3 x ({m})" for path, m in IN_A_BLOCK.items()}
    assert read(linen(scan=True)) == {**blocks, "Conv_1/kernel": "24 x 12"}


def test_linen_boxes_change_nothing():
    assert isinstance(
        linen(scan=True, boxed=True)["ScanBlock_0"]["Dense_0"]["kernel"], nn.Partitioned
    )
    assert assign(linen(scan=True, boxed=True)) == assign(linen(scan=True))
    assert assign(linen(boxed=True)) == assign(linen())


def test_linen_collections_need_not_be_taken_apart():
    plain = assign(linen())
    assert assign({"params": linen()}) == {f"params/{path}": view for path, view in plain.items()}


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8)(x)
        x = nn.GroupNorm(2)(nn.ConvTranspose(4, (2, 2))(x))
        x = nn.RNN(nn.OptimizedLSTMCell(5))(x.reshape(len(x), -1, 4))
        return nn.Dense(10, name="head")(nn.WeightNorm(nn.Dense(6))(x))


def test_linen_convolutions_and_recurrent_cells():
    params = jax.eval_shape(Convolutions().init, KEY, jnp.zeros((2, 8, 8, 3)))["params"]
    cell = {f"OptimizedLSTMCell_0/h{gate}/kernel": "5 x 5" for gate in "fgio"}
    cell |= {f"OptimizedLSTMCell_0/i{gate}/kernel": "4 x 5" for gate in "fgio"}
    assert read(params) == {
        "Conv_0/kernel": "27 x 8",
        "ConvTranspose_0/kernel": "32 x 4",
        "Dense_0/kernel": "5 x 6",
        **cell,
    }


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.stats = nnx.BatchNorm(8, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(8, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 8, rngs=rngs)
        )
        self.conv = nnx.Conv(8, 8, (5,), rngs=rngs)
        self.dw_conv = nnx.Conv(8, 8, (5,), feature_group_count=8, rngs=rngs)
        self.adapter = nnx.LoRA(8, 2, 8, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.blocks = nnx.List([Layer(rngs)])
        stacked = nnx.split_rngs(splits=3)(nnx.vmap(Layer, in_axes=0, out_axes=0))
        self.layers = stacked(rngs)
        self.head = nnx.Linear(8, 16, rngs=rngs)


IN_A_LAYER = {
    **{f"attn/{name}/kernel": "8 x 8" for name in ("key", "out", "query", "value")},
    "mlp/layers/0/kernel": "8 x 16",
    "mlp/layers/2/kernel": "16 x 8",
    "conv/kernel": "40 x 8",
    "adapter/lora_a": "8 x 2",
    "adapter/lora_b": "2 x 8",
}


def test_nnx_layers_in_a_list_and_stacked_by_vmap():
    state = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    alone = {f"blocks/0/{path}": m for path, m in IN_A_LAYER.items()}
    stacked = {f"layers/{path}": f"3 x ({m})" for path, m in IN_A_LAYER.items()}
    assert read(state) == {**alone, **stacked}
    assert read(nnx.to_pure_dict(state)) == {**alone, **stacked}


def test_nnx_state_with_keys_and_counters_is_decided_too():
    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    assert read(nnx.state(model)) == {"layers/0/kernel": "8 x 4"}


class Equinox(eqx.Module):
    embedding: eqx.nn.Embedding
    mlp: eqx.nn.MLP
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    conv: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv1d
    layers: list
    cell: eqx.nn.GRUCell
    stack: eqx.nn.Linear
    lm_head: eqx.nn.Linear

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(16, 8, key=key)
        self.mlp = eqx.nn.MLP(4, 3, 8, 2, key=key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=key)
        self.norm = eqx.nn.LayerNorm(8)
        self.conv = eqx.nn.Conv2d(4, 8, 3, key=key)
        self.depthwise = eqx.nn.Conv1d(8, 8, 3, groups=8, key=key)
        self.layers = [eqx.nn.Linear(8, 4, key=key), eqx.nn.RMSNorm(8)]
        self.cell = eqx.nn.GRUCell(4, 8, key=key)
        keys = jax.random.split(key, 3)
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 4, key=key))(keys)
        self.lm_head = eqx.nn.Linear(8, 16, key=key)


def test_equinox_keeps_out_before_in():
    assert read(eqx.filter_eval_shape(Equinox, KEY)) == {
        "mlp/layers/0/weight": "4 x 8",
        "mlp/layers/1/weight": "8 x 8",
        "mlp/layers/2/weight": "8 x 3",
        **{f"attention/{n}_proj/weight": "8 x 8" for n in ("query", "key", "value", "output")},
        "conv/weight": "36 x 8",
        "layers/0/weight": "8 x 4",
        "cell/weight_ih": "4 x 24",
        "cell/weight_hh": "8 x 24",
        "stack/weight": "3 x (8 x 4)",
    }


def test_haiku_keeps_modules_in_one_flat_dict():
    def module(*shape):
        return {"w": jnp.zeros(shape), "b": jnp.zeros(shape[-1:])}

    params = {
        "transformer/embed": {"embeddings": jnp.zeros((16, 8))},
        "transformer/h0_attn/query": module(8, 8),
        "transformer/h0_mlp/~/linear_1": module(8, 32),
        "transformer/layer_norm": {"scale": jnp.zeros(8), "offset": jnp.zeros(8)},
        "transformer/conv2_d": module(3, 3, 4, 8),
    }
    assert read(params) == {
        "transformer/h0_attn/query/w": "8 x 8",
        "transformer/h0_mlp/~/linear_1/w": "8 x 32",
        "transformer/conv2_d/w": "36 x 8",
    }


def test_a_model_scanned_along_its_second_axis_is_settled_by_views():
    params = {
        "decoder": {
            "layers": {
                "self_attention": {
                    "query": {"kernel": jnp.zeros((16, 3, 2, 8))},
                    "out": {"kernel": jnp.zeros((2, 3, 8, 16))},
                },
                "mlp": {"wi_0": {"kernel": jnp.zeros((16, 3, 64))}},
                "norm": {"scale": jnp.zeros((16, 3))},
            }
        }
    }
    views = {
        "*/query/kernel": View(0, (2, 3)),
        "*/out/kernel": View((0, 2), 3),
        "*/mlp/*": View(0, 2),
    }
    assert read(params, views) == {
        "decoder/layers/mlp/wi_0/kernel": "3 x (16 x 64)",
        "decoder/layers/self_attention/out/kernel": "3 x (16 x 16)",
        "decoder/layers/self_attention/query/kernel": "3 x (16 x 16)",
    }
