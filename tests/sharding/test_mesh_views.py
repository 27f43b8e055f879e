"""However a parameter is read as matrices and however it is cut, a mesh gives what one device does.

Small matrices. Where the cost model would not share such, it is told that messages are free.
"""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import FREE_MESSAGES, case, layers

from optax_muon import Split, View, gram_newton_schulz, orthogonalize
from optax_muon.hlo import collective_bytes, collective_counts, collectives

WHOLE, STACKED = View(0, 1), View(1, 2)
GRID = {"fsdp": 4, "tensor": 2}

FSDP = {"fsdp": 8}
BOTH = P("fsdp", "tensor")


def fused(length, split):
    """A kernel whose columns are several matrices, cut on both axes."""
    return {"k": ((64, length), BOTH, View(0, 1, split))}


def squares_and_others():
    return {
        "square": ((64, 64), BOTH, WHOLE),
        "tall": ((96, 64), P("tensor", "fsdp"), WHOLE),
        "transposed": ((64, 64), P("tensor", "fsdp"), WHOLE),
        "wide": ((64, 96), BOTH, WHOLE),
    }


HOMES = {
    "heads of a sharded axis": (GRID, fused(256, Split.equal(1, 256, parts=4))),
    "gate and up": (GRID, fused(256, Split.equal(1, 256, parts=2))),
    "unequal parts of a sharded axis": (GRID, fused(384, Split(1, (256, 64, 64)))),
    "parts of heads in groups": (GRID, fused(192, Split(1, (32, 8, 8), groups=4))),
    "layers in the middle": (GRID, {"k": ((64, 6, 96), P("fsdp", None, "tensor"), View(0, 2))}),
    "a convolution": (
        GRID,
        {"k": ((3, 3, 16, 64), P(None, None, "tensor", "fsdp"), View((0, 1, 2), 3))},
    ),
    "layers of a sharded stack": (GRID, {"k": ((8, 64, 96), P("fsdp", None, "tensor"), STACKED)}),
    "experts and layers": (
        {"expert": 2, "fsdp": 2, "tensor": 2},
        {"k": ((4, 3, 64, 96), P("expert", None, "fsdp", "tensor"), View(2, 3))},
    ),
    "tall, wide and square": (GRID, squares_and_others()),
    "one axis cut twice": (GRID, layers(3, (64, 96), P(("fsdp", "tensor"), None))),
    "minor axis first": (GRID, layers(9, (64, 96), P(("tensor", "fsdp"), None))),
    "copies over one axis": (GRID, layers(5, (64, 96), P(None, "tensor"))),
    "merged rows of which one is cut": (
        GRID,
        {"k": ((4, 16, 96), P(None, "fsdp", "tensor"), View((0, 1), 2))},
    ),
}
HOME = {name: case(*each, layout="home") for name, each in HOMES.items()}
"""Parameters whose matrices go home whole, or are whole already."""

SPLITS = {
    "rows, by columns": (FSDP, layers(3, (64, 128), P("fsdp", None))),
    "columns as they lie": (FSDP, layers(1, (64, 128), P(None, "fsdp"))),
    "part of an axis": (FSDP, layers(2, (64, 128), P("fsdp", None))),
    "both axes": (GRID, layers(3, (64, 128), BOTH)),
    "copies": (GRID, layers(3, (64, 128), P())),
    "copies of rows": (GRID, layers(3, (64, 128), P("fsdp", None))),
    "rows that do not divide": (FSDP, layers(1, (60, 128), P(None, "fsdp"))),
}
SPLIT = {name: case(*each, model=FREE_MESSAGES) for name, each in SPLITS.items()}
"""Parameters that are shared by columns if messages cost nothing."""

GATHERED = (
    "unequal parts of a sharded axis",
    "tall, wide and square",
    "copies of rows",
    "both axes",
)
GATHER = {f"gather {name}": case(*(HOMES | SPLITS)[name], layout="gather") for name in GATHERED}
"""Some of them, by the paper's Algorithm 1."""

