"""Every wrong word about a mesh is answered by one sentence: where, what, and what would do."""

import re

import jax
import meshes
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import Split, View, muon, orthogonalize, plan

PARAMS = {
    "embed/embedding": jax.ShapeDtypeStruct((32, 16), np.float32),
    "o/kernel": jax.ShapeDtypeStruct((32, 64), np.float32),
    "q/kernel": jax.ShapeDtypeStruct((64, 32), np.float32),
}
VIEWS = {"embed/embedding": None, "o/kernel": View(0, 1), "q/kernel": View(0, 1)}
MESH = AbstractMesh((4, 2), ("fsdp", "tensor"))
OTHER = AbstractMesh((2, 4), ("fsdp", "tensor"))


def message(error, call, *args, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert re.fullmatch(r".*\.", text)
    return text


def refused(shardings, *, error=ValueError, params=PARAMS, views=VIEWS, **options):
    options = {"mesh": MESH, **options}
    return message(error, plan, params, views=views, shardings=shardings, **options)


def on_q(spec):
    """A spec for one kernel, and nothing special for the others."""
    return {path: P() for path in PARAMS} | {"q/kernel": spec}


def test_an_axis_that_the_mesh_lacks():
    text = refused(on_q(P("dp")))
    assert text == f"q/kernel: its spec {P('dp')} names the axis 'dp'; the mesh has fsdp, tensor."


def test_an_axis_used_twice():
    text = refused(on_q(P("fsdp", "fsdp")))
    assert text == f"q/kernel: its spec {P('fsdp', 'fsdp')} uses a mesh axis twice."


def test_a_spec_longer_than_the_rank():
    text = refused(on_q(P(None, None, "fsdp")))
    assert text.startswith("q/kernel of shape (64, 32) has 2 axes, but its spec ")
    assert text.endswith(" has 3 entries; give at most one entry per axis.")


def test_a_matrix_without_a_spec():
    shardings = {"embed/embedding": P(), "o/kernel": P()}
    assert refused(shardings) == (
        "shardings has no entry for 'q/kernel'; give it a NamedSharding or PartitionSpec."
    )


def test_a_parameter_that_is_no_matrix_needs_no_spec():
    plan(PARAMS, views=VIEWS, shardings={"o/kernel": P(), "q/kernel": P("fsdp")}, mesh=MESH)


def test_a_spec_for_a_parameter_that_does_not_exist():
    text = refused(on_q(P()) | {"k/kernel": P()})
    assert text.startswith("shardings['k/kernel'] matches no parameter; there are ")
    assert "'q/kernel'" in text


def test_a_spec_for_a_module_covers_its_parameters():
    found = plan(PARAMS, views=VIEWS, shardings={"o": P(), "q": P("fsdp")}, mesh=MESH)
    assert [leaf.spec for leaf in found.leaves] == [((), ()), (("fsdp",), ())]


def test_something_else_than_a_sharding():
    assert refused(on_q("fsdp"), error=TypeError) == (
        "the entry of shardings for 'q/kernel' is a str; it must be a NamedSharding or"
        " PartitionSpec."
    )


def test_a_spec_without_a_mesh():
    text = refused(on_q(P("fsdp")), mesh=None)
    assert text.startswith("the entry of shardings for 'q/kernel' is the bare ")
    assert "use NamedSharding, pass mesh=, or call under jax.set_mesh(mesh)." in text


def test_parameters_on_two_meshes():
    shardings = {path: NamedSharding(MESH, P()) for path in PARAMS}
    shardings["q/kernel"] = NamedSharding(OTHER, P())
    assert refused(shardings, mesh=None) == (
        "q/kernel lies on the mesh {'fsdp': 2, 'tensor': 4}, but o/kernel on"
        " {'fsdp': 4, 'tensor': 2}; put all parameters on one mesh."
    )


def test_parameters_on_another_mesh_than_named():
    assert refused(NamedSharding(MESH, P()), mesh=OTHER) == (
        "o/kernel lies on the mesh {'fsdp': 4, 'tensor': 2}, but the argument mesh on"
        " {'fsdp': 2, 'tensor': 4}; put all parameters on one mesh."
    )


def test_an_unknown_layout():
    assert refused(P(), layout="split") == (
        "layout 'split' is unknown; use 'home', 'gather', or None to choose."
    )


def test_a_view_of_axes_that_do_not_exist():
    text = refused(P(), views=VIEWS | {"q/kernel": View(0, 2)})
    assert text.startswith("q/kernel: ")
    assert "names axis 2, which the shape (64, 32) does not have." in text


def test_a_fused_axis_cut_across_its_parts_where_nothing_else_can_be_cut():
    params = {"qkv": jax.ShapeDtypeStruct((7, 12), np.float32)}
    views = {"qkv": View(0, 1, Split(1, (6, 3, 3)))}
    text = refused(P(None, "fsdp"), params=params, views=views)
    assert text.startswith("qkv: its fused axis is cut over ('fsdp',) across its parts")
    assert text.endswith("shard another axis instead.")


def test_a_fused_axis_cut_unevenly():
    params = {"qkv": jax.ShapeDtypeStruct((8, 10), np.float32)}
    views = {"qkv": View(0, 1, Split(1, (6, 2, 2)))}
    assert refused(P(None, "fsdp"), params=params, views=views) == (
        "qkv: its fused axis of 10 does not divide over ('fsdp',); shard it evenly."
    )


# A plan made for something else


def updates(params=PARAMS, spec=None, mesh=None):
    """Zero updates; on a mesh if one is given."""
    zeros = {path: np.zeros(x.shape, np.float32) for path, x in params.items()}
    return zeros if mesh is None else jax.device_put(zeros, NamedSharding(mesh, spec))


def unfit(plan, given, views=VIEWS):
    link = orthogonalize(views=views, plan=plan)
    return message(ValueError, jax.jit(lambda x: link.update(x, ())[0]), given)


def explicit():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=meshes.AXES["explicit"][:2])


