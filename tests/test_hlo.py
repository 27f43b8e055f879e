"""What the other tests count, counted in programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_muon.hlo import Collective, collective_bytes, collective_counts, collectives, flops

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


def test_groups_written_as_a_formula_are_read():
    assert collectives(ASYNCHRONOUS)[1].groups == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_products_in_a_loop_count_every_iteration():
    def products(x, y):
        return lax.map(lambda one: jnp.einsum("mk,nk->mn", one, y), x)

    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 4, 16), (8, 16)))
    assert flops(jax.jit(products).lower(x, y).compile().as_text()) == 5 * 2 * 4 * 8 * 16


@pytest.mark.parametrize("read", [collectives, flops, collective_bytes, collective_counts])
@pytest.mark.parametrize("text", ["", "module @jit_f {\n  func.func public @main() {\n  }\n}"])
def test_a_text_that_is_not_a_compiled_program_is_refused(read, text):
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read(text)


def test_a_loop_that_depends_on_data_counts_as_often_as_it_is_told():
    def work(x):
        return lax.while_loop(lambda y: jnp.sum(y) < 1, lambda y: y @ x, x)

    text = jax.jit(work).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    assert flops(text, loop_trips=7) == 7 * flops(text) == 7 * 2 * 8**3