CASES = HOME | SPLIT | GATHER
FEW = ("unequal parts of a sharded axis", "tall, wide and square", "both axes", "gather both axes")
RUNS = [(name, "explicit") for name in CASES] + [
    (name, kind) for name in FEW for kind in ("auto", "mixed")
]


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_the_updates_are_those_of_one_device(name, kind):
    case = CASES[name]
    error = meshes.error(meshes.run(case, kind).matrices, meshes.alone_of(case))
    # Shared matrices are summed in pieces, in float32.
    assert error <= (1e-4 if name in SPLIT else 1e-5)


@pytest.mark.parametrize("name", HOME)
def test_whole_matrices_need_all_to_alls_and_one_gather_of_copies(name):
    found = collective_counts(meshes.run(HOME[name], "explicit").text)
    copies = any(
        role.holds == "copies"
        for bucket_plan in HOME[name].plan().buckets
        for assignment in bucket_plan.assignments
        for role in assignment.roles
    )
    assert found.keys() <= {"all-to-all", *(["all-gather"] if copies else [])}


@pytest.mark.parametrize("name", SPLIT)
def test_shared_matrices_are_what_the_test_means_them_to_be(name):
    assert "split" in {
        assignment.layout
        for bucket_plan in SPLIT[name].plan().buckets
        for assignment in bucket_plan.assignments
    }


@pytest.mark.parametrize("name", GATHER)
def test_gathering_needs_one_gather_per_bucket_and_two_all_to_alls_per_fused_axis(name):
    planned = GATHER[name].plan()
    gathers = sum(
        bool(assignment.roles)
        for bucket_plan in planned.buckets
        for assignment in bucket_plan.assignments
    )
    reshards = 2 * sum(leaf.reshard is not None for leaf in planned.leaves)
    expected = {"all-gather": gathers, "all-to-all": reshards}
    found = collective_counts(meshes.run(GATHER[name], "explicit").text)
    assert found == {kind: count for kind, count in expected.items() if count}


def test_parts_travel_with_their_own_all_to_all_where_an_axis_is_fused():
    found = collectives(meshes.run(HOME["unequal parts of a sharded axis"], "explicit").text)
    pairs = [each for each in found if len(each.groups[0]) == 2]
    assert len(pairs) == 2  # makes the fused axis whole, over tensor, and cuts it again


# Chunks


def deep(memory, **options):
    leaves = {"k": ((64, 64, 128), P(None, "fsdp"), STACKED)}
    return case(FSDP, leaves, memory=memory, **options)


def test_chunks_change_no_update_and_need_less_memory():
    free, tight = (meshes.run(deep(memory), "explicit") for memory in (2**30, 2**18))
    assert deep(2**18).plan().buckets[0].assignments[0].chunks > 1
    np.testing.assert_array_equal(tight.matrices["k"], free.matrices["k"])
    assert tight.temporary < 0.75 * free.temporary


@pytest.mark.parametrize("memory", [2**19, 2**18])  # two chunks on a device, and more
def test_chunks_in_a_pipeline_change_no_update_and_move_no_more(memory):
    waiting = deep(memory, platform="TPU v2", layout="home")
    piped = deep(memory, platform="TPU v5", layout="home")
    [assignment] = piped.plan().buckets[0].assignments
    assert assignment.pipelined
    assert not waiting.plan().buckets[0].assignments[0].pipelined
    found, others = (meshes.run(each, "explicit") for each in (piped, waiting))
    np.testing.assert_array_equal(found.matrices["k"], others.matrices["k"])
    assert collective_counts(found.text) == collective_counts(others.text)
    assert collective_counts(found.text) == {"all-to-all": 2 * assignment.chunks}
    assert collective_bytes(found.text) == collective_bytes(others.text)


