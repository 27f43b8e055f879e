"""Each link of the chain alone, against naive loops over matrices."""

import dataclasses
import functools
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.matrices.views import Split, View
from optax_muon.polar import KELLER, NewtonSchulz, Plain, newton_schulz
from optax_muon.transforms.decay import cautious_decay, decoupled_decay
from optax_muon.transforms.momentum import scale_by_momentum
from optax_muon.transforms.normuon import normuon
from optax_muon.transforms.orthogonalize import orthogonalize
from optax_muon.transforms.scale import (
    fixed_scale,
    keller_scale,
    match_rms,
    scale_by_shape,
    scale_by_update_norm,
    spectral_scale,
)
from optax_muon.transforms.wrappers import accumulator_dtype, in_float32

SHAPES = {
    "bias": (7,),
    "conv": (3, 2, 4, 9),
    "experts": (2, 3, 5, 11),
    "middle": (6, 4, 10),
    "out": (12, 6),
    "qkv": (8, 20),
    "tall": (12, 5),
    "wide": (5, 12),
}
AXES = {
    "conv": ((0, 1, 2), (3,)),
    "experts": ((2,), (3,)),
    "middle": ((0,), (2,)),
    "tall": ((0,), (1,)),
    "wide": ((0,), (1,)),
}
QKV = Split(1, (12, 4, 4), heads=(3, 1, 1))
OUT = Split.equal(0, 12, parts=3)
PARTS = [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16), slice(16, 20)]
VIEWS = {path: View(*axes) for path, axes in AXES.items()}
VIEWS |= {"bias": None, "out": View(0, 1, OUT), "qkv": View(0, 1, QKV)}


def gaussian(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def loop(tree, function):
    """Apply a function of one matrix to every logical matrix of the tree, in float64."""
    tree = {path: np.asarray(leaf, np.float64) for path, leaf in tree.items()}
    new = {p: reference.each_matrix(tree[p], *axes, function) for p, axes in AXES.items()}
    qkv = np.concatenate([function(tree["qkv"][:, part]) for part in PARTS], axis=1)
    out = np.concatenate([function(head) for head in np.split(tree["out"], 3)])
    return {**tree, **new, "out": out, "qkv": qkv}


def applied(link, updates, params=None):
    return jax.jit(link.update)(updates, link.init(params or updates), params)[0]


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], err_msg=path, **tolerance)


# Momentum


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_the_sum_of_discounted_gradients(nesterov):
    beta = optax.linear_schedule(0.5, 0.9, 3)
    link = scale_by_momentum(beta, nesterov)
    gradients = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    state, momentum = link.init(jnp.zeros(4)), np.zeros(4)
    for step, gradient in enumerate(gradients):
        rate = reference.value_at(beta, step)
        momentum = rate * momentum + gradient
        expected = gradient + rate * momentum if nesterov else momentum
        found, state = link.update(jnp.asarray(gradient), state)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.mu, momentum, rtol=1e-5, atol=1e-6)


def test_momentum_points_where_the_averaging_form_does():
    link, state, average = scale_by_momentum(0.9), None, np.zeros(6)
    state = link.init(jnp.zeros(6))
    for gradient in np.random.default_rng(0).normal(size=(8, 6)):
        average = 0.9 * average + 0.1 * gradient
        found, state = link.update(jnp.asarray(gradient, jnp.float32), state)
        expected = 0.1 * gradient + 0.9 * average
        np.testing.assert_allclose(0.1 * found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("gradient", "mu_dtype", "stored"),
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float32", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("complex64", None, "complex64"),
    ],
)
def test_momentum_is_kept_in_float32_unless_told_otherwise(gradient, mu_dtype, stored):
    link = scale_by_momentum(mu_dtype=mu_dtype)
    state = link.init(jnp.zeros(3, gradient))
    updates, after = link.update(jnp.ones(3, gradient), state)
    assert state.mu.dtype == after.mu.dtype == stored
    assert updates.dtype == accumulator_dtype(gradient)


