"""Odd leaves, items and settings: saved and restored as they were, or one sentence and no file."""

import dataclasses
import functools
import json
import re

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import checkpoint, keller_scale, match_rms, spectral_scale
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.state import State
from optax_muon.transforms.scale import MatchRms, fixed_scale

NAN = float("nan")


class TrainState(flax.struct.PyTreeNode):
    """A custom node around an array."""

    w: jax.Array


def deleted():
    array = jnp.ones(3)
    array.delete()
    return array


class Cycle(dict):
    """A setting that holds itself."""

    def __init__(self):
        self["self"] = self


# ---- leaves and items ----------------------------------------------------------------------------

GOOD = {
    "an array of zero size": {"params": {"a": jnp.zeros((0, 4)), "b": jnp.ones(3)}},
    "nothing but an array of zero size": {"params": {"a": jnp.zeros((0, 4), jnp.bfloat16)}},
    "a lone array of zero size": {"params": jnp.zeros((3, 0), jnp.int32)},
    "a stack of no layers": {"params": {"layers": {"up": jnp.zeros((0, 4, 8))}, "w": jnp.ones(2)}},
    "zero size inside a custom node": {"params": TrainState(jnp.zeros(0)), "w": jnp.ones(2)},
    "no keys": {"keys": jax.random.split(jax.random.key(0), 0)},
    "a key": {"keys": {"a": jax.random.key(5)}},
    "None": {"params": {"a": None, "b": jnp.ones(3)}},
    "an item that is None": {"params": None},
    "an empty item": {"params": {}},
    "no item": {},
    "Python numbers": {"params": {"a": 1.5, "b": 3, "c": True}},
    "numpy arrays": {"params": {"a": np.ones(3), "b": np.float32(2), "c": np.array(True)}},
    "complex and narrow numbers": {
        "params": {
            "a": jnp.array([1 + 2j, -3j]),
            "b": jnp.ones(3, jnp.int8),
            "c": jnp.ones(2, jnp.float16),
        }
    },
    "a path with a slash": {"params": {"a/b": jnp.ones(3)}},
    "numbers as keys": {"params": {1: jnp.ones(3), 2: jnp.ones(2)}},
    "infinities and NaN": {"params": {"a": jnp.array([NAN, np.inf, -0.0])}},
}


def bits(tree):
    """The leaves as arrays of numpy; typed keys as their bits."""

    def one(leaf):
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(one, tree)


@pytest.mark.filterwarnings("ignore:.*x64|Explicitly requested dtype float64")
@pytest.mark.parametrize("items", GOOD.values(), ids=GOOD.keys())
def test_odd_items_come_back_as_they_were(items, tmp_path):
    checkpoint.save(tmp_path / "state", items)
    found = checkpoint.restore(tmp_path / "state", items)
    assert jax.tree.structure(found) == jax.tree.structure(items)
    for a, b in zip(*map(jax.tree.leaves, (bits(found), bits(items))), strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(a, b)


BAD = {
    "a string": ({"params": {"a": "text"}}, TypeError, "params/a is 'text', a str; a checkpoint"),
    "a function": ({"params": {"f": jnp.sin}}, TypeError, "params/f is <"),
    "an object": ({"params": {"o": object()}}, TypeError, "params/o is <object object"),
    "no mapping": ([jnp.ones(3)], TypeError, "items is [Array"),
    "a number as a name": ({3: jnp.ones(3)}, TypeError, "give a mapping from names"),
    "a slash in a name": ({"a/b": jnp.ones(3)}, ValueError, "'a/b', which is not a file name"),
    "an empty name": ({"": jnp.ones(3)}, ValueError, "'', which is not a file name"),
    "a donated leaf": ({"params": {"a": deleted()}}, ValueError, "params/a has been donated"),
    "a float0 leaf": (
        {"params": {"a": np.zeros(3, jax.dtypes.float0)}},
        TypeError,
        "params/a is",
    ),
    "two leaves of one path": (
        {"params": {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}},
        ValueError,
        "Two parameters have the path 'a/b'",
    ),
}


@pytest.mark.parametrize(("items", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_saved_is_refused_by_name_and_nothing_is_written(
    items, kind, message, tmp_path
):
    with pytest.raises(kind) as error:
        checkpoint.save(tmp_path / "state", items)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_array_of_another_size_than_zero_is_refused(tmp_path):
    checkpoint.save(tmp_path / "state", {"params": {"a": jnp.zeros((0, 4))}})
    with pytest.raises(ValueError, match=r"params/a is float32 \[0, 4\] in the checkpoint and"):
        checkpoint.restore(tmp_path / "state", {"params": {"a": jnp.zeros((2, 4))}})


def test_arrays_of_zero_size_take_the_shardings_that_are_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",))
    there = NamedSharding(mesh, P("fsdp"))
    like = {
        "params": {
            "none": jax.ShapeDtypeStruct((8, 0), np.float32, sharding=there),
            "some": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=there),
        }
    }
    some = np.arange(16, dtype=np.float32).reshape(8, 2)
    checkpoint.save(
        tmp_path / "state", {"params": {"none": np.zeros((8, 0), np.float32), "some": some}}
    )
    found = checkpoint.restore(tmp_path / "state", like)["params"]
    chex.assert_shape(found["none"], (8, 0))
    np.testing.assert_array_equal(found["some"], some)
    assert found["none"].sharding == found["some"].sharding == there


def test_a_run_with_a_parameter_of_zero_size_is_saved_whole_and_by_its_parts(tmp_path):
    params = {"layers": jnp.zeros((0, 4)), "w": jnp.arange(4.0)}
    state = State(params, optax.trace(0.9).init(params))
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state)
        found = checkpoints.restore(state)
        chex.assert_trees_all_equal(found, state)
        chex.assert_trees_all_equal(checkpoints.params(), params)
        chex.assert_shape(checkpoints.array("params", "layers"), (0, 4))
        np.testing.assert_array_equal(checkpoints.array("params", "w"), np.arange(4.0))


# ---- settings ------------------------------------------------------------------------------------

ODD_SETTINGS = {
    "NaN": {"x": NAN},
    "NaN in a list": {"x": [1.0, [NAN, {"y": NAN}]]},
    "NaN in an array": {"x": np.array([1.0, NAN])},
    "NaN of jax": {"x": jnp.float32(NAN)},
    "an infinity": {"x": -float("inf")},
    "a partial of NaN": {"f": functools.partial(jnp.full, (2,), NAN)},
    "an array of zero size": {"x": np.zeros((0, 3))},
    "a key": {"x": jax.random.key(0)},
    "None": {"x": None},
    "an empty mapping": {},
    "nothing but a number": 3,
}


@pytest.mark.parametrize("settings", ODD_SETTINGS.values(), ids=ODD_SETTINGS.keys())
def test_odd_settings_equal_themselves(settings, tmp_path):
    items = {"params": jnp.ones(2)}
    checkpoint.save(tmp_path / "state", items, settings)
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path / "state", items, settings), items)


