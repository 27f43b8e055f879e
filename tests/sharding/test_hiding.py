"""What travels while a device computes: what a platform's row says, and what libtpu does."""

import jax
import jax.numpy as jnp
import meshes
import pytest
from chips import chips
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.hlo import collectives
from optax_muon.platforms import KINDS, get_device

FREE = {"model": meshes.FREE_MESSAGES}
SMALL = meshes.layers(4, (64, 128), P("fsdp"))
LAYOUTS = {
    "home": meshes.case({"fsdp": 4, "replica": 2}, SMALL, layout="home"),
    "copies": meshes.case({"data": 8}, meshes.layers(4, (64, 128), P())),
    "fours": meshes.case({"fsdp": 4}, meshes.layers(1, (64, 128), P("fsdp")), **FREE),
    "swapping fours": meshes.case(
        {"fsdp": 4}, meshes.layers(1, (64, 128), P("fsdp")), platform="TPU v5", **FREE
    ),
    "pairs": meshes.case({"fsdp": 8}, meshes.layers(4, (128, 256), P("fsdp"))),
    "gathered": meshes.case({"fsdp": 8}, SMALL, layout="gather"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_names_the_collectives_that_its_program_has(name):
    case = LAYOUTS[name]
    traffic = case.plan().cost.traffic
    named = {
        kind
        for part in (traffic.inward, traffic.working, traffic.outward)
        for kind, received in part.by_collective.items()
        if received
    }
    # The largest entry and the norm of a shared matrix are scalars, and are not counted.
    found = {each.kind for each in collectives(meshes.run(case, "explicit").text) if each.bytes > 8}
    assert named == found


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_a_device_hides_is_counted_as_hidden(kind, name):
    device = get_device(kind)
    for bucket in LAYOUTS[name].plan().buckets:
        for assignment in bucket.assignments:
            traffic, hidden = assignment.cost.traffic, assignment.can_hide(device)
            for purpose in ("inward", "working", "outward"):
                received = getattr(traffic, purpose).by_collective
                expected = {k: n if k in device.hides else 0 for k, n in received.items()}
                assert getattr(hidden, purpose).by_collective == expected


TOPOLOGIES = {
    "TPU v2": "v2:2x2",
    "TPU v3": "v3:2x2",
    "TPU v4": "v4:2x2x2",
    "TPU v5 lite": "v5e:2x4",
    "TPU v5": "v5p:2x2x2",
    "TPU v6 lite": "v6e:2x4",
    "TPU7x": "tpu7x:2x2x1",
}
"""Eight devices of each kind of TPU."""
COLLECTIVES = {
    "all-to-all": lambda x: lax.all_to_all(x, ("a", "b"), 0, 0, tiled=True),
    "all-gather": lambda x: lax.all_gather(x[: x.shape[0] // 8], ("a", "b"), tiled=True),
    "all-reduce": lambda x: lax.psum(x, ("a", "b")),
    "collective-permute": lambda x: lax.ppermute(x, "b", [(0, 1), (1, 0)]),
}


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_the_compiler_hides_what_the_row_of_a_kind_says(kind, collective):
    mesh = chips(TOPOLOGIES[kind], {"a": 4, "b": 2}, AxisType.Explicit)
    device = mesh.devices.flat[0]
    assert device.device_kind == kind
    over = P(("a", "b"))

    def work(x, w):
        arrived = COLLECTIVES[collective](x)
        for _ in range(3):
            w = lax.optimization_barrier(w @ w)
        return arrived, w @ arrived[: len(w)]

    mapped = jax.shard_map(
        work, mesh=mesh, in_specs=(over, P()), out_specs=(over, P()), check_vma=False
    )
    x, w = (
        jax.ShapeDtypeStruct((n, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for n, spec in ((8 * 2048, over), (2048, P()))
    )
    options = optax_muon.compiler_options(device)
    text = jax.jit(mapped).lower(x, w).compile(compiler_options=options).as_text()
    [found] = collectives(text)
    assert found.kind == collective
    assert found.blocks == (collective not in get_device(kind).hides)
