"""What orbax accepts by mistake is refused; a state is restored bit for bit on any mesh."""

import functools
import gc
import shutil

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import KELLER, YOU, View, checkpoint, muon, newton_schulz, state_shardings

ROWS = View(0, 1)
VIEWS = {
    "embed/embedding": None,
    "norm/scale": None,
    "layers/up_proj/kernel": ROWS,
    "layers/down_proj/kernel": ROWS,
    "experts/up_proj": View(1, 2),
}
SHAPES = {
    "embed": {"embedding": (16, 8)},
    "norm": {"scale": (8,)},
    "layers": {"up_proj": {"kernel": (8, 24)}, "down_proj": {"kernel": (24, 8)}},
    "experts": {"up_proj": (8, 8, 16)},
}
SETTINGS = {
    "beta": 0.95,
    "orthogonalizer": functools.partial(newton_schulz, coefficients=KELLER),
    "model": {"width": 8, "depth": 2},
}


def is_shape(x):
    return isinstance(x, tuple)


def host(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s).astype(dtype), SHAPES, is_leaf=is_shape)


@functools.partial(jax.jit, static_argnums=0)
def after_two_steps(tx, params):
    """Parameters and state after two steps."""
    state = tx.init(params)
    for step in range(2):
        grads = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": state}


@functools.cache
def items(path="norm/scale", view=None, mu_dtype=None):
    """A state after two steps, one parameter sent elsewhere if asked."""
    return after_two_steps(muon(1e-2, views=VIEWS | {path: view}, mu_dtype=mu_dtype), host(0))


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "state", items(), SETTINGS)
    return tmp_path / "state"


def refusal(path, like, settings=SETTINGS):
    with pytest.raises(ValueError) as error:
        checkpoint.restore(path, like, settings)
    return str(error.value).splitlines()


# ---- what orbax accepts --------------------------------------------------------------------------


# Older orbax warns where it restores without shardings, as this test does on purpose.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_restores_no_moments_of_a_leaf_that_changed_its_optimizer(saved):
    """The reason for descriptions: this passes silently and fails in a later step, if at all."""
    like = items("layers/up_proj/kernel", None)["opt_state"]
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(opt_state=ocp.args.StandardRestore(like))
        found = checkpointer.restore(saved, args=args)["opt_state"]
    adam = optax.tree.get(found, "ScaleByAdamState")
    assert adam.mu["layers"]["up_proj"]["kernel"] is None
    assert adam.nu["layers"]["up_proj"]["kernel"] is None


def test_orbax_alone_casts_moments(saved):
    like = items(mu_dtype=jnp.bfloat16)["opt_state"]
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(opt_state=ocp.args.StandardRestore(like))
        found = checkpointer.restore(saved, args=args)["opt_state"]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {"int32", "float32", "bfloat16"}


@pytest.mark.parametrize(
    ("view", "line"),
    [
        (None, "layers/up_proj/kernel was trained by Muon and is now trained by AdamW"),
        (ROWS, "embed/embedding was trained by AdamW and is now trained by Muon"),
    ],
)
def test_a_leaf_that_changes_its_optimizer_is_refused(view, line, saved):
    path = line.split()[0]
    assert refusal(saved, items(path, view)) == [
        f"{saved} does not fit what is to be restored:",
        f"  {line}",
    ]


def test_a_leaf_is_refused_under_wrappers_of_the_optimizer(tmp_path):
    def wrapped(views):
        tx = optax.inject_hyperparams(muon, static_args="views")(1e-2, views=views)
        chain = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), tx), 2)
        params = host(0)
        return {"params": params, "opt_state": jax.jit(chain.init)(params)}

    checkpoint.save(tmp_path / "state", wrapped(VIEWS))
    chex.assert_trees_all_equal(
        checkpoint.restore(tmp_path / "state", wrapped(VIEWS)), wrapped(VIEWS)
    )
    moved = VIEWS | {"layers/up_proj/kernel": None}
    assert refusal(tmp_path / "state", wrapped(moved), None)[1:] == [
        "  layers/up_proj/kernel was trained by Muon and is now trained by AdamW"
    ]