def test_float32_momentum_remembers_what_bfloat16_gradients_are_too_coarse_for():
    link = scale_by_momentum(1.0, nesterov=False)
    state = link.init(jnp.zeros((), jnp.bfloat16))
    for gradient in [1.0, *[2.0**-10] * 8]:
        _, state = link.update(jnp.asarray(gradient, jnp.bfloat16), state)
    assert float(state.mu) == 1.0 + 8 * 2.0**-10


@pytest.mark.parametrize(
    ("gradient", "stored"),
    [("bfloat16", "float64"), ("float32", "float64"), ("complex64", "float64")],
)
def test_a_momentum_stored_in_float64_is_summed_in_float64(gradient, stored):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        steps = [jnp.asarray(rng.normal(size=5), gradient) for _ in range(20)]
        link = scale_by_momentum(0.99, mu_dtype=stored)
        state, momentum = link.init(steps[0]), np.zeros(5)
        for step in steps:
            exact = np.asarray(step.astype("complex128" if gradient == "complex64" else "float64"))
            momentum = 0.99 * momentum + exact
            updates, state = link.update(step, state)
            assert updates.dtype == accumulator_dtype(gradient)
            np.testing.assert_allclose(updates, exact + 0.99 * momentum, rtol=1e-6)
            np.testing.assert_allclose(state.mu, momentum, rtol=1e-14)


# Orthogonalize


def test_orthogonalize_is_a_loop_over_matrices():
    updates = gaussian()
    found = applied(orthogonalize(views=VIEWS), updates)
    # Five steps in float32 magnify rounding (6e-8) by the slope at zero, 485, at the very most.
    assert_close(found, loop(updates, reference.newton_schulz), atol=3e-5)
    np.testing.assert_array_equal(found["bias"], updates["bias"])


def test_orthogonalize_is_newton_schulz_of_each_leaf():
    updates = {path: gaussian()[path] for path in ("experts", "tall", "wide")}
    found = applied(orthogonalize(views={path: VIEWS[path] for path in updates}), updates)
    # Pooled products sum in another order, and five steps multiply rounding of 6e-8 by up to 485,
    # KELLER's slope at 0; the law for one update computed in two ways is 1e-5 of its entries' size.
    assert_close(found, {path: newton_schulz(x) for path, x in updates.items()}, atol=1e-5)


