"""The last of numbered layers is the output head, however their numbers are spelled."""

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from optax_muon.matrices.assign import label

MLP = [(784, 128), (128, 128), (128, 10)]


def routes(shapes):
    """The optimizer of each parameter, in the order in which they are given."""
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    rows = label(traverse_util.unflatten_dict(leaves, sep="/"), strict=False).rows
    found = {row.path: row.optimizer for row in rows}
    return [found[path] for path in shapes]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "spelling",
    [
        "fc{}/kernel", "dense{}", "w_{}", "linear{}", "lin{}/w", "layers/{}/w", "net/{}/w",
        "layer{}/w", "Layer{}/kernel", "l{}/w", "hidden{}/kernel", "W{}", "layer_{}/w",
        "mlp/layer{}/w", "mlp/layer_{}/w", "Dense_{}/kernel", "h{}/w", "block{}/w", "block_{}/w",
        "foo{}/w", "params/l{}/w",
    ],
)  # fmt: skip
def test_the_last_of_a_row_of_layers_is_the_head(spelling, bias, first):
    paths = [spelling.format(first + i) for i in range(len(MLP))]
    biases = {
        f"{path.rpartition('/')[0]}/b": (size[1],)
        for path, size in zip(paths, MLP, strict=True)
        if bias and "/" in path
    }
    found = routes(dict(zip(paths, MLP, strict=True)) | biases)
    assert found == ["muon", "muon", "adamw", *["adamw"] * len(biases)]


# What is last, and may be the head, and the layers before it.
DOUBTFUL = {
    "lin{}": MLP,
    "net/{}": MLP,
    "model.layers.{}.w": MLP,
    "block1/layer{}/w": MLP,
    "block1/mlp/dense{}/w": MLP,
    "block{}/dense1/w": MLP,
    "block_{}/dense_1/w": MLP,
    "block{}/conv1/kernel": [(3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 10)],
}


@pytest.mark.parametrize("spelling", DOUBTFUL)
def test_a_last_layer_that_may_be_in_a_block_is_never_silently_a_matrix(spelling):
    shapes = {spelling.format(i + 1): size for i, size in enumerate(DOUBTFUL[spelling])}
    assert routes(shapes)[-1] == "open"


@pytest.mark.parametrize("under", ["", "_"])
@pytest.mark.parametrize(
    "shapes",
    [
        {"block{}1/fc{}1/w": (784, 64), "block{}1/fc{}2/w": (64, 96), "block{}2/fc{}1/w": (96, 32),
         "block{}2/fc{}2/w": (32, 10)},
        {"block{}1/fc/w": (784, 64), "block{}2/fc/w": (64, 128), "block{}3/out/w": (128, 10)},
        {"block{}1/foo/w": (784, 64), "block{}2/foo/w": (64, 128), "block{}3/bar/w": (128, 10)},
        {"conv/kernel": (3, 3, 3, 32), "mlp/layer{}1/w": (32, 128), "mlp/layer{}2/w": (128, 10)},
        {"proj/w": (784, 64), "block{}1/w": (64, 128), "block{}2/w": (128, 10)},
    ],
)  # fmt: skip
def test_the_last_of_several_blocks_may_hold_the_head(shapes, under):
    found = routes({path.format(under, under): shape for path, shape in shapes.items()})
    assert found == ["muon"] * (len(shapes) - 1) + ["open"]


@pytest.mark.parametrize("under", ["", "_"])
def test_blocks_before_a_head_are_matrices(under):
    shapes = {
        "block{}1/conv{}1/kernel": (3, 3, 3, 32),
        "block{}1/conv{}2/kernel": (3, 3, 32, 32),
        "block{}2/conv{}1/kernel": (3, 3, 32, 64),
        "block{}2/conv{}2/kernel": (3, 3, 64, 64),
        "fc/kernel": (64, 10),
    }
    found = routes({path.format(under, under): shape for path, shape in shapes.items()})
    assert found == ["muon"] * 4 + ["adamw"]


def test_the_last_layer_inside_a_model_with_a_head_is_a_matrix():
    shapes = {"mlp/layer1/w": (32, 128), "mlp/layer2/w": (128, 12), "lm_head/w": (32, 1000)}
    assert routes(shapes) == ["muon", "muon", "adamw"]
