"""An optimizer's state lies as its parameters do, or is cut further, and stays so."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import muon, scale_by_muon, state_shardings, zero1_shardings

SPECS = {
    "embed/embedding": ((32, 64), P("fsdp", None)),
    "layers/norm/scale": ((4, 64), P()),
    "layers/up_proj/kernel": ((4, 64, 128), P(None, "fsdp", None)),
    "q_proj/kernel": ((64, 48), P()),
    "out/kernel": ((6, 8), P(None, "fsdp")),
}
CUT = {
    "embed/embedding": P(("fsdp", "data"), None),
    "layers/norm/scale": P("data", None),
    "layers/up_proj/kernel": P("data", "fsdp", None),
    "q_proj/kernel": P("data", None),
    "out/kernel": P("data", "fsdp"),
}
"""With copies over `data` made parts: along the first axis that divides."""
STEPS = 3


def mesh(kind):
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=meshes.AXES[kind][:2])


def shardings(kind):
    there = mesh(kind)
    return {path: NamedSharding(there, spec) for path, (_, spec) in SPECS.items()}


def host(seed):
    rng = np.random.default_rng(seed)
    return {p: rng.standard_normal(shape, np.float32) for p, (shape, _) in SPECS.items()}


def shapes():
    return {p: jax.ShapeDtypeStruct(shape, np.float32) for p, (shape, _) in SPECS.items()}


def optimizer(kind=None, zero1=(), wrapped=False):
    """Muon as one uses it on such a mesh; on one device without a kind."""
    given = (
        None
        if kind in (None, "explicit")
        else zero1_shardings(shapes(), shardings(kind), axes=zero1)
    )
    if wrapped:
        return optax.inject_hyperparams(muon, static_args="shardings")(1e-2, shardings=given)
    return muon(1e-2, shardings=given)


def step(tx, out=None):
    def update(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update, donate_argnums=(0, 1), out_shardings=out)


def ways(spec):
    """Parts that a spec cuts a parameter into."""
    axes = [name for entry in spec for name in ([entry] if isinstance(entry, str) else entry or ())]
    return math.prod({"data": 2, "fsdp": 4}[name] for name in axes)


@functools.cache
def alone():
    tx = optimizer()
    params = jax.tree.map(jnp.asarray, host(0))
    state = tx.init(params)
    for seed in range(STEPS):
        params, state = step(tx)(params, state, host(seed + 1))
    return jax.tree.map(np.asarray, params)


@functools.cache
def trained(kind, zero1, wrapped=False):
    """The first and last state and the last parameters of a run on the mesh."""
    tx, there = optimizer(kind, zero1, wrapped), shardings(kind)
    params = jax.device_put(host(0), there)
    wanted = state_shardings(tx, params, there, zero1=zero1)
    first = jax.jit(tx.init, out_shardings=wanted)(params)
    state = jax.tree.map(jnp.copy, first)
    # On Auto axes results lie where the compiler likes, unless it is told.
    train = step(tx, None if kind == "explicit" else (there, wanted))
    for seed in range(STEPS):
        gradient = jax.device_put(host(seed + 1), there)
        params, state = train(params, state, gradient)
    return first, state, params, wanted


RUNS = [(kind, zero1, False) for kind in ("explicit", "auto", "mixed") for zero1 in ((), "data")]
RUNS += [("explicit", "data", True), ("auto", "data", True)]


@pytest.mark.parametrize(("kind", "zero1", "wrapped"), RUNS)
class TestRun:
    def test_the_parameters_are_those_of_one_device(self, kind, zero1, wrapped):
        _, _, params, _ = trained(kind, zero1, wrapped)
        assert meshes.error(params, alone()) <= 1e-5

    def test_the_parameters_stay_where_they_were(self, kind, zero1, wrapped):
        _, _, params, _ = trained(kind, zero1, wrapped)
        for path, sharding in shardings(kind).items():
            assert params[path].sharding.is_equivalent_to(sharding, params[path].ndim)

    def test_the_state_begins_and_stays_as_asked(self, kind, zero1, wrapped):
        first, last, _, wanted = trained(kind, zero1, wrapped)
        for begun, now, asked in zip(*map(jax.tree.leaves, (first, last, wanted)), strict=True):
            assert (now.shape, now.dtype) == (begun.shape, begun.dtype)
            assert begun.sharding.is_equivalent_to(asked, begun.ndim)
            assert now.sharding.is_equivalent_to(asked, now.ndim)

    def test_a_device_holds_its_part_of_the_moments_and_no_more(self, kind, zero1, wrapped):
        _, last, _, _ = trained(kind, zero1, wrapped)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(last) if x.ndim)
        entries = {path: math.prod(shape) for path, (shape, _) in SPECS.items()}
        specs = {path: CUT[path] if zero1 else spec for path, (_, spec) in SPECS.items()}
        cut = {path: ways(spec) for path, spec in specs.items()}
        adam = ("embed/embedding", "layers/norm/scale")  # two moments each
        expected = sum((1 + (p in adam)) * 4 * entries[p] // cut[p] for p in SPECS)
        assert held == expected


@pytest.mark.parametrize("path", SPECS)
def test_copies_are_cut_along_the_first_axis_that_divides(path):
    found = zero1_shardings(shapes(), shardings("auto"), axes="data")[path]
    assert found.is_equivalent_to(NamedSharding(mesh("auto"), CUT[path]), len(SPECS[path][0]))


def test_what_does_not_divide_keeps_its_copies():
    sharding = NamedSharding(mesh("auto"), P())
    params = {"k": jax.ShapeDtypeStruct((3, 5), np.float32)}
    assert zero1_shardings(params, sharding, axes="data")["k"] == sharding


def test_an_axis_in_use_is_not_cut_again():
    sharding = NamedSharding(mesh("auto"), P("data"))
    params = {"k": jax.ShapeDtypeStruct((8, 8), np.float32)}
    assert zero1_shardings(params, sharding, axes="data")["k"] == sharding


def test_several_axes_may_be_cut_at_once():
    params = {"k": jax.ShapeDtypeStruct((8, 8), np.float32)}
    found = zero1_shardings(params, NamedSharding(mesh("auto"), P()), axes=("data", "fsdp"))["k"]
    assert found.spec[0] == ("data", "fsdp")


def test_every_moment_of_a_deep_tree_finds_its_parameter():
    params = {"a": {"k": (8, 16)}, "b": {"a": {"k": (8, 16)}}, "k": (8, 16)}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, np.float32),
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    there = mesh("auto")
    specs = {"a": {"k": P("data")}, "b": {"a": {"k": P("fsdp")}}, "k": P(None, "fsdp")}
    given = jax.tree.map(
        lambda s: NamedSharding(there, s), specs, is_leaf=lambda s: isinstance(s, P)
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), scale_by_muon(views=None), optax.trace(0.9))
    found = state_shardings(tx, params, given)
    assert found[2].trace == given
    assert optax.tree.get(found, "mu") == given


def test_counts_are_copied():
    found = state_shardings(optimizer("auto"), shapes(), shardings("auto"))
    shapes_of = jax.tree.leaves(jax.eval_shape(optimizer("auto").init, shapes()))
    scalars = [s.spec for s, x in zip(jax.tree.leaves(found), shapes_of, strict=True) if not x.ndim]
    assert scalars and set(scalars) == {P()}


def test_a_parameter_without_a_sharding_is_refused():
    given = {path: s for path, s in shardings("auto").items() if path != "q_proj/kernel"}
    with pytest.raises(ValueError, match="shardings has no NamedSharding for 'q_proj/kernel'"):
        state_shardings(optimizer("auto"), shapes(), given)


def test_a_bare_spec_is_refused():
    with pytest.raises(ValueError, match="NamedSharding for 'embed/embedding'"):
        state_shardings(optimizer(), shapes(), P())


def test_an_axis_that_the_mesh_lacks_is_refused():
    with pytest.raises(
        ValueError, match="no axis 'dp' to cut embed/embedding over; its mesh has data, fsdp"
    ):
        state_shardings(optimizer(), shapes(), shardings("auto"), zero1="dp")


# ---- large trees ---------------------------------------------------------------------------------


def unrolled(layers):
    """A mixture with a parameter per layer and expert, six leaves a layer."""
    kernel = jax.ShapeDtypeStruct((8, 16), np.float32)
    experts = {f"experts_{i}": {"up_proj": {"kernel": kernel}} for i in range(5)}
    norm = {"norm": {"scale": jax.ShapeDtypeStruct((8,), np.float32)}}
    return {f"layers_{i}": {**experts, **norm} for i in range(layers)}


def calls(function):
    """How many functions a call enters, those of C such as `str.endswith` included."""
    count = 0

    def enter(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(enter)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_work_grows_as_the_tree_does():
    """By comparing every leaf of the state with every parameter it would grow 16-fold."""
    everywhere = NamedSharding(mesh("explicit"), P())
    tx = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    jax.eval_shape(tx.init, unrolled(1))  # imports and caches
    few, many = (
        calls(functools.partial(state_shardings, tx, unrolled(layers), everywhere))
        for layers in (20, 80)
    )
    assert many < 4.5 * few


def test_a_parameter_alone_is_sharded_with_its_moments():
    """Its path is empty, and every path ends in it."""
    there = NamedSharding(mesh("explicit"), P("fsdp"))
    state = state_shardings(optax.scale_by_adam(), jax.ShapeDtypeStruct((8, 4), np.float32), there)
    assert (state.mu, state.nu) == (there, there)
    assert state.count.spec == P()


def test_the_longest_path_owns_a_moment():
    """`b/kernel` also ends in `kernel`, which has the same shape and another sharding."""
    kernel, there = jax.ShapeDtypeStruct((8, 8), np.float32), mesh("explicit")
    params = {"kernel": kernel, "b": {"kernel": kernel}}
    given = {"kernel": NamedSharding(there, P("fsdp")), "b/kernel": NamedSharding(there, P("data"))}
    mu = state_shardings(optax.trace(0.9), params, given).trace
    assert mu["kernel"].spec == P("fsdp")
    assert mu["b"]["kernel"].spec == P("data")


# ---- odd inputs ----------------------------------------------------------------------------------


def everywhere():
    return NamedSharding(mesh("explicit"), P())


ODD = {
    "no parameters": ({}, {}),
    "None": (None, {}),
    "a Python number": ({"a": 1.5}, {"a": P()}),
    "numpy": ({"a": np.ones((8, 4))}, {"a": P("data")}),
    "integers": ({"a": jnp.arange(8)}, {"a": P("data")}),
    "None among others": ({"a": None, "b": jnp.ones(8)}, {"a": None, "b": P("data")}),
    "zero size": ({"a": jnp.ones((0, 4))}, {"a": P("data")}),
}


@pytest.mark.parametrize(("params", "specs"), ODD.values(), ids=ODD.keys())
def test_odd_parameters_have_their_shardings(params, specs):
    state = state_shardings(optax.trace(0.9), params, everywhere(), zero1="data")
    found = jax.tree.map(lambda sharding: sharding.spec, state.trace)
    assert {k: v and P(*v[:1]) if v and any(v) else v for k, v in (found or {}).items()} == specs


def test_none_is_a_mesh_axis_too_few_and_one_twice_is_once():
    params = {"a": jnp.ones((8, 4))}
    none = zero1_shardings(params, everywhere(), axes=None)
    assert none == zero1_shardings(params, everywhere(), axes=()) == {"a": everywhere()}
    twice = zero1_shardings(params, everywhere(), axes=("data", "data"))
    assert twice == zero1_shardings(params, everywhere(), axes="data")


@pytest.mark.parametrize(
    ("params", "given", "kind", "message"),
    [
        ({}, {}, ValueError, "shardings has no NamedSharding; give every parameter one."),
        ({"a": 1.0}, None, ValueError, "shardings has no NamedSharding for 'a'"),
        ({"a": 1.0}, P(), ValueError, "shardings has no NamedSharding for 'a'"),
        ({"a": 1.0, "b": 1.0}, {"a": everywhere()}, ValueError, "no NamedSharding for 'b'"),
        (
            {"a": 1.0},
            dict.fromkeys("abc", everywhere()),
            ValueError,
            "shardings names 'b', 'c', which",
        ),
        ({"a": {"b": 1.0}}, {"a/b/c": everywhere()}, ValueError, "which params does not have"),
        ({"a": "text"}, everywhere(), TypeError, "a is 'text', a str; parameters are arrays or"),
        ({"a": jnp.sin}, everywhere(), TypeError, "parameters are arrays or numbers"),
    ],
)
def test_what_has_no_sharding_or_no_parameter_is_named(params, given, kind, message):
    with pytest.raises(kind) as error:
        state_shardings(optax.identity(), params, given)
    assert message in str(error.value)


def test_a_masked_parameter_may_have_a_sharding():
    """What `optax.partition` takes away; the shardings are those of the whole model."""
    params = {"a": jnp.ones(8), "b": optax.MaskedNode()}
    state = state_shardings(optax.trace(0.9), params, {"a": everywhere(), "b": everywhere()})
    assert state.trace["a"] == everywhere()


def test_thousands_of_shardings_of_nothing_are_counted():
    with pytest.raises(ValueError, match="and 2980 more, which params does not have"):
        zero1_shardings({}, {str(i): everywhere() for i in range(3000)}, axes=())