def test_the_orthogonalizer_sees_one_wide_stack_for_every_shape():
    seen = []

    def watch(x):
        seen.append(x.shape)
        return x

    updates = gaussian()
    found = applied(orthogonalize(watch, views=VIEWS), updates)
    # All at once for an accelerator, in two batches for the cores of a CPU.
    stacks = {(1, 9, 24), (2, 5, 12), (3, 4, 6), (4, 6, 10), (5, 4, 8), (6, 5, 11)}
    halves = {(size // 2, *sides) for size, *sides in stacks if size > 1}
    batches = halves | {(size - size // 2, *sides) for size, *sides in stacks}
    assert set(seen) == stacks | batches
    assert_close(found, updates, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_orthogonalize_keeps_dtypes_and_pools_each_apart(dtype):
    updates = {"a": jnp.ones((4, 6), dtype), "b": jnp.ones((4, 6), jnp.float32)}
    found = applied(orthogonalize(views=View(0, 1)), updates)
    assert {path: leaf.dtype for path, leaf in found.items()} == {"a": dtype, "b": "float32"}


def dots(leaves):
    """Matrix products in the compiled program for this many leaves, tall and wide by turns."""
    updates = {f"layer{i}": jnp.ones([(6, 9), (9, 6)][i % 2]) for i in range(leaves)}
    link = orthogonalize(views=View(0, 1))
    program = jax.jit(lambda u: link.update(u, optax.EmptyState())[0]).lower(updates).compile()
    return len(re.findall(r" dot\(", program.as_text()))


def test_the_program_does_not_grow_with_the_number_of_leaves():
    assert dots(1) == 3  # those of a step, in a loop over five
    assert dots(3) == dots(30) == dots(60) == 6  # and in two batches


# Scale


@pytest.mark.parametrize(
    ("rule", "fan_in", "fan_out", "factor"),
    [
        (match_rms(), 512, 2048, 0.2 * 2048**0.5),
        (match_rms(), 2048, 512, 0.2 * 2048**0.5),
        (match_rms(0.18), 7, 7, 0.18 * 7**0.5),
        (keller_scale(), 512, 2048, 2.0),
        (keller_scale(), 2048, 512, 1.0),
        (spectral_scale(), 512, 2048, 2.0),
        (spectral_scale(), 2048, 512, 0.5),
        (fixed_scale(1024), 512, 2048, 0.2 * 32),
        (fixed_scale(1024, rms=0.1), 2048, 512, 0.1 * 32),
    ],
)
def test_scale_rules_give_the_published_factors(rule, fan_in, fan_out, factor):
    assert rule(fan_in, fan_out) == pytest.approx(factor, rel=1e-12)


def asymmetric(fan_in, fan_out):
    return fan_in + 100.0 * fan_out


def test_the_factor_is_that_of_the_logical_matrix():
    updates = gaussian()
    found = applied(scale_by_shape(asymmetric, views=VIEWS), updates)
    assert_close(found, loop(updates, lambda x: x * asymmetric(*x.shape)), rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], updates["bias"])


@pytest.mark.parametrize(
    ("split", "widths"),
    [
        (Split(1, (8, 4, 2)), [8] * 8 + [4] * 4 + [2] * 2),
        (Split(1, (8, 4, 2), heads=(4, 2, 1)), [2] * 14),
        (Split(1, (4, 2, 1), groups=2), [8] * 4 + [4] * 2 + [2] + [8] * 4 + [4] * 2 + [2]),
        (Split.equal(1, 14, parts=2), [7] * 14),
    ],
    ids=["qkv", "heads", "interleaved", "gate and up"],
)
def test_every_part_of_a_fused_axis_has_its_own_factor(split, widths):
    link = scale_by_shape(asymmetric, views=View(0, 1, split))
    found = applied(link, {"kernel": jnp.ones((3, 14))})["kernel"]
    np.testing.assert_allclose(found, np.tile([3 + 100.0 * w for w in widths], (3, 1)))


def test_update_norm_gives_every_logical_matrix_exactly_its_rms():
    updates = gaussian()
    found = applied(scale_by_update_norm(0.3, views=VIEWS), updates)
    assert_close(found, loop(updates, lambda x: x * 0.3 / reference.rms(x)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["bias"], updates["bias"])


def test_update_norm_leaves_a_zero_matrix_zero():
    updates = {"kernel": jnp.zeros((2, 3, 4)).at[0].set(5.0)}
    found = applied(scale_by_update_norm(0.3, views=View(1, 2)), updates)["kernel"]
    np.testing.assert_allclose(found, updates["kernel"] * 0.06, rtol=1e-6)


def test_update_norm_equals_match_rms_on_full_rank_and_exceeds_it_below():
    full, half = np.eye(4, 8, dtype=np.float32), np.eye(4, 8, dtype=np.float32)
    half[2:] = 0.0
    for matrix, ratio in ((full, 1.0), (half, 2**0.5)):
        by_norm = applied(scale_by_update_norm(0.2, views=View(0, 1)), {"kernel": matrix})
        by_shape = applied(scale_by_shape(match_rms(0.2), views=View(0, 1)), {"kernel": matrix})
        np.testing.assert_allclose(by_norm["kernel"], ratio * by_shape["kernel"], rtol=1e-6)


# Decay


@pytest.mark.parametrize(("link", "cautious"), [(decoupled_decay, False), (cautious_decay, True)])
def test_decay_adds_the_parameters_where_it_may(link, cautious):
    rate = optax.linear_schedule(0.5, 0.1, 3)
    link, params = link(rate), gaussian(1)
    state = link.init(params)
    for step in range(4):
        updates = gaussian(step)
        found, state = jax.jit(link.update)(updates, state, params)
        expected = {}
        for path, update in updates.items():
            pulls = (update * params[path] >= 0) | (not cautious)
            expected[path] = update + reference.value_at(rate, step) * pulls * params[path]
        assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("link", [decoupled_decay, cautious_decay])
def test_decay_heeds_its_mask(link):
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(2), "d": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    masks = [{"a": True, "b": {"c": False, "d": True}}, {"": True, "b/c": False}]
    masks.append(lambda params: jax.tree.map(lambda p: p is not params["b"]["c"], params))
    for mask in masks:
        found = link(0.1, mask).update(zeros, link().init(params), params)[0]
        np.testing.assert_allclose(found["a"], 0.1)
        np.testing.assert_allclose(found["b"]["c"], 0.0)
        np.testing.assert_allclose(found["b"]["d"], 0.1)


@pytest.mark.parametrize("link", [decoupled_decay, cautious_decay])
def test_decay_without_parameters_says_so(link):
    with pytest.raises(ValueError, match="params"):
        link(0.1).update({"w": jnp.ones(2)}, link(0.1).init({"w": jnp.ones(2)}))


# NorMuon


def test_normuon_is_the_papers_loop_over_neurons():
    steps = [gaussian(seed) for seed in range(4)]
    # Neurons of very different strength: what it is for.
    steps = [
        {p: x * np.geomspace(1, 30, x.shape[-1], dtype=np.float32) for p, x in s.items()}
        for s in steps
    ]
    link = normuon(0.8, views=VIEWS)
    state = link.init(steps[0])
    update = jax.jit(link.update)
    matrices = []
    for step in steps:
        found = []
        loop(step, lambda x, found=found: (found.append(x), x)[1])
        matrices.append(found)
    truth = [list(reference.normuon(history, beta2=0.8)) for history in zip(*matrices, strict=True)]
    for number, step in enumerate(steps):
        expected = iter([history[number] for history in truth])
        found, state = update(step, state)
        assert_close(found, loop(step, lambda x, expected=expected: next(expected)), rtol=1e-4)


def test_normuon_keeps_the_norm_of_every_matrix():
    link, norms = normuon(views=VIEWS), lambda x: np.full_like(x, np.linalg.norm(x))
    state, update = link.init(gaussian()), jax.jit(link.update)
    for seed in range(3):
        updates = gaussian(seed)
        found, state = update(updates, state)
        assert_close(loop(found, norms), loop(updates, norms), rtol=1e-5, atol=1e-6)


def test_normuon_evens_out_the_neurons():
    updates = {"kernel": np.ones((6, 4), np.float32) * np.geomspace(1, 100, 4, dtype=np.float32)}
    link = normuon(0.9, views=View(0, 1))
    found, state = link.update(updates, link.init(updates))
    np.testing.assert_allclose(
        state.nu["kernel"], 0.1 * updates["kernel"][:1] ** 2, rtol=1e-5, atol=1e-6
    )
    norms = np.linalg.norm(found["kernel"], axis=0)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


def test_normuon_remembers_one_number_per_neuron_and_keeps_zero_zero():
    zeros = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    link = normuon(views=VIEWS)
    found, state = jax.jit(link.update)(zeros, link.init(zeros))
    assert_close(found, zeros, rtol=0)
    sizes = {
        "conv": 9,
        "experts": 6 * 11,
        "middle": 4 * 10,
        "out": 3 * 6,
        "qkv": 20,
        "tall": 5,
        "wide": 12,
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(sizes.values())


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_neurons_that_are_zero_stay_zero_whatever_eps(eps):
    dead, history = [0, 3], np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    history[:, :, dead] = 0
    alive = np.delete(history, dead, axis=2)
    link = normuon(0.8, eps, views=View(0, 1))
    state = link.init({"kernel": history[0]})
    slope = jax.grad(lambda x: link.update({"kernel": x}, state)[0]["kernel"][1, 2])(history[0])
    assert np.isfinite(slope).all()
    for step, truth in zip(history, reference.normuon(alive, 0.8, eps), strict=True):
        found, state = link.update({"kernel": step}, state)
        assert not found["kernel"][:, dead].any()
        np.testing.assert_allclose(np.delete(found["kernel"], dead, axis=1), truth, rtol=1e-4)
    nothing = jnp.zeros((6, 5))
    found, _ = link.update({"kernel": nothing}, link.init({"kernel": nothing}))
    np.testing.assert_array_equal(found["kernel"], 0)


GRID = {"fsdp": 4, "tensor": 2}
NEURONS = {
    "columns": ((16, 32), P(None, "fsdp"), View(0, 1)),
    "rows": ((16, 32), P("fsdp", None), View(0, 1)),
    "both axes": ((16, 32), P("tensor", "fsdp"), View(0, 1)),
    "the other way": ((16, 32), P("tensor", "fsdp"), View(1, 0)),
    "layers": ((8, 16, 32), P("fsdp", None, "tensor"), View(1, 2)),
    "a fused axis": ((16, 32), P("fsdp", "tensor"), View(0, 1, Split(1, (16, 8, 8)))),
    "heads that are rows": ((32, 16), P("tensor", "fsdp"), View(0, 1, Split.equal(0, 32, parts=4))),
}
PLACES = {
    "by itself": lambda tx, params: tx.init(params),
    "whole everywhere": lambda tx, params: jax.jit(
        tx.init,
        out_shardings=optax_muon.state_shardings(
            tx, params, jax.tree.map(lambda x: x.sharding, params)
        ),
    )(params),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("neurons", NEURONS.values(), ids=NEURONS)
def test_on_explicit_axes_normuon_keeps_the_types_of_its_state(neurons, place):
    shape, spec, view = neurons
    case = meshes.case(GRID, {"kernel": (shape, spec, view)})
    tx = optax_muon.muon(0.1, views={"kernel": view}, post=normuon(0.8))

    def trained(params, state, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), gradients)[0]

    tree = jax.tree.map(jnp.asarray, gaussian(0, {"kernel": shape}))
    gradients = gaussian(1, {"kernel": (3, *shape)})
    expected, _ = jax.jit(trained)(tree, tx.init(tree), gradients)
    shardings = case.shardings("explicit")
    params = jax.device_put(tree, shardings)
    stacked = NamedSharding(shardings["kernel"].mesh, P(None, *spec))
    with jax.set_mesh(shardings["kernel"].mesh):  # from jax 0.12 on, zeros have no sharding without
        state = place(tx, params)
        found, after = jax.jit(trained)(params, state, jax.device_put(gradients, stacked))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    # Shared matrices are summed in pieces, in float32.
    assert_close(found, expected, atol=1e-5)


# Numbers that are not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "link",
    [orthogonalize(views=VIEWS), scale_by_update_norm(views=VIEWS), normuon(views=VIEWS)],
    ids=["orthogonalize", "update norm", "normuon"],
)
def test_what_is_not_finite_stays_so_and_stays_in_its_matrix(link, bad):
    updates = gaussian()
    expected = {path: np.asarray(x) for path, x in applied(link, updates).items()}
    struck = {"experts": (1, 2, 3, 4), "out": (5, 2), "qkv": (3, 9), "tall": (0, 0)}
    for path, entry in struck.items():
        updates[path][entry] = bad
    # The other matrices of a struck parameter: slices of `experts`, a third of `out`, PARTS of qkv.
    own = {"experts": np.s_[1, 2], "out": np.s_[4:8], "qkv": np.s_[:, 8:12], "tall": np.s_[:]}
    found = applied(link, updates)
    for path, update in found.items():
        update = np.array(update)
        if path in struck:
            assert not np.isfinite(update[own[path]]).all(), path
            update[own[path]] = expected[path][own[path]]
        # Compiled alike; five steps multiply rounding of 6e-8 by up to 485.
        np.testing.assert_allclose(update, expected[path], atol=3e-5, err_msg=path)


# Dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_in_float32_widens_what_goes_in_and_narrows_what_comes_out(dtype):
    seen = []

    def watch(updates, state, params=None):
        seen.extend(jax.tree.leaves((updates, params)))
        return updates, state

    tx = in_float32(optax.GradientTransformation(lambda params: params, watch))
    params = {"w": jnp.ones(3, dtype)}
    assert tx.init(params)["w"].dtype == accumulator_dtype(dtype)
    updates, _ = tx.update(params, (), params)
    assert updates["w"].dtype == dtype
    assert {leaf.dtype for leaf in seen} == {accumulator_dtype(dtype)}


class Scaled:
    """A foreign orthogonalizer with attributes that mean something else to it."""

    count, dtype, rows = 7, "no dtype", "no rows"

    def __call__(self, x):
        return 2 * newton_schulz(x)


class Named(NamedTuple):
    """A tuple, which counts other things than work."""

    factor: float = 2.0

    def __call__(self, x):
        return self.factor * newton_schulz(x)


class Tally(str):
    """A string, whose `count` does not say what it takes."""

    def __call__(self, x):
        return 2 * newton_schulz(x)


class Calls(Scaled):
    """An object with another method of that name."""

    def count(self):
        raise AssertionError("it is not asked")


FOREIGN = {
    "a named tuple": Named(),
    "a string": Tally("two"),
    "an object that counts otherwise": Calls(),
    "a lambda": lambda x: 2 * newton_schulz(x),
    "a partial with a keyword that ours has too": functools.partial(
        lambda x, coefficients, steps: coefficients[0] * newton_schulz(x),
        coefficients=[2.0, "anything"],
        steps="many",
    ),
    "an object": Scaled(),
    "a jitted function": jax.jit(lambda x: 2 * newton_schulz(x)),
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_any_callable_orthogonalizes_and_is_counted_as_the_plain_form(foreign):
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
    link = orthogonalize(foreign)
    updates, _ = link.update(params, link.init(params))
    expected, _ = orthogonalize().update(params, optax.EmptyState())
    # Under `jit` XLA sums in another order: a few units of the last digit over five steps.
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda x: 2 * x, expected), rtol=1e-5, atol=1e-6
    )
    planned = optax_muon.plan(params, orthogonalizer=foreign)
    assert planned.cost.flops == Plain().count(4, 8, KELLER.rows).flops
    assert {a.form for bucket in planned.buckets for a in bucket.assignments} == {"plain"}


def test_an_orthogonalizer_of_ones_own_counts_its_work():
    class Counting:
        def __call__(self, x):
            return newton_schulz(x)

        def count(self, m, n, devices=1, *, platform):
            work = NewtonSchulz().count(m, n, devices, platform=platform)
            return dataclasses.replace(work, flops=7)

    planned = optax_muon.plan({"kernel": jnp.ones((4, 8))}, orthogonalizer=Counting())
    assert planned.cost.flops == 7


def test_an_orthogonalizer_that_cannot_be_hashed_is_refused_by_name():
    @dataclasses.dataclass
    class Unhashable:
        def __call__(self, x):
            return x

    params = {"kernel": jnp.ones((4, 8))}
    with pytest.raises(TypeError, match="Unhashable is not hashable"):
        orthogonalize(Unhashable()).update(params, optax.EmptyState())
    with pytest.raises(TypeError, match="Unhashable is not hashable"):
        optax_muon.plan(params, orthogonalizer=Unhashable())
