"""Odd trees, dtypes, devices and arguments: what works with `optax.adamw` works here.

What raises there raises here, in one sentence that names the argument or the parameter. A row is a
case; add one when a report comes in.
"""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import reference
from jax.sharding import NamedSharding, PartitionSpec

import optax_muon
from optax_muon import View, compat, muon
from optax_muon.transforms.momentum import scale_by_momentum

OPTIMIZERS = {"muon": muon, "compat": compat.muon}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
RNG = np.random.default_rng(0)
STANDARD = functools.partial(jax.numpy_dtype_promotion, "standard")  # which optax needs
KERNEL = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=6), jnp.float32)
PLAIN = {"dense": {"kernel": KERNEL, "bias": BIAS}}
GRADIENT = {"dense": {"kernel": KERNEL[::-1], "bias": BIAS[::-1]}}


def one_update(tx, gradient, params):
    return tx.update(gradient, tx.init(params), params)[0]


# Leaves that cannot be trained

NOT_TRAINED = {
    "nothing": (None, None),
    "a function": (jax.nn.relu, None),
    "a string": ("gelu", None),
    "a static int": (3, None),
    "a bool": (True, None),
    "a typed key": (jax.random.key(0), None),
    "a key of integers": (jax.random.PRNGKey(0), None),
    "a counter": (jnp.zeros((), jnp.int32), None),
    "a table of integers": (jnp.ones((3, 4), jnp.int32), None),
    "integers with float0": (jnp.ones((3, 4), jnp.int32), np.zeros((3, 4), jax.dtypes.float0)),
    "integers with integers": (jnp.ones((3, 4), jnp.int32), jnp.ones((3, 4), jnp.int32)),
    "a mask of booleans": (np.ones(4, bool), None),
    "a masked leaf": (optax.MaskedNode(), optax.MaskedNode()),
}


@every_optimizer
@pytest.mark.parametrize(("leaf", "gradient"), NOT_TRAINED.values(), ids=NOT_TRAINED)
def test_a_leaf_that_cannot_be_trained_changes_nothing(make, leaf, gradient):
    tx = make(0.1)
    expected = one_update(tx, GRADIENT, PLAIN)
    updates = one_update(tx, GRADIENT | {"odd": gradient}, PLAIN | {"odd": leaf})
    chex.assert_trees_all_equal(updates["dense"], expected["dense"])
    if gradient is None:
        assert updates["odd"] is None
    elif hasattr(gradient, "dtype"):
        assert updates["odd"].dtype == leaf.dtype
        np.testing.assert_array_equal(updates["odd"], np.zeros(leaf.shape))
    else:
        assert updates["odd"] is gradient or updates["odd"] == gradient


@every_optimizer
@pytest.mark.parametrize("with_params", [True, False], ids=["with params", "without"])
def test_gradients_of_integers_leave_them_as_they_are(make, with_params):
    params = PLAIN | {
        "count": jnp.asarray(3, jnp.int32),
        "table": jnp.arange(6, dtype=jnp.uint8).reshape(2, 3),
        "flags": jnp.array([True, False]),
        "static": 7,
    }

    def loss(params):
        return jnp.sum(params["dense"]["kernel"] ** 2) + jnp.sum(params["dense"]["bias"])

    gradient = jax.grad(loss, allow_int=True)(params)
    assert gradient["table"].dtype == jax.dtypes.float0
    tx = make(0.1, weight_decay=0.0)
    given = params if with_params else None
    updates, state = tx.update(gradient, tx.init(params), given)
    with STANDARD():  # without parameters the zero of a boolean is an integer
        moved = optax.apply_updates(params, updates)
    tx.update(gradient, state, moved if with_params else None)
    chex.assert_trees_all_equal_dtypes(moved, jax.tree.map(jnp.asarray, params))
    dense = {"dense": moved.pop("dense")}
    chex.assert_trees_all_equal(moved, {name: params[name] for name in moved})
    alone = one_update(tx, {"dense": gradient["dense"]}, PLAIN)
    chex.assert_trees_all_equal(dense, optax.apply_updates(PLAIN, alone))


LACKING = {
    "a matrix": ({"dense": {"kernel": None, "bias": BIAS}}, "dense/kernel"),
    "a bias": ({"dense": {"kernel": KERNEL, "bias": None}}, "dense/bias"),
    "a module": ({"dense": None}, "dense/bias"),
}


@every_optimizer
@pytest.mark.parametrize(("gradient", "path"), LACKING.values(), ids=LACKING)
def test_a_trained_leaf_without_a_gradient_is_refused_by_path(make, gradient, path):
    tx = make(0.1)
    with pytest.raises(ValueError, match=f"The gradient of {path} is None") as caught:
        tx.update(gradient, tx.init(PLAIN), PLAIN)
    assert "\n" not in str(caught.value)