def test_another_optimizer_and_a_link_more_are_named(tmp_path):
    def chained(*links):
        params = {"embed": np.ones((4, 2), np.float32)}
        return {"params": params, "opt_state": optax.chain(*links).init(params)}

    checkpoint.save(tmp_path / "state", chained(optax.scale_by_adam()))
    assert refusal(tmp_path / "state", chained(optax.trace(0.9)), None)[1:] == [
        "  embed was trained by AdamW and is now trained by Trace",
        "  opt_state/0/count int32 [] is in the checkpoint and not in the new state",
    ]
    more = chained(optax.scale_by_adam(), optax.trace(0.9))
    assert refusal(tmp_path / "state", more, None)[1:] == [
        "  opt_state/1/trace/embed float32 [4, 2] is not in the checkpoint"
    ]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"beta": 0.9}, ["beta is 0.95 in the checkpoint and 0.9 now"]),
        (
            {"orthogonalizer": functools.partial(newton_schulz, coefficients=YOU)},
            # and its rows
            ["orthogonalizer.coefficients.name is keller in the checkpoint and you now"],
        ),
        (
            {"model": {"width": 8, "depth": 3, "heads": 2}},
            [
                "model.depth is 2 in the checkpoint and 3 now",
                "model.heads is absent in the checkpoint and 2 now",
            ],
        ),
    ],
)
def test_other_settings_are_refused(change, lines, saved):
    found = refusal(saved, items(), SETTINGS | change)
    assert {f"  {line}" for line in lines} <= set(found)
    assert all("coefficients" in line or line[2:] in lines for line in found[1:])


def test_other_dtypes_are_refused(saved):
    lines = refusal(saved, items(mu_dtype=jnp.bfloat16))
    assert len(lines) == 1 + 5  # every first moment; Adam's second ones stay float32
    assert lines[-1].endswith(
        "/mu/layers/up_proj/kernel is float32 [8, 24] in the checkpoint and bfloat16 [8, 24] now"
    )


def test_misshapen_missing_and_new_leaves_are_refused(saved):
    like = {**items()["params"], "norm": {"scale": jnp.ones(9), "bias": jnp.ones(8)}}
    del like["experts"]
    assert refusal(saved, {"params": like})[1:] == [
        "  params/experts/up_proj float32 [8, 8, 16] is in the checkpoint and not in the new state",
        "  params/norm/scale is float32 [8] in the checkpoint and float32 [9] now",
        "  params/norm/bias float32 [8] is not in the checkpoint",
    ]


def test_a_long_list_of_differences_is_cut(tmp_path):
    checkpoint.save(tmp_path / "state", {"params": {str(i): np.ones(2) for i in range(30)}})
    lines = refusal(tmp_path / "state", {"params": {str(i): np.ones(3) for i in range(30)}}, None)
    assert len(lines) == 22
    assert lines[-1] == "  and 10 more"


# ---- what is read back ---------------------------------------------------------------------------


class TrainState(flax.struct.PyTreeNode):
    """As users write it."""

    params: dict
    step: jax.Array


def test_items_of_every_kind_come_back_as_they_were(tmp_path):
    there = {
        **items(),
        "key": jax.random.key(3),
        "bias": jnp.arange(6.0).reshape(2, 3),
        "none": None,
        "empty": optax.EmptyState(),
        "other": TrainState({"w": jnp.ones((2, 2), jnp.bfloat16)}, jnp.asarray(7)),
    }
    checkpoint.save(tmp_path / "state", there, SETTINGS)
    found = checkpoint.restore(tmp_path / "state", there, SETTINGS)
    keys = [jax.random.key_data(tree.pop("key")) for tree in (found, there)]
    chex.assert_trees_all_equal(*keys)
    chex.assert_trees_all_equal(found, there)


def test_a_part_is_read_alone_and_settings_that_are_not_given_are_not_compared(saved):
    like = {"params": jax.eval_shape(lambda: items()["params"])}
    chex.assert_trees_all_equal(checkpoint.restore(saved, like), {"params": items()["params"]})


def test_settings_are_described_in_words_of_json():
    @flax.struct.dataclass
    class Config:
        width: int = 8

    found = checkpoint.describe(
        {}, {"dtype": np.dtype(jnp.bfloat16), "rows": np.eye(2), "f": newton_schulz, "c": Config()}
    )
    assert found["settings"] == {
        "dtype": "bfloat16",
        "rows": [[1, 0], [0, 1]],
        "f": "optax_muon.polar.newton_schulz.newton_schulz",
        "c": {"width": 8},
    }
    with pytest.raises(TypeError, match="settings hold <object"):
        checkpoint.describe({}, {"x": object()})


def test_an_item_called_as_the_description_is_refused(tmp_path):
    with pytest.raises(ValueError, match="called 'description'"):
        checkpoint.save(tmp_path / "state", {"description": np.ones(2)})


def test_a_manager_of_orbax_takes_the_arguments(tmp_path):
    like = items()
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, args=checkpoint.save_args(like, SETTINGS))
        manager.wait_until_finished()
        saved = manager.restore(5, args=checkpoint.description_args())["description"]
        checkpoint.check(saved, checkpoint.describe(like, SETTINGS))
        found = manager.restore(5, args=checkpoint.restore_args(like))
    chex.assert_trees_all_equal(checkpoint.restored_items(found, like), like)