@pytest.mark.parametrize("layout", ["home", "gather"])
def test_chunks_move_as_many_bytes(layout):
    case = deep(2**18, layout=layout)
    found = collectives(meshes.run(case, "explicit").text)
    assert sum(each.bytes * each.times for each in found) == case.plan().cost.collective_bytes
    assert meshes.error(meshes.run(case, "explicit").matrices, meshes.alone_of(case)) <= 1e-5


def test_the_program_does_not_grow_with_depth():
    shallow, twice = (
        meshes.run(
            case({"fsdp": 8}, layers(n, (16, 32), P("fsdp", None)), layout="home"), "explicit"
        )
        for n in (24, 96)  # three and twelve on a device, which works in two batches
    )
    assert twice.text.count(" dot(") == shallow.text.count(" dot(")
    assert collective_counts(twice.text) == collective_counts(shallow.text) == {"all-to-all": 2}


# Shards of unequal length: possible on Auto axes, inside a program


def test_shards_of_unequal_length_are_filled_up_with_zeros_that_nothing_sees():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=meshes.AXES["auto"][:1])
    spec = {"k": jax.sharding.NamedSharding(mesh, P(None, None, "fsdp"))}
    gradient = {"k": np.random.default_rng(0).standard_normal((3, 60, 100), np.float32)}
    link = orthogonalize(views=STACKED, shardings=spec)
    alone = orthogonalize(views=STACKED)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda g: link.update(g, ())[0])(gradient)
    truth = jax.jit(lambda g: alone.update(g, ())[0])(gradient)
    assert meshes.error(found, jax.tree.map(np.asarray, truth)) <= 1e-5


# Numbers and orthogonalizers


def on_a_mesh(link, gradient):
    """An update of stacked matrices cut by rows and by columns."""
    sharding = jax.sharding.NamedSharding(jax.make_mesh((4, 2), ("a", "b")), P(None, "a", "b"))
    return jax.jit(lambda g: link.update(g, ())[0])(jax.device_put(gradient, sharding))


@pytest.mark.parametrize("dtype", [np.complex64, jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept_and_complex_matrices_stay_complex(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 32, 64)) + (1j if dtype == np.complex64 else 0) * rng.normal(
        size=(8, 32, 64)
    )
    gradient = {"k": jnp.asarray(x.astype(dtype))}
    link = orthogonalize(views=STACKED)
    alone = jax.jit(lambda g: link.update(g, ())[0])(gradient)
    found = on_a_mesh(link, gradient)
    assert found["k"].dtype == alone["k"].dtype == dtype
    wide = jax.tree.map(lambda x: np.asarray(x).astype(np.complex64), (found, alone))
    assert meshes.error(*wide) <= 2 * float(jnp.finfo(dtype).eps) + 1e-6


def test_an_orthogonalizer_without_columns_gets_whole_matrices():
    seen = []

    def watch(x):
        seen.append(x.shape)
        return gram_newton_schulz(x)

    gradient = {"k": np.random.default_rng(0).standard_normal((3, 32, 64), np.float32)}
    on_a_mesh(orthogonalize(watch, views=STACKED), gradient)
    assert {shape[1:] for shape in seen} == {(32, 64)}


def test_zero_gradients_have_zero_updates():
    gradient = {"k": np.zeros((3, 32, 64), np.float32)}
    assert not np.asarray(on_a_mesh(orthogonalize(views=STACKED), gradient)["k"]).any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_gradients_does_not_matter_where_columns_are_shared(scale):
    case = SPLIT["both axes"]
    link = orthogonalize(views=case.views, plan=case.plan())
    given = {path: (scale * x).astype(np.float32) for path, x in meshes.gradients_of(case).items()}
    update = jax.jit(lambda g: link.update(g, ())[0])
    found = update(jax.device_put(given, case.shardings("explicit")))
    assert meshes.error(found, meshes.alone_of(case)) <= 1e-4