@every_optimizer
def test_a_leaf_that_init_has_not_seen_is_frozen(make):
    frozen = {"count": jnp.ones(()), "dense": {"kernel": None, "bias": BIAS}, "other": KERNEL}
    params = {"count": jnp.ones(()), "dense": {"kernel": KERNEL, "bias": BIAS}, "other": KERNEL}
    options = {"views": {"": None, "other": View(0, 1)}} if make is muon else {}
    tx = make(0.1, **options)
    state = tx.init(frozen | {"count": None})
    updates, state = tx.update(frozen | {"count": None}, state, params)
    assert updates["dense"]["kernel"] is None and updates["count"] is None
    expected = one_update(
        tx,
        {"dense": {"bias": BIAS}, "other": KERNEL},
        {"dense": {"bias": BIAS}, "other": KERNEL},
    )
    chex.assert_trees_all_equal(updates["other"], expected["other"])
    chex.assert_trees_all_equal(updates["dense"]["bias"], expected["dense"]["bias"])


@pytest.mark.parametrize("link", [optax_muon.decoupled_decay, optax_muon.cautious_decay])
@pytest.mark.parametrize("mask", [None, {"": True}, {"": True, "dense/bias": False}], ids=str)
def test_decay_alone_passes_over_a_leaf_without_an_update(link, mask):
    updates = {"dense": {"kernel": None, "bias": BIAS}, "more": None}
    params = PLAIN | {"more": {"kernel": KERNEL}}
    found = one_update(link(0.5, mask), updates, params)
    decays = mask is None or mask.get("dense/bias", True)
    # optax's own link, of which ours differ by the mask and by caution; the signs agree.
    expected = one_update(optax.add_decayed_weights(0.5 * decays), updates, params)
    chex.assert_trees_all_equal(found, expected)


TRAINED = {
    "a Python float": 2.0,
    "a numpy scalar": np.float32(2.0),
    "a scalar": jnp.asarray(2.0),
    "a numpy array": np.full(3, 2.0, np.float32),
    "no entries": jnp.zeros((0,)),
    "no entries, two axes": jnp.zeros((0, 4)),
    "complex numbers": jnp.full(3, 2.0 + 1.0j),
}


@every_optimizer
@pytest.mark.parametrize("leaf", TRAINED.values(), ids=TRAINED)
def test_any_leaf_of_floats_moves_as_with_adamw(make, leaf):
    options = {"weight_decay": 0.0} if make is muon else {"adam_b2": 0.95, "nesterov": False}
    params, gradient = {"bias": leaf}, {"bias": jax.tree.map(lambda x: 3.0 * x, leaf)}
    if isinstance(leaf, float) and make is not muon:
        pytest.skip("optax.contrib.muon asks every leaf for its rank")
    found = one_update(make(0.1, **options), gradient, params)
    with STANDARD():
        expected = one_update(optax.adamw(0.1, b2=0.95, weight_decay=0.0), gradient, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


MATRICES = {
    "one row": (1, 8),
    "one column": (8, 1),
    "one entry": (1, 1),
    "no rows": (0, 8),
    "no columns": (8, 0),
    "no layers": (0, 4, 8),
    "one layer": (1, 4, 8),
    "layers of one row": (3, 1, 8),
}


@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "jit"])
def test_matrices_of_any_size(shape, compile_it):
    view = View(-2, -1)
    tx = muon(0.1, views={"w": view}, weight_decay=0.0)
    gradient = {"w": jnp.asarray(RNG.normal(size=shape), jnp.float32)}
    update = jax.jit(tx.update) if compile_it else tx.update
    found, _ = update(gradient, tx.init(gradient), gradient)
    rows, cols = len(shape) - 2, len(shape) - 1
    expected = np.zeros(shape)
    if 0 not in shape:
        expected = reference.each_matrix(
            np.asarray(gradient["w"], np.float64), (rows,), (cols,), reference.newton_schulz
        )
    scale = -0.1 * 0.2 * np.sqrt(max(shape[-2:]))
    np.testing.assert_allclose(found["w"], scale * expected, rtol=1e-4, atol=1e-6)


@every_optimizer
@pytest.mark.parametrize("tree", [{}, (), [], {"a": {}}, {"a": None}], ids=str)
def test_a_tree_without_leaves(make, tree):
    tx = make(0.1)
    updates, _ = jax.jit(tx.update)(tree, tx.init(tree), tree)
    assert updates == tree


# Dtypes