def test_a_plan_for_another_shape():
    made = plan(PARAMS, views=VIEWS)
    other = PARAMS | {"q/kernel": jax.ShapeDtypeStruct((64, 48), np.float32)}
    assert unfit(made, updates(other)) == (
        "q/kernel has the shape (64, 48) read as 1 x (64 x 48), but the plan was made for the shape"
        " (64, 32) read as 1 x (64 x 32); plan again for these parameters and these views."
    )


def test_a_plan_for_other_views():
    made = plan(PARAMS, views=VIEWS)
    views = VIEWS | {"q/kernel": View(0, 1, Split.equal(1, 32, parts=2))}
    assert "read as 2 x (64 x 16), but the plan" in unfit(made, updates(), views)


def test_a_plan_that_lacks_a_matrix():
    made = plan(PARAMS, views=VIEWS | {"q/kernel": None})
    assert "but the plan was made for no matrices; plan again" in unfit(made, updates())


def test_a_plan_of_a_matrix_that_is_not_there():
    made = plan(PARAMS, views=VIEWS)
    few = {path: x for path, x in PARAMS.items() if path != "q/kernel"}
    views = {path: VIEWS[path] for path in few}
    assert unfit(made, updates(few), views).startswith("q/kernel has no matrices, but the plan")


def test_a_plan_for_other_shardings_on_explicit_axes():
    planned, found = P("fsdp", "tensor"), P("tensor", "fsdp")
    made = plan(PARAMS, views=VIEWS, shardings=NamedSharding(explicit(), planned))
    text = unfit(made, updates(spec=found, mesh=explicit()))
    assert text.startswith(f"o/kernel is sharded {found} on the Explicit axes")
    assert f"made for {planned}" in text


def test_the_whole_of_muon_passes_these_on():
    tx = muon(1e-3, views=VIEWS, shardings=on_q(P("dp")))
    params = updates()
    with jax.set_mesh(explicit()):
        text = message(ValueError, tx.update, params, tx.init(params), params)
    assert "q/kernel: its spec" in text
    assert "the mesh has fsdp, tensor." in text


def test_specs_of_all_parameters_serve_the_matrices_among_them():
    shardings = {path: NamedSharding(explicit(), P("fsdp", "tensor")) for path in PARAMS}
    tx = muon(1e-3, views=VIEWS, shardings=shardings)
    params = jax.device_put(updates(), shardings)
    found, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert {path: x.sharding for path, x in found.items()} == shardings
