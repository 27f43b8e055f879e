"""What becomes of the updates on TPUs: libtpu compiles them ahead of time, none of them runs."""

import re

import jax
import jax.numpy as jnp
import pytest
from chips import chips
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import FREE_MESSAGES

import optax_muon
from optax_muon.hlo import collective_bytes, collective_counts

pytestmark = [pytest.mark.slow, pytest.mark.libtpu]

V5E = "v5e:2x4"
"""Eight TPU v5e chips, or as many a slice."""
MIB = 2**20


def compiled(mesh, count, shape, **options):
    """The plan of a stack of matrices, and their orthogonalization as a program."""
    sharding = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    stack = {
        "layers": {"q_proj": jax.ShapeDtypeStruct((count, *shape), jnp.float32, sharding=sharding)}
    }
    plan = optax_muon.plan(stack, **options)
    link = optax_muon.orthogonalize(plan=plan)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x: link.update(x, link.init(None))[0]).lower(stack).compile()
    return plan, program


def dtypes(text, kind):
    return set(re.findall(rf"= \(?(\w+)\[[^=]* {kind}\(", text))


def test_whole_matrices_take_two_all_to_alls_of_bfloat16():
    plan, program = compiled(chips(V5E, {"fsdp": 4, "tensor": 2}), 16, (512, 1024))
    text = program.as_text()
    assert collective_counts(text) == {"all-to-all": 2}
    assert dtypes(text, "all-to-all") == {"bf16"}
    # Two trips of a device's share: 16 x 512 x 1024 / 8 in two bytes each.
    assert collective_bytes(text) == plan.cost.collective_bytes == 4 * MIB


# The plain form makes A^2 by rows and gathers them; the Gram form only sums over the columns.
@pytest.mark.parametrize(
    ("shape", "form", "swapped"),
    [((1536, 2048), "plain", {"bf16", "f32"}), ((512, 1024), "Gram 3", {"f32"})],
)
def test_a_remainder_shared_by_pieces_of_an_axis_moves_the_planned_bytes(shape, form, swapped):
    mesh = chips(V5E, {"fsdp": 8, "tensor": 1})
    plan, program = compiled(mesh, 12, shape, model=FREE_MESSAGES)
    assignments = plan.buckets[0].assignments
    assert [
        (assignment.layout, assignment.homes, assignment.sharing) for assignment in assignments
    ] == [
        ("home", 8, 1),
        ("split", 4, 2),
    ]
    assert assignments[1].form == form
    text = program.as_text()
    assert dtypes(text, "all-to-all") == {"bf16"}
    assert dtypes(text, "collective-permute-start") == swapped
    assert collective_bytes(text) == pytest.approx(plan.cost.collective_bytes, rel=0.02)


def test_a_device_does_its_even_share_and_holds_little():
    plan, program = compiled(chips(V5E, {"fsdp": 4, "tensor": 2}), 8, (2048, 8192))
    assert program.cost_analysis()["flops"] <= 1.02 * plan.balanced_flops
    # A matrix is 32 MiB in bfloat16, its Gram matrix 16 in float32: the matrix before and after a
    # step and the Gram matrix twice make 96. Held to the end, the products of 5 steps made 480.
    assert program.memory_analysis().temp_size_in_bytes <= 128 * MIB


def test_what_is_done_in_chunks_moves_no_more():
    mesh = chips(V5E, {"fsdp": 4, "tensor": 2})
    at_once, _ = compiled(mesh, 32, (512, 1024))
    plan, program = compiled(mesh, 32, (512, 1024), memory=8 * MIB)
    [assignment] = plan.buckets[0].assignments
    assert assignment.chunks > 1
    assert collective_counts(program.as_text()) == {"all-to-all": 2 * assignment.chunks}
    assert collective_bytes(program.as_text()) == at_once.cost.collective_bytes


def test_nothing_crosses_slices():
    mesh = chips(V5E, {"slice": 2, "fsdp": 4, "tensor": 2}, slices=2)
    plan, program = compiled(mesh, 16, (512, 1024))
    text = program.as_text()
    assert plan.devices == 8
    assert collective_counts(text) == {"all-to-all": 2}
    assert "megascale" not in text


def test_a_tall_stack_is_transposed_in_bfloat16_alone():
    """Its bucket holds it transposed; parameters, gradients and momentum stay as they lie."""
    mesh = chips("v5p:2x2x2", {"fsdp": 4, "tensor": 2})
    wide, tall = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (
            ((8, 1024, 4096), P(None, "fsdp", "tensor")),
            ((8, 4096, 1024), P(None, "tensor", "fsdp")),
        )
    )
    params = {"layers": {"up_proj": {"kernel": wide}, "down_proj": {"kernel": tall}}}
    tx = optax_muon.muon(1e-3, plan=optax_muon.plan(params))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        step = jax.jit(lambda grads, state, params: tx.update(grads, state, params)[0])
        text = step.lower(params, state, params).compile().as_text()
    turned = re.findall(r"= (\w+)\[\d[^\]]*\]\S* copy\(", text)
    assert "bf16" in turned
    assert "f32" not in turned