REAL = ("bfloat16", "float16", "float32")


@every_optimizer
@pytest.mark.parametrize("stored", REAL)
@pytest.mark.parametrize("computed", REAL)
def test_updates_have_at_least_the_precision_of_the_parameters(make, stored, computed):
    params = jax.tree.map(lambda x: x.astype(stored), PLAIN)
    gradient = jax.tree.map(lambda x: x.astype(computed), GRADIENT)
    tx = make(0.1)
    updates = one_update(tx, gradient, params)
    with STANDARD():
        dtype = jnp.promote_types(stored, computed)
    for leaf in jax.tree.leaves(updates):
        assert leaf.dtype == dtype
    if make is muon:
        wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
        expected = one_update(tx, wide(gradient), wide(params))
        chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: x.astype(dtype), expected))


@pytest.mark.parametrize("stored", REAL)
@pytest.mark.parametrize("computed", REAL)
def test_mixed_precision_runs_in_every_driver_that_adamw_runs_in(stored, computed):
    params = jax.tree.map(lambda x: x.astype(stored), PLAIN)
    gradients = jax.tree.map(lambda x: jnp.stack([x.astype(computed)] * 4), GRADIENT)

    def train(tx):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0][0]

    drivers = {
        "scan": lambda tx: tx,
        "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    }
    for drive in drivers.values():
        with STANDARD():
            try:
                expected = train(drive(optax.adamw(0.1)))
            except TypeError:
                continue  # optax's driver does not take this pair
            found = train(drive(muon(0.1)))
        chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
        chex.assert_tree_all_finite(found)


def test_decay_of_float32_parameters_survives_bfloat16_gradients():
    params = {"kernel": jnp.ones((8, 16))}
    zero = {"kernel": jnp.zeros((8, 16), jnp.bfloat16)}
    tx = muon(1e-3)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(50):
        updates, state = update(zero, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], (1 - 1e-4) ** 50, rtol=1e-6)


def by_dtype(entry, otherwise):
    return lambda tree: jax.tree.map(lambda x: entry if x.dtype == "float32" else otherwise, tree)


def views_by_dtype(tree):
    wide = {"dense/kernel": View(1, 0), "dense/bias": None}
    return wide if tree["dense"]["kernel"].dtype == "float32" else {"": None}


DECIDED = {
    "mask": ("weight_decay_mask", by_dtype(True, False), None),
    "a mask of some": (
        "weight_decay_mask",
        lambda tree: {
            "dense": {"kernel": tree["dense"]["kernel"].dtype == "float32", "bias": False}
        },
        {"dense": {"kernel": True, "bias": False}},
    ),
    "views": ("views", views_by_dtype, {"dense/kernel": View(1, 0), "dense/bias": None}),
}


@pytest.mark.parametrize("name, function, entries", DECIDED.values(), ids=DECIDED)
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "jit"])
def test_a_function_of_the_parameters_is_called_with_the_parameters(
    name, function, entries, compile_it
):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADIENT)
    found, expected = muon(0.1, **{name: function}), muon(0.1, **{name: entries})
    states = [tx.init(PLAIN) for tx in (found, expected)]
    for _ in range(2):
        updates = []
        for i, tx in enumerate((found, expected)):
            update = jax.jit(tx.update) if compile_it else tx.update
            one, states[i] = update(narrow, states[i], PLAIN)
            updates.append(one)
        chex.assert_trees_all_equal(*updates)


def test_an_update_of_another_shape_than_its_parameter_is_refused_by_path():
    tx = muon(0.1)
    turned = {"dense": {"kernel": KERNEL.T, "bias": BIAS}}
    with pytest.raises(ValueError, match=r"update of dense/kernel has the shape \(6, 4\)"):
        tx.update(turned, tx.init(PLAIN), PLAIN)


@pytest.mark.parametrize("mu_dtype", [jnp.bfloat16, jnp.float32, "float16", None])
def test_complex_momenta_keep_their_imaginary_part(mu_dtype):
    gradients = [
        {"kernel": jnp.asarray(RNG.normal(size=(4, 6)) + 1j * RNG.normal(size=(4, 6)), "complex64")}
        | {"phase": jnp.asarray(RNG.normal(size=3) + 1j * RNG.normal(size=3), "complex64")}
        for _ in range(3)
    ]
    views = {"kernel": View(0, 1), "phase": None}
    stored, exact = (muon(0.1, views=views, mu_dtype=dtype) for dtype in (mu_dtype, None))
    states = [tx.init(gradients[0]) for tx in (stored, exact)]
    for gradient in gradients:
        found, states[0] = stored.update(gradient, states[0], gradient)
        expected, states[1] = exact.update(gradient, states[1], gradient)
        chex.assert_trees_all_equal(found, expected)