@pytest.mark.parametrize(
    ("saved", "now", "line"),
    [
        ({"x": NAN}, {"x": 1.0}, "x is nan in the checkpoint and 1.0 now"),
        ({"x": 1.0}, {"x": NAN}, "x is 1.0 in the checkpoint and nan now"),
        ({"x": [NAN, 1]}, {"x": [NAN, 2]}, "x is [nan, 1] in the checkpoint and [nan, 2] now"),
        ({"x": [NAN]}, {"x": [NAN, NAN]}, "x is [nan] in the checkpoint and [nan, nan] now"),
        ({}, {"x": "absent"}, "x is absent in the checkpoint and absent now"),
        ({"x": None}, {}, "x is None in the checkpoint and absent now"),
        (3, 4, "settings is 3 in the checkpoint and 4 now"),
    ],
    ids=str,
)
def test_settings_that_differ_are_still_told_apart(saved, now, line):
    with pytest.raises(ValueError) as error:
        checkpoint.check(checkpoint.describe({}, saved), checkpoint.describe({}, now))
    assert line in [each.strip() for each in str(error.value).splitlines()]


def test_a_setting_of_thousands_of_numbers_is_cut_in_the_message():
    saved, now = ({"x": np.full(5000, value)} for value in (1.0, 2.0))
    with pytest.raises(ValueError) as error:
        checkpoint.check(checkpoint.describe({}, saved), checkpoint.describe({}, now))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x": {1, 2}}, "settings hold {1, 2}, a set, which JSON cannot hold"),
        ({"x": 1j}, "settings hold 1j, a complex"),
        ({"x": b"text"}, "settings hold b'text', a bytes"),
        ({(1, 2): 3}, "keys must be str"),
        (Cycle(), "settings contain themselves"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_json_cannot_hold_are_refused_and_nothing_is_written(
    settings, message, tmp_path
):
    with pytest.raises(TypeError) as error:
        checkpoint.save(tmp_path / "state", {"params": jnp.ones(2)}, settings)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


# Functions: what tells two of one name apart


@dataclasses.dataclass(frozen=True)
class Half:
    of: float

    def __call__(self, step):
        return self.of / 2


@dataclasses.dataclass(frozen=True)
class Third(Half):
    pass


class Rate:
    def __init__(self, peak):
        self.peak = peak

    def at(self, step):
        return self.peak


def constant(rate):
    return lambda step: rate


def with_default(rate):
    def schedule(step, peak=rate):
        return peak

    return schedule


def calling(function):
    return lambda step: function(step)


PAIRS = {
    "match_rms": (match_rms(0.2), match_rms(0.9), "x.rms is 0.2 in the checkpoint and 0.9 now"),
    "fixed_scale": (fixed_scale(64), fixed_scale(32), "x.hidden is 64 in the checkpoint and 32"),
    "rules": (keller_scale(), spectral_scale(), "KellerScale in the checkpoint and optax_muon"),
    "rules of equal numbers": (Half(1.0), Third(1.0), "Half in the checkpoint and"),
    "schedules": (
        optax.cosine_decay_schedule(1e-3, 100),
        optax.cosine_decay_schedule(1.0, 5),
        "x.init_value is 0.001 in the checkpoint and 1.0 now",
    ),
    "kinds of schedules": (
        optax.linear_schedule(1.0, 0.0, 5),
        optax.cosine_decay_schedule(1.0, 5),
        "x.function is optax",
    ),
    "schedules of schedules": (
        optax.warmup_cosine_decay_schedule(0.0, 1e-3, 5, 50),
        optax.warmup_cosine_decay_schedule(0.0, 1e-4, 5, 50),
        "x.schedules is [",
    ),
    "clipped schedules": (
        optax.exponential_decay(1.0, 5, 0.5, end_value=0.1),
        optax.exponential_decay(1.0, 5, 0.5, end_value=0.2),
        "x.end_value is 0.1 in the checkpoint and 0.2 now",
    ),
    "lambdas": (constant(0.1), constant(0.2), "x.rate is 0.1 in the checkpoint and 0.2 now"),
    "defaults": (with_default(1), with_default(2), "x.peak is 1 in the checkpoint and 2 now"),
    "functions of functions": (
        calling(constant(0.1)),
        calling(constant(0.2)),
        "x.function_.rate is 0.1 in the checkpoint and 0.2 now",
    ),
    "partials": (
        functools.partial(constant(0.1), step=3),
        functools.partial(constant(0.2), step=3),
        "x.function.rate is 0.1 in the checkpoint and 0.2 now",
    ),
    "compiled": (
        jax.jit(constant(0.1)),
        jax.jit(constant(0.2)),
        "x.rate is 0.1 in the checkpoint and 0.2 now",
    ),
    "methods": (
        MatchRms(0.1).__call__,
        MatchRms(0.2).__call__,
        "x.self.rms is 0.1 in the checkpoint and 0.2 now",
    ),
}


@pytest.mark.parametrize(("saved", "now", "line"), PAIRS.values(), ids=PAIRS)
def test_functions_that_differ_in_what_they_hold_are_told_apart(saved, now, line):
    before, after = (
        json.loads(json.dumps(checkpoint.describe({}, {"x": f}))) for f in (saved, now)
    )
    with pytest.raises(ValueError, match=re.escape(line)):
        checkpoint.check(before, after)
    checkpoint.check(before, before)
    checkpoint.check(after, checkpoint.describe({}, {"x": now}))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda step: 0.1, "which has no name of its own and closes over nothing"),
        (calling(object()), "settings hold <object object"),
        (Rate(0.1).at, "settings hold <"),
    ],
    ids=["a lambda", "a closure", "a method"],
)
def test_functions_that_cannot_be_described_are_refused(function, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.describe({}, {"x": function})


OLDER = {
    "match_rms": (
        "optax_muon.transforms.scale.match_rms.<locals>.<lambda>",
        match_rms(0.9),
        keller_scale(),
    ),
    "schedule": (
        "optax.schedules._schedule.cosine_decay_schedule.<locals>.schedule",
        optax.cosine_decay_schedule(1.0, 5),
        optax.linear_schedule(1.0, 0.1, 5),
    ),
    "callable dataclass": ({"of": 1.0}, Half(1.0), Half(2.0)),
    "in a list": ([{"of": 1.0}, 3], (Half(1.0), 3), (Half(1.0), 4)),
    "in a mapping": (
        {"a": {"of": 1.0}, "b": 2},
        {"a": Half(1.0), "b": 2},
        {"a": Half(1.0), "b": 3},
    ),
    "partial": (
        {"function": "optax.schedules._schedule.constant_schedule", "arguments": [], "value": 1.0},
        functools.partial(optax.constant_schedule, value=1.0),
        functools.partial(optax.constant_schedule, value=2.0),
    ),
}
"""What older code saved, a setting that it may have come from, and one that it did not."""


@pytest.mark.parametrize(("saved", "same", "other"), OLDER.values(), ids=OLDER)
def test_what_older_code_saved_is_compared_as_far_as_it_goes(saved, same, other):
    older = {"leaves": {}, "trained_by": {}, "settings": {"x": saved}}
    checkpoint.check(older, checkpoint.describe({}, {"x": same}))
    with pytest.raises(ValueError, match="does not fit what is to be restored"):
        checkpoint.check(older, checkpoint.describe({}, {"x": other}))


@pytest.mark.parametrize("saved", [None, {}, [], {"leaves": {}}], ids=str)
def test_what_is_no_description_is_refused(saved):
    with pytest.raises(ValueError, match="The checkpoint: saved is not a description; give one"):
        checkpoint.check(saved, checkpoint.describe({}))
    with pytest.raises(ValueError, match="The checkpoint: new is not a description; give one"):
        checkpoint.check(checkpoint.describe({}), saved)


# ---- paths ---------------------------------------------------------------------------------------


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path / "file", {"params": jnp.ones(2)})
    assert (tmp_path / "file").read_text() == "text"
    with pytest.raises(ValueError, match="file cannot be read"):
        checkpoint.restore(tmp_path / "file", {"params": jnp.ones(2)})


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="cannot be read; files are missing or damaged"):
        checkpoint.restore(tmp_path, {"params": jnp.ones(2)})
    assert list(tmp_path.iterdir()) == []