# ---- meshes --------------------------------------------------------------------------------------

SPECS = {
    "fsdp": {
        "embed": {"embedding": P("fsdp")},
        "norm": {"scale": P()},
        "layers": {"up_proj": {"kernel": P("fsdp")}, "down_proj": {"kernel": P(None, "fsdp")}},
        "experts": {"up_proj": P(None, "fsdp")},
    },
    "expert": {
        "embed": {"embedding": P(None, "expert")},
        "norm": {"scale": P("expert")},
        "layers": {"up_proj": {"kernel": P()}, "down_proj": {"kernel": P("expert")}},
        "experts": {"up_proj": P("expert")},
    },
}


@functools.cache
def on_mesh(devices, axis, kind=AxisType.Explicit):
    """Shardings of the parameters over the one axis of a mesh of so many devices."""
    mesh = jax.make_mesh((devices,), (axis,), (kind,), devices=jax.devices()[:devices])
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), SPECS[axis], is_leaf=lambda s: isinstance(s, P)
    )


def like_on(tx, there):
    """What is to be restored, as shapes with shardings."""
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), SHAPES, is_leaf=is_shape)
    tree = {"params": shapes, "opt_state": jax.eval_shape(tx.init, shapes)}
    shardings = {"params": there, "opt_state": state_shardings(tx, shapes, there)}
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


@pytest.mark.parametrize(
    "way",
    [
        [(8, "fsdp"), (4, "fsdp"), (1, "fsdp")],
        [(1, "fsdp"), (4, "expert"), (8, "expert")],
        [(8, "fsdp"), (8, "expert"), (8, "fsdp")],
    ],
    ids=str,
)
def test_a_state_is_the_same_bit_for_bit_on_another_mesh(way, tmp_path):
    tx = muon(1e-2, views=VIEWS)
    expected = jax.tree.map(np.asarray, items())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like_on(tx, on_mesh(*way[0])))
    state = jax.device_put(expected, shardings)
    for stop, place in enumerate(way[1:]):
        checkpoint.save(tmp_path / str(stop), state, SETTINGS)
        state = checkpoint.restore(tmp_path / str(stop), like_on(tx, on_mesh(*place)), SETTINGS)
        chex.assert_trees_all_equal(state, expected)
        kernel, sharding = state["params"]["experts"], on_mesh(*place)["experts"]
        assert kernel["up_proj"].sharding == sharding["up_proj"]
        momentum = optax.tree.get(state["opt_state"], "MomentumState").mu["experts"]["up_proj"]
        assert momentum.sharding == sharding["up_proj"]


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda kind: kind.name)
def test_a_run_goes_on_bit_for_bit_on_its_mesh(kind, tmp_path):
    there = on_mesh(8, "fsdp", kind)
    tx = muon(1e-2, views=VIEWS, shardings=None if kind == AxisType.Explicit else there)
    like = like_on(tx, there)
    shardings = jax.tree.map(lambda x: x.sharding, like)

    @functools.partial(jax.jit, out_shardings=None if kind == AxisType.Explicit else shardings)
    def step(state):
        grads = jax.tree.map(jnp.cos, state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    params = jax.device_put(host(0), there)
    init = jax.jit(tx.init, out_shardings=shardings["opt_state"])
    state = step(step({"params": params, "opt_state": init(params)}))
    checkpoint.save(tmp_path / "state", state, SETTINGS)
    again = checkpoint.restore(tmp_path / "state", like, SETTINGS)
    chex.assert_trees_all_equal(step(step(again)), step(step(state)))


# ---- damage --------------------------------------------------------------------------------------


def files(path):
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["delete", "halve", "empty"])
def test_with_any_file_damaged_a_checkpoint_is_whole_or_refused(damage, tmp_path):
    """Never half: of some twenty files some are needed and some are not, and none is guessed."""
    expected, refused = {"params": {"up": np.arange(6000.0, dtype=np.float32)}}, 0
    checkpoint.save(tmp_path / "saved", expected, SETTINGS)
    for number, file in enumerate(files(tmp_path / "saved")):
        broken = tmp_path / str(number)
        shutil.copytree(tmp_path / "saved", broken)
        if damage == "delete":
            (broken / file).unlink()
        else:
            content = (broken / file).read_bytes()
            (broken / file).write_bytes(content[: len(content) // 2 if damage == "halve" else 0])
        try:
            chex.assert_trees_all_equal(checkpoint.restore(broken, expected, SETTINGS), expected)
        except ValueError as error:
            assert f"{broken} cannot be read; files are missing or damaged" in str(error)
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert refused >= 3  # the description, the manifest, the data
    gc.collect()  # what orbax leaves of its coroutines complains when it goes


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere cannot be read"):
        checkpoint.restore(tmp_path / "nowhere", items())