def test_cautious_decay_of_complex_numbers_compares_directions():
    params, update = jnp.array([1.0 + 1.0j, 1.0 - 5.0j]), jnp.array([1.0 - 0.5j, 1.0 + 1.0j])
    link = optax_muon.cautious_decay(0.1)
    found = one_update(link, {"w": update}, {"w": params})["w"]
    # The real part of update times conj(param) is 0.5 and -4.
    np.testing.assert_allclose(found, [update[0] + 0.1 * params[0], update[1]], rtol=1e-6)


def test_float64_trains_in_float64():
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(KERNEL, jnp.float64)}
        updates = one_update(muon(0.1), {"kernel": params["kernel"].astype("float32")}, params)
        assert updates["kernel"].dtype == jnp.float64


@every_optimizer
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_nan_is_made_of_zero_gradients(make, dtype):
    zero = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), PLAIN)
    if make is compat.muon:
        zero = {"kernel": zero["dense"]["kernel"]}  # in float16 optax's own Adam divides 0 by 0
    tx = make(0.1)
    with jax.debug_nans(True):
        updates, _ = jax.jit(tx.update)(zero, tx.init(zero), zero)
    chex.assert_trees_all_equal(updates, zero)


LINKS = {
    "muon": muon(0.1, views={"kernel": View(0, 1)}, weight_decay=0.0),
    "normuon": muon(0.1, views={"kernel": View(0, 1)}, post=optax_muon.normuon()),
    "update norm": muon(0.1, views={"kernel": View(0, 1)}, scale=optax_muon.scale_by_update_norm()),
    **{
        name: compat.muon(0.1, preconditioning=name)
        for name in ("frobenius", "aol", "schatten", "spectral")
    },
}


@pytest.mark.parametrize("tx", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("point", [0.0, 1.0], ids=["at zero", "elsewhere"])
def test_the_derivative_through_an_update_is_finite(tx, point):
    params = {"kernel": KERNEL}

    def moved(gradient):
        return jnp.sum(BIAS[None] * one_update(tx, {"kernel": gradient}, params)["kernel"])

    derivative = jax.grad(moved)(point * KERNEL)
    chex.assert_tree_all_finite(derivative)
    if not point:
        np.testing.assert_array_equal(derivative, 0.0)


DIFFERENTIATED = {
    "wide": [(4, 8)],
    "tall": [(8, 4)],
    "square": [(6, 6)],
    "a row": [(1, 8)],
    "a column": [(8, 1)],
    "one tall layer": [(1, 8, 4)],
    "wide layers": [(3, 4, 8)],
    "tall layers": [(3, 8, 4)],
    "two tall layers at a time": [(2, 512, 128)],
    "one shape, both ways": [(4, 8), (8, 4), (4, 8)],
    "several shapes": [(8, 4), (6, 6), (2, 8, 3)],
}


@pytest.mark.parametrize("shapes", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
def test_the_derivative_through_orthogonalization_is_that_of_a_loop_in_float64(shapes):
    rng = np.random.default_rng(0)
    link = optax_muon.orthogonalize(views=View(-2, -1))
    point, direction, weight = (
        {str(i): rng.normal(size=shape) for i, shape in enumerate(shapes)} for _ in range(3)
    )
    as_float32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))

    def found(x):
        updates = link.update(x, optax.EmptyState())[0]
        return optax.tree.vdot(as_float32(weight), updates)

    def truth(by):
        total = 0.0
        for path, x in point.items():
            axes = (x.ndim - 2,), (x.ndim - 1,)
            moved = x + by * direction[path]
            update = reference.each_matrix(moved, *axes, reference.newton_schulz)
            total += np.sum(weight[path] * update)
        return total

    slope = jax.grad(found)(as_float32(point))
    along = sum(np.sum(direction[path] * np.asarray(slope[path], np.float64)) for path in point)
    expected = (truth(1e-5) - truth(-1e-5)) / 2e-5
    size = sum(np.linalg.norm(direction[path]) * np.linalg.norm(slope[path]) for path in point)
    # The rounding of float32, multiplied by slopes of up to 485, in units of the whole derivative.
    assert abs(along - expected) < 1e-4 * size


# Arguments

