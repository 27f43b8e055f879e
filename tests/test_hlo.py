"""What the other tests count, counted in programs whose collectives are known."""

import math

import jax
import jax.numpy as jnp
import pytest
from chips import chips
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_muon.hlo import (
    Collective,
    Cycles,
    collective_bytes,
    collective_counts,
    collectives,
    cycles,
    flops,
)

BOTH = P("a", "b")


def text_of(work, *, x=BOTH, out=BOTH):
    """The compiled program of `work` on shards of float32 [8, 8] on a 4 x 2 mesh."""
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = jax.sharding.NamedSharding(mesh, x)
    array = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
    mapped = jax.shard_map(work, mesh=mesh, in_specs=x, out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(array).compile().as_text()


def test_a_collective_has_a_kind_a_size_and_groups():
    [found] = collectives(text_of(lambda x: lax.psum(x, "a"), out=P(None, "b")))
    assert found == Collective("all-reduce", 2 * 4 * 4, 1, ((0, 2, 4, 6), (1, 3, 5, 7)))


def test_the_parts_of_a_tuple_are_summed():
    rows = P(("a", "b"), None)
    text = text_of(lambda x: lax.all_to_all(x, ("a", "b"), 1, 1, tiled=True), x=rows, out=rows)
    assert [(each.kind, each.bytes) for each in collectives(text)] == [("all-to-all", 8 * 4)]


TYPES = {
    "pred": 8, "s8": 8, "u16": 16, "bf16": 16, "f16": 16, "f32": 32, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e5m2": 8, "f8e8m0fnu": 8, "f8e3m4": 8,
    "f4e2m1fn": 4, "s4": 4, "u4": 4, "s2": 2, "u2": 2,
}  # fmt: skip
"""Bits of an entry, as the names of the types say."""


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("lengths", "entries"), [("8,3", 24), ("7", 7), ("", 1)])
def test_entries_of_every_type_have_its_bits(kind, lengths, entries):
    text = f"""HloModule step

ENTRY %main (p: {kind}[{lengths}]) -> {kind}[{lengths}] {{
  %p = {kind}[{lengths}] parameter(0)
  ROOT %moved = {kind}[{lengths}] collective-permute(%p), source_target_pairs={{{{0,1}}}}
}}
"""
    assert collective_bytes(text) == math.ceil(entries * TYPES[kind] / 8)


def test_a_collective_in_a_loop_counts_every_iteration():
    def loop(x):
        return lax.fori_loop(0, 3, lambda _, y: lax.ppermute(y, "b", [(0, 1), (1, 0)]), x)

    text = text_of(lambda x: lax.map(loop, x))
    assert collective_counts(text) == {"collective-permute": 2 * 3}
    assert collective_bytes(text) == 2 * 3 * 4 * 4


ASYNCHRONOUS = """
%wrapped (p: f32[4]) -> f32[8] {
  ROOT %all-to-all = f32[8]{0} all-to-all(%p), replica_groups=[2,4]<=[4,2]T(1,0)
}

ENTRY %main (p: f32[4]) -> f32[8] {
  %s = (f32[4]{0}, bf16[8]{0}) all-gather-start(%p), replica_groups={{0,1},{2,3}}
  %d = bf16[8]{0} all-gather-done(%s)
  %a = ((f32[4]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%wrapped
  ROOT %b = f32[8]{0} async-done(%a), calls=%wrapped
}
"""


def test_asynchronous_collectives_count_once():
    assert [(c.kind, c.bytes) for c in collectives(ASYNCHRONOUS)] == [
        ("all-gather", 16),
        ("all-to-all", 32),
    ]


ON_SPARSECORES = """
%gather (p: f32[4]) -> f32[8] {
  ROOT %all-gather = f32[8]{0} all-gather(%p), replica_groups={{0,1},{2,3}}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[4]) -> f32[8] {
  %s = ((), (), s32[2]) custom-call-start(), called_computations={%gather}
  %u = ((f32[4]), f32[8], s32[2]) custom-call-update(%s, %p)
  %y = f32[4]{0} dot(%p, %p), backend_config={"estimated_cycles":"700"}
  ROOT %d = f32[8]{0} custom-call-done(%u)
}
"""


def test_a_collective_on_the_sparsecores_counts_and_hides_behind_products():
    groups = ((0, 1), (2, 3))
    assert collectives(ON_SPARSECORES) == [Collective("all-gather", 32, 1, groups, 700)]


def test_groups_written_as_a_formula_are_read():
    assert collectives(ASYNCHRONOUS)[1].groups == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_products_in_a_loop_count_every_iteration():
    def products(x, y):
        return lax.map(lambda one: jnp.einsum("mk,nk->mn", one, y), x)

    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 4, 16), (8, 16)))
    assert flops(jax.jit(products).lower(x, y).compile().as_text()) == 5 * 2 * 4 * 8 * 16


