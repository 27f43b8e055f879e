"""The blocked cross-entropy against optax's on whole logits: values, gradients, memory, meshes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_trees_close_to_largest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon.models import cross_entropy as module
from optax_muon.models.cross_entropy import cross_entropy
from optax_muon.models.moonlight import CONFIGS, Moonlight


def given(b=8, t=6, width=16, vocab=24):
    """Features, head, targets with both ends of the vocabulary, and a weight for every loss."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal([b, t, width]), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal([width, vocab]), jnp.float32)
    targets = rng.integers(0, vocab, [b, t])
    targets[0, :2] = 0, vocab - 1
    weights = jnp.asarray(rng.standard_normal([b, t]), jnp.float32)
    return x, kernel, jnp.asarray(targets, jnp.int32), weights


@functools.partial(jax.jit, static_argnums=0)
def both_ways(loss, x, kernel, targets, weights):
    """Losses, and the gradient of their weighted sum."""
    each, pull = jax.vjp(lambda x, kernel: loss(x, kernel, targets), x, kernel)
    return each, pull(weights)


def plain(x, kernel, targets):
    return optax.softmax_cross_entropy_with_integer_labels(x @ kernel, targets)


# Sums of 48 products of float32 in another order: a few roundings of 6e-8 of the largest.
close = functools.partial(assert_trees_close_to_largest, part=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 48, 1000])
def test_losses_and_gradients_are_those_of_whole_logits(block):
    blocked = functools.partial(cross_entropy, block=block)
    close(both_ways(blocked, *given()), both_ways(plain, *given()))


def test_large_logits_do_not_overflow():
    x, *rest = given()
    got, (dx, _) = both_ways(cross_entropy, 1e4 * x, *rest)
    chex.assert_tree_all_finite((got, dx))
    np.testing.assert_allclose(got, both_ways(plain, 1e4 * x, *rest)[0], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 8}],
)
def test_a_mesh_gives_the_losses_and_gradients_of_one_device(kind, sizes):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))

    def lies(*axes):
        there = (tuple(a for a in over if a in sizes) or None for over in axes)
        return NamedSharding(mesh, P(*there))

    tokens = lies(("data", "fsdp", "expert"))
    places = (tokens, lies(("fsdp", "expert"), ("tensor",)), tokens, tokens)
    blocked = functools.partial(cross_entropy, block=5)
    with jax.set_mesh(mesh):
        got = jax.block_until_ready(both_ways(blocked, *jax.device_put(given(), places)))
    close(got, both_ways(plain, *given()))


def test_the_kernels_gradient_is_summed_over_devices_once_and_scattered():
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Explicit,) * 2)
    both = ("fsdp", "expert")
    tokens, head = NamedSharding(mesh, P(both)), NamedSharding(mesh, P(both, None))
    blocked = functools.partial(cross_entropy, block=2)  # three turns of the loop
    with jax.set_mesh(mesh):
        shapes = [
            jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=lies)
            for y, lies in zip(given(), (tokens, head, tokens, tokens), strict=True)
        ]
        text = both_ways.lower(blocked, *shapes).as_text()
    assert text.count('"stablehlo.reduce_scatter"') == 1
    assert text.count('"stablehlo.all_gather"') == 1
    assert text.count('"stablehlo.all_reduce"') == 0


def test_logits_are_never_in_memory_all_at_once():
    shapes = jax.eval_shape(lambda: given(b=4, t=512, width=8, vocab=2048))
    memory = [
        both_ways.lower(loss, *shapes).compile().memory_analysis().temp_size_in_bytes
        for loss in (functools.partial(cross_entropy, block=64), plain)
    ]
    logits = 4 * 512 * 2048 * 4
    # A block is a thirty-second of the logits; a handful of such arrays, and the kernel, are there.
    assert memory[0] < logits / 4 < logits <= memory[1]


def test_moonlights_losses_are_those_of_its_logits():
    model = Moonlight(CONFIGS["moonlight-tiny"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32),
        Moonlight(model.config).abstract_params,
    )
    tokens = jnp.asarray(rng.integers(0, 256, [2, 65]), jnp.int32)

    @jax.jit
    def both(params, tokens):
        given, targets = tokens[:, :-1], tokens[:, 1:]
        logits, report = model.forward(params, given)
        truth = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return model.losses(params, given, targets), (truth, report)

    close(*both(params, tokens))


def test_the_published_models_block_is_what_the_docstring_says():
    vocab = CONFIGS["moonlight-16b-a3b"].vocab_size
    assert module.BLOCK * vocab * 4 == 640 * 2**20