REFUSED = {
    "no learning rate": (lambda: muon(None), "learning_rate is None"),
    "a learning rate in words": (lambda: muon("3e-4"), "learning_rate is '3e-4'"),
    "a learning rate of nan": (lambda: muon(float("nan")), "learning_rate is nan"),
    "beta above one": (lambda: muon(0.1, beta=1.5), "beta is 1.5"),
    "beta below zero": (lambda: muon(0.1, beta=-1.0), "beta is -1.0"),
    "beta of nan": (lambda: muon(0.1, beta=np.nan), "beta is nan"),
    "negative decay": (lambda: muon(0.1, weight_decay=-0.1), "weight_decay is -0.1"),
    "no decay": (lambda: muon(0.1, weight_decay=None), "weight_decay is None"),
    "mask of a link": (
        lambda: muon(0.1, weight_decay=optax_muon.cautious_decay(), weight_decay_mask={"": True}),
        "weight_decay is a link",
    ),
    "momenta of integers": (lambda: muon(0.1, mu_dtype=jnp.int32), "mu_dtype is int32"),
    "momenta of complex numbers": (lambda: muon(0.1, mu_dtype="complex64"), "mu_dtype is complex"),
    "momenta in words": (lambda: muon(0.1, mu_dtype="bf16"), "mu_dtype is bf16"),
    "a fallback uncalled": (lambda: muon(0.1, fallback=optax.adamw), "the function adamw"),
    "a fallback of numbers": (lambda: muon(0.1, fallback=3e-4), "fallback is 0.0003"),
    "a scale of numbers": (lambda: muon(0.1, scale=0.2), "scale is 0.2"),
    "a link uncalled": (lambda: muon(0.1, post=optax_muon.normuon), "the function normuon"),
    "an orthogonalizer in words": (lambda: muon(0.1, orthogonalizer="svd"), "orthogonalizer is"),
    "no size": (lambda: optax_muon.match_rms(0.0), "rms is 0.0"),
    "negative size": (lambda: optax_muon.scale_by_update_norm(-0.2), "rms is -0.2"),
    "beta2 above one": (lambda: optax_muon.normuon(2.0), "beta2 is 2.0"),
    "negative eps": (lambda: optax_muon.normuon(eps=-1.0), "eps is -1.0"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_refused_by_name_where_it_is_given(make, text):
    with pytest.raises((TypeError, ValueError), match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


ENTRIES = {
    "a misspelt name": {"dense": {"kernel": True, "bais": False}},
    "a name left out": {"dense": {"kernel": True}},
    "a None": {"dense": {"kernel": True, "bias": None}},
    "another top": {"Dense_0": False},
    "a word": "bias",
}


@pytest.mark.parametrize("mask", ENTRIES.values(), ids=ENTRIES)
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises((TypeError, ValueError), match="weight_decay_mask"):
        muon(0.1, weight_decay_mask=mask).init(PLAIN)


def test_shardings_of_no_parameter_are_refused():
    mesh = jax.make_mesh((1,), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    with pytest.raises(ValueError, match=r"shardings\['dense/kernal'\] matches no parameter"):
        muon(0.1, shardings={"dense": {"kernal": whole, "bias": whole}}).init(PLAIN)


@every_optimizer
def test_without_decay_no_parameters_are_needed(make):
    tx = make(0.1, weight_decay=0.0)
    found, _ = tx.update(GRADIENT, tx.init(PLAIN))
    chex.assert_trees_all_equal(found, one_update(tx, GRADIENT, PLAIN))


@pytest.mark.parametrize(
    "zero",
    [0, 0.0, -0.0, np.float32(0), np.float64(0), np.int32(0), np.float16(0), np.zeros(())],
    ids=lambda zero: f"{type(zero).__name__} {zero}",
)
def test_without_decay_no_parameters_are_needed_whatever_kind_of_number_is_zero(zero):
    tx = muon(0.1, weight_decay=zero)
    found, _ = tx.update(GRADIENT, tx.init(PLAIN))
    # With parameters and a rate that is not read: nothing is added.
    chex.assert_trees_all_equal(
        found, one_update(muon(0.1, weight_decay=jnp.zeros(())), GRADIENT, PLAIN)
    )
    link = optax_muon.decoupled_decay(zero)
    chex.assert_trees_all_equal(link.update(GRADIENT, link.init(PLAIN))[0], GRADIENT)
    theirs = optax_muon.compat.muon(0.1, weight_decay=zero)
    chex.assert_trees_all_equal(
        theirs.update(GRADIENT, theirs.init(PLAIN))[0],
        one_update(optax_muon.compat.muon(0.1, weight_decay=jnp.zeros(())), GRADIENT, PLAIN),
    )


@pytest.mark.parametrize("rate", [np.float32(0.1), jnp.zeros(()), lambda step: 0.0])
def test_with_decay_of_any_kind_parameters_are_asked_for(rate):
    tx = muon(0.1, weight_decay=rate)
    with pytest.raises(ValueError, match="Weight decay needs params"):
        tx.update(GRADIENT, tx.init(PLAIN))


def test_with_decay_parameters_are_asked_for():
    with pytest.raises(ValueError, match="Weight decay needs params"):
        muon(0.1).update(GRADIENT, muon(0.1).init(PLAIN))


# Functions as arguments


def is_kernel(params):
    return {"dense": {"kernel": params["dense"]["kernel"].ndim == 2, "bias": False}}


FUNCTIONS = {
    "mask": {"weight_decay_mask": is_kernel},
    "mask of any tree": {"weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p)},
    "orthogonalizer": {"orthogonalizer": optax_muon.NewtonSchulz(steps=3)},
    "foreign orthogonalizer": {"orthogonalizer": jnp.sign},
    "scale": {"scale": optax_muon.keller_scale()},
    "views": {"views": lambda p: {"dense/kernel": View(1, 0), "dense/bias": None}},
    "mu_dtype": {"mu_dtype": jnp.bfloat16},
    "link": {"weight_decay": optax_muon.cautious_decay(0.1), "post": optax_muon.normuon()},
}


@pytest.mark.parametrize("options", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_are_no_schedules_under_inject_hyperparams(options):
    plain, injected = muon(0.1, **options), optax.inject_hyperparams(muon)(0.1, **options)
    states, params = [plain.init(PLAIN), injected.init(PLAIN)], PLAIN
    for _ in range(2):
        expected, states[0] = jax.jit(plain.update)(GRADIENT, states[0], params)
        found, states[1] = jax.jit(injected.update)(GRADIENT, states[1], params)
        # The learning rate is a constant in one program and an argument of the other.
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)


def test_compats_functions_are_no_schedules_under_inject_hyperparams():
    options = {"weight_decay": 0.5, "weight_decay_mask": is_kernel}
    plain, injected = (
        compat.muon(0.1, **options),
        optax.inject_hyperparams(compat.muon)(0.1, **options),
    )
    expected, _ = jax.jit(plain.update)(GRADIENT, plain.init(PLAIN), PLAIN)
    found, _ = jax.jit(injected.update)(GRADIENT, jax.jit(injected.init)(PLAIN), PLAIN)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)


BY_SHAPE = {"views": lambda tree: {"dense/kernel": View(1, 0), "dense/bias": None}}
FACTORIES = {
    "muon": (muon, {"learning_rate": 0.1, "scale": optax_muon.keller_scale(), **BY_SHAPE}),
    "scale_by_muon": (
        optax_muon.scale_by_muon,
        {"scale": optax_muon.keller_scale(), "orthogonalizer": jnp.sign, **BY_SHAPE},
    ),
    "orthogonalize": (optax_muon.orthogonalize, {"orthogonalizer": jnp.sign, **BY_SHAPE}),
    "orthogonalize by default": (optax_muon.orthogonalize, {}),
    "scale_by_momentum": (scale_by_momentum, {"beta": 0.9, "mu_dtype": jnp.bfloat16}),
    "scale_by_shape": (
        optax_muon.scale_by_shape,
        {"rule": optax_muon.spectral_scale(), **BY_SHAPE},
    ),
    "scale_by_update_norm": (optax_muon.scale_by_update_norm, {"rms": 0.3, **BY_SHAPE}),
    "normuon": (optax_muon.normuon, {"beta2": 0.9, **BY_SHAPE}),
    "decoupled_decay": (optax_muon.decoupled_decay, {"rate": 0.5, "mask": is_kernel}),
    "cautious_decay": (optax_muon.cautious_decay, {"rate": 0.5, "mask": is_kernel}),
    "compat.muon": (compat.muon, {"learning_rate": 0.1, "weight_decay_mask": is_kernel}),
    "compat.scale_by_muon": (
        compat.scale_by_muon,
        {"weight_dimension_numbers": lambda tree: jax.tree.map(lambda x: None, tree)},
    ),
}
PARTIALS = {
    "bound": lambda factory, options: (functools.partial(factory, **options), {}),
    "given": lambda factory, options: (functools.partial(factory), options),
    "bound twice": lambda factory, options: (
        functools.partial(functools.partial(factory, **options), **options),
        {},
    ),
    "some of both": lambda factory, options: (
        functools.partial(factory, **dict([*options.items()][1:])),
        dict([*options.items()][:1]),
    ),
}


@pytest.mark.parametrize("partial", PARTIALS.values(), ids=PARTIALS)
@pytest.mark.parametrize(("factory", "options"), FACTORIES.values(), ids=FACTORIES)
def test_a_partial_of_a_factory_takes_hyperparameters(factory, options, partial):
    bound, given = partial(factory, options)
    injected = optax.inject_hyperparams(bound)(**given)
    state = injected.init(PLAIN)
    numbers = {name for name, value in options.items() if isinstance(value, float)}
    assert numbers <= state.hyperparams.keys()
    plain = factory(**options)
    expected, _ = jax.jit(plain.update)(GRADIENT, plain.init(PLAIN), PLAIN)
    found, _ = jax.jit(injected.update)(GRADIENT, state, PLAIN)
    # The numbers are constants in one program and arguments of the other.
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)


def test_every_factory_that_takes_functions_is_among_these():
    marked = {
        factory
        for module in (optax_muon, compat)
        for factory in vars(module).values()
        if callable(factory) and hasattr(factory, "__signature__")
    }
    assert {muon, compat.muon} <= marked <= {factory for factory, _ in FACTORIES.values()}


def test_a_link_after_the_orthogonalization_reads_matrices_as_muon_does():
    views = {"dense/kernel": View(1, 0), "dense/bias": None}
    given = muon(0.1, views=views, post=optax_muon.normuon(views={"dense/kernel": View(1, 0)}))
    silent = muon(0.1, views=views, post=optax_muon.normuon())
    expected = one_update(given, GRADIENT, PLAIN)
    chex.assert_trees_all_equal(one_update(silent, GRADIENT, PLAIN), expected)


# Models that are trees with other things in them


class Block(eqx.Module):
    """An Equinox module that can be called and holds a function."""

    kernel: jax.Array
    bias: jax.Array
    activation: object
    depth: int = 3

    def __call__(self, x):
        return self.activation(x @ self.kernel + self.bias[None])


MODEL = Block(KERNEL, BIAS, jax.nn.relu)


@eqx.filter_grad
def model_gradient(model, x):
    return jnp.sum(model(x) ** 2)


@every_optimizer
@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "whole"])
def test_an_equinox_module_that_can_be_called(make, filtered):
    views = {"kernel": View(0, 1), "bias": None}
    named = "views" if make is muon else "muon_weight_dimension_numbers"
    gradient = model_gradient(MODEL, jnp.ones((2, 4)))
    arrays = eqx.filter(MODEL, eqx.is_inexact_array)
    tx = make(0.1, **{named: views})
    expected = one_update(
        tx,
        {"kernel": gradient.kernel, "bias": gradient.bias},
        {"kernel": KERNEL, "bias": BIAS},
    )
    tree = jax.tree.map(lambda x: views["kernel"] if x.ndim == 2 else None, arrays)
    for given in (views, tree):
        tx = make(0.1, **{named: given})
        state = tx.init(arrays if filtered else MODEL)
        updates, state = tx.update(gradient, state, arrays if filtered else MODEL)
        chex.assert_trees_all_equal(updates.kernel, expected["kernel"])
        chex.assert_trees_all_equal(updates.bias, expected["bias"])
        moved = eqx.apply_updates(MODEL, updates)
        assert moved.activation is jax.nn.relu
        tx.update(gradient, state, moved)


def test_shardings_may_be_an_equinox_module_that_can_be_called():
    mesh = jax.make_mesh((1,), ("data",))
    arrays = eqx.filter(MODEL, eqx.is_inexact_array)
    tree = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec()), arrays)
    views = {"kernel": View(0, 1), "bias": None}
    gradient = model_gradient(MODEL, jnp.ones((2, 4)))
    updates = one_update(muon(0.1, views=views, shardings=tree), gradient, arrays)
    chex.assert_trees_all_equal(updates, one_update(muon(0.1, views=views), gradient, arrays))