@pytest.mark.parametrize("read", [collectives, cycles, flops, collective_bytes, collective_counts])
@pytest.mark.parametrize("text", ["", "module @jit_f {\n  func.func public @main() {\n  }\n}"])
def test_a_text_that_is_not_a_compiled_program_is_refused(read, text):
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read(text)


def test_a_loop_that_depends_on_data_counts_as_often_as_it_is_told():
    def work(x):
        with jax.named_scope("powers"):
            return lax.while_loop(lambda y: jnp.sum(y) < 1, lambda y: y @ x, x)

    text = jax.jit(work).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    assert flops(text, loop_trips=7) == 7 * flops(text) == 7 * 2 * 8**3
    assert flops(text, lambda op_name: 5 if "powers" in op_name else 0) == 5 * 2 * 8**3


TPU = """
%square (p: bf16[8,8]) -> f32[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %product = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"9999"}
}

%negate (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %minus = f32[8,8]{1,0} negate(%p)
}

%gathering (p: bf16[8,8]) -> (f32[8,8], bf16[16,8]) {
  %p = bf16[8,8]{1,0} parameter(0)
  %product = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
  %part = bf16[16,8]{1,0} all-gather(%p), frontend_attributes={chain_id="7"}
  ROOT %both = (f32[8,8]{1,0}, bf16[16,8]{1,0}) tuple(%product, %part)
}

%once (s: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %s = (s32[], bf16[8,8]) parameter(0)
  %x = bf16[8,8]{1,0} get-tuple-element(%s), index=1
  %sent = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) all-to-all-start(%x), replica_groups={{0,1}}
  %worked = f32[8,8]{1,0} fusion(%x), calls=%square, backend_config={"estimated_cycles":"100"}
  %arrived = bf16[8,8]{1,0} all-to-all-done(%sent)
  ROOT %t = (s32[], bf16[8,8]) tuple(%i, %arrived)
}

%more (s: (s32[], bf16[8,8])) -> pred[] {
  %s = (s32[], bf16[8,8]) parameter(0)
  %end = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: bf16[8,8]) -> f32[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %now = bf16[8,8]{1,0} all-to-all(%x), replica_groups={{0,1}}
  %early = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) all-to-all-start(%x), replica_groups={{0,1}}
  %loop = (s32[], bf16[8,8]) while(%t), condition=%more, body=%once
  %late = bf16[8,8]{1,0} all-to-all-done(%early)
  %idle = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) all-to-all-start(%x), replica_groups={{0,1}}
  %waited = bf16[8,8]{1,0} all-to-all-done(%idle)
  %first = (f32[8,8], bf16[16,8]) fusion(%x), calls=%gathering, backend_config={"estimated_cycles":"40"}
  %second = (f32[8,8], bf16[16,8]) fusion(%x), calls=%gathering, backend_config={"estimated_cycles":"50"}
  ROOT %y = f32[8,8]{1,0} fusion(%z), calls=%negate, backend_config={"estimated_cycles":"20"}
}
"""  # noqa: E501
"""What libtpu writes, shortened: loops have no trip count, and fusions hold the estimates."""


def test_cycles_are_summed_over_loops_and_not_again_within_fusions():
    assert cycles(TPU) == Cycles(products=3 * 100 + 40 + 50, rest=20)
    assert cycles(TPU).total == 410


def test_a_collective_blocks_unless_work_is_done_between_its_start_and_its_end():
    assert [(c.kind, c.times, c.overlapped_cycles, c.blocks) for c in collectives(TPU)] == [
        ("all-to-all", 1, 0, True),
        ("all-to-all", 3, 100, False),
        ("all-to-all", 1, 300, False),
        ("all-to-all", 1, 0, True),
        ("all-gather", 1, 90, False),
    ]


def test_what_an_asynchronous_computation_runs_is_hidden_by_what_is_done_meanwhile():
    work = '  %w = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"30"}\n'
    text = ASYNCHRONOUS.replace("  ROOT %b", work + "  ROOT %b")
    assert [c.overlapped_cycles for c in collectives(text)] == [0, 30]


@pytest.mark.libtpu
def test_the_compiler_for_tpus_estimates_a_large_product_near_its_limit():
    """A v5p has eight arrays of 128 x 128: 262,144 operations per cycle."""
    mesh = chips("v5p:2x2x1", {"x": 4})
    sharding = jax.sharding.NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=sharding)

    def three_times(x):
        return lax.fori_loop(0, 3, lambda _, y: y @ x, x)

    text = jax.jit(three_times).lower(x).compile().as_text()
    found = cycles(text)
    limit = flops(text) / 262_144
    assert flops(text) == 3 * 2 * 4096**3
    assert limit < found.products < 1.5 * limit
    assert found.rest < 0.5 * limit