# Places

DEVICES = jax.devices()


def on(device, tree):
    return jax.device_put(tree, device)


@every_optimizer
def test_parameters_on_another_device(make):
    tx = make(0.1)
    params, gradient = on(DEVICES[3], PLAIN), on(DEVICES[3], GRADIENT)
    updates, state = tx.update(gradient, tx.init(params), params)
    chex.assert_trees_all_close(updates, one_update(tx, GRADIENT, PLAIN), rtol=1e-6)
    assert {x.device for x in jax.tree.leaves(updates)} == {DEVICES[3]}
    tx.update(gradient, state, params)


def test_stages_of_a_pipeline_on_devices_of_their_own():
    tx = muon(0.1)
    first, second = {"kernel": KERNEL}, {"kernel": KERNEL[::-1]}
    both = {"first": first, "second": first}, {"first": second, "second": second}
    params, gradient = (
        {"first": on(DEVICES[0], tree["first"]), "second": on(DEVICES[5], tree["second"])}
        for tree in both
    )
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(gradient, state, params)
    assert {x.device for x in jax.tree.leaves(updates["second"])} == {DEVICES[5]}
    together, plain = (tx.init(both[0]), both[0])
    for _ in range(2):
        expected, together = tx.update(both[1], together, plain)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_stages_of_a_pipeline_on_meshes_of_their_own():
    meshes = [jax.make_mesh((4,), ("fsdp",), devices=DEVICES[i : i + 4]) for i in (0, 4)]
    big = jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32)

    def stages(tree):
        return {
            f"stage_{i}": on(NamedSharding(mesh, PartitionSpec("fsdp")), tree)
            for i, mesh in enumerate(meshes)
        }

    tx = muon(0.1)
    params, gradient = stages({"kernel": big}), stages({"kernel": big[::-1]})
    updates = one_update(tx, gradient, params)
    expected = one_update(tx, {"kernel": big[::-1]}, {"kernel": big})
    for stage in updates.values():
        chex.assert_trees_all_close(jax.device_get(stage), expected, rtol=1e-5, atol=1e-6)


SHARED = {
    "whole at home": {"layout": "home"},
    "gathered": {"layout": "gather"},
    "columns on several devices": {"model": meshes.FREE_MESSAGES},
}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
def test_a_matrix_on_a_mesh_that_is_not_finite_becomes_nan_and_no_other_does(options, bad):
    case = meshes.case({"fsdp": 8}, meshes.layers(3, (64, 128), PartitionSpec("fsdp")), **options)
    assert (" split " in str(case.plan())) == ("model" in options)
    gradient = {path: np.array(x) for path, x in meshes.gradients_of(case).items()}
    gradient["1/kernel"][2, 3] = bad
    link = optax_muon.orthogonalize(views=case.views, plan=case.plan())
    given = jax.device_put(gradient, case.shardings("explicit"))
    found = jax.device_get(jax.jit(lambda g: link.update(g, optax.EmptyState())[0])(given))
    assert np.isnan(found.pop("1/kernel")).all()
    # Shared matrices are summed in pieces, in float32.
    truth = {path: x for path, x in meshes.alone_of(case).items() if path in found}
    assert meshes.error(found, truth) <= 1e-4


@every_optimizer
def test_an_update_outside_of_jit_is_compiled_once(make, caplog):
    tx = make(0.1)
    state = tx.init(PLAIN)
    _, state = tx.update(GRADIENT, state, PLAIN)
    _, state = tx.update(GRADIENT, state, PLAIN)
    with jax.log_compiles(True):
        tx.update(GRADIENT, state, PLAIN)
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


# Transformations of the update


@every_optimizer
def test_a_population_of_optimizers_under_vmap(make):
    tx = make(0.1)
    population = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), PLAIN)
    gradients = jax.tree.map(lambda x: jnp.stack([x, -x, 3 * x]), GRADIENT)
    states = jax.vmap(tx.init)(population)
    found, _ = jax.jit(jax.vmap(tx.update))(gradients, states, population)
    for i in range(3):
        take = functools.partial(jax.tree.map, lambda x, i=i: x[i])
        chex.assert_trees_all_close(
            take(found), one_update(tx, take(gradients), take(population)), rtol=1e-4, atol=1e-6
        )


@every_optimizer
def test_a_state_can_be_donated(make):
    tx = make(0.1)
    expected = one_update(tx, GRADIENT, PLAIN)
    step = jax.jit(tx.update, donate_argnums=1)
    for state in (tx.init(PLAIN), jax.jit(tx.init)(PLAIN)):
        updates, state = step(GRADIENT, state, PLAIN)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
        step(GRADIENT, state, PLAIN)
    tx.init(PLAIN)


def test_coefficients_given_as_an_array_survive_the_donation_of_a_state():
    tx = compat.muon(0.1, ns_coeffs=jnp.array([3.4445, -4.7750, 2.0315]))
    jax.jit(tx.update, donate_argnums=1)(GRADIENT, tx.init(PLAIN), PLAIN)
    tx.update(GRADIENT, tx.init(PLAIN), PLAIN)


NAMES = {"dense": {"kernel": "spec of kernel", "bias": "spec of bias"}}


@every_optimizer
def test_states_are_mapped_with_a_tree_of_the_parameters(make):
    tx = make(0.1)
    state = tx.init(PLAIN)
    # Muon's state has no moments of Adam's parameters, and Adam's none of the matrices.
    found = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        state,
        NAMES,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    named = optax.tree.get_all_with_path(found, "mu")
    assert [value["dense"] for _, value in named] == [NAMES["dense"]] * 2
