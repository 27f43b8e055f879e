"""The step that is compiled for TPU pods, on eight CPU devices in toy size, and how it is read."""

import collections
import dataclasses
import functools
import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from chips import chips
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon import hlo
from optax_muon.models import spec
from optax_muon.models.moe import experts
from optax_muon.models.moonlight.model import CONFIGS
from optax_muon.training.optimizers import transformation
from optax_muon.training.state import abstract

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="benchmarks are not part of a source archive"
)
AXES = {"fsdp": 2, "expert": 4}
SEQUENCES, PARTS = 16, 2
CONFIG = dataclasses.replace(
    CONFIGS["moonlight-tiny"],
    context=64,
    query_block=16,
    vocab_size=320,
    num_hidden_layers=2,
    first_k_dense_replace=0,
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("moonlight_step")


@functools.cache
def compiled():
    """A step's mesh, config and program."""
    script = importlib.import_module("moonlight_step")  # a fixture has put it on the path
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Explicit,) * 2)
    config = script.config_of(CONFIG, SEQUENCES)
    return mesh, config, script.compile_step(config, mesh, PARTS)


@pytest.mark.slow
def test_a_device_holds_its_share_of_the_state_and_gives_it_back_in_place(script):
    mesh, config, program = compiled()
    model, tx = spec.model(config.model), transformation(script.MUON, config)
    with jax.set_mesh(mesh):
        state = abstract(model, tx, mesh)
    share = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    memory = program.memory_analysis()
    tokens = SEQUENCES // 8 * (CONFIG.context + 1) * 4
    assert memory.argument_size_in_bytes == share + tokens + 4  # and the rate of the biases
    assert memory.alias_size_in_bytes == share
    # A parameter and its momentum are eight bytes an eighth; norms are in copies.
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert share < 1.4 * whole


@pytest.mark.slow
@pytest.mark.usefixtures("script")
def test_tokens_go_to_experts_and_no_device_gathers_a_layers_experts_or_tokens():
    *_, program = compiled()
    of_layers = [
        each
        for each in hlo.collectives(program.as_text())
        if each.times % (PARTS * CONFIG.num_moe_layers) == 0
    ]
    stack = CONFIG.n_routed_experts * CONFIG.hidden_size * CONFIG.moe_intermediate_size * 4
    gathered = max(each.bytes for each in of_layers if each.kind == "all-gather")
    assert gathered == stack // AXES["expert"], "a quarter of the experts"
    tokens = SEQUENCES // PARTS // 8 * CONFIG.context
    held = CONFIG.n_routed_experts // AXES["expert"]
    rows = experts.rows_of_pair(tokens, CONFIG.num_experts_per_tok, CONFIG.n_routed_experts, held)
    assert rows < tokens
    sent = max(each.bytes for each in of_layers if each.kind == "all-to-all")
    assert sent == AXES["expert"] * rows * CONFIG.hidden_size * 4


@pytest.mark.slow
@pytest.mark.usefixtures("script")
def test_nothing_is_exchanged_in_the_loops_inside_a_layer():
    """Over blocks of queries, of which a layer has four, and of rows, of which devices differ."""
    *_, program = compiled()
    found = hlo.collectives(program.as_text())
    assert max(each.times for each in found) == PARTS * CONFIG.num_moe_layers


@pytest.mark.slow
def test_the_table_says_what_the_program_does(script, monkeypatch):
    mesh, config, program = compiled()
    found = script.measures(program, config, mesh, PARTS)
    text = program.as_text()
    even = functools.partial(script.even_trips, 1)
    kinds = collections.Counter()
    for each in hlo.collectives(text, even):
        kinds[each.kind] += each.times
    moved = sum(each.bytes * each.times for each in hlo.collectives(text, even))
    assert found["all_gather"] == kinds.pop("all-gather") > 0
    assert found["all_to_all"] == kinds.pop("all-to-all") > 0
    assert found["reduce_scatter"] == kinds.pop("reduce-scatter") > 0
    assert found["all_reduce"] + found["others"] == sum(kinds.values())
    total = sum(found[kind.replace("-", "_") + "_mib"] for kind in script.KINDS)
    assert total == pytest.approx(moved / 2**20, abs=0.3)
    assert moved < hlo.collective_bytes(text), "which counts a further round"
    row = script.CompiledStep(
        **script.known_fields(script.CASES["v5e 16x16"]), outcome="compiled", **found
    )
    refused = script.CompiledStep(
        **script.known_fields(script.CASES["v5p 4x4x4"]), outcome="out of memory"
    )
    row = dataclasses.replace(row, tflop=100.0, hbm_gib=15.75)
    monkeypatch.setattr("_topologies.versions", lambda: "libtpu may be absent")
    page = script.page([refused, row])
    assert "|  | v5p 4x4x4 | v5e 16x16 |" in page
    assert "| outcome | out of memory | compiled |" in page
    assert f"| all-to-alls |  | {found['all_to_all']}, " in page


def test_experts_take_as_many_blocks_of_rows_as_an_even_choice_needs(script):
    mesh = jax.sharding.AbstractMesh((16, 16), ("fsdp", "expert"))
    config = script.config_of(CONFIGS["moonlight-16b-a3b"], 2048)
    # A sequence of each device and 6 experts of each token, wherever they are: 49152 rows.
    assert script.expert_blocks(config, mesh, 8) * experts.BLOCK == 8192 * 6
    assert script.expert_blocks(config, mesh, 4) * experts.BLOCK == 2 * 8192 * 6


# A product of four pairs of matrices; of all sixteen pairs, summed along diagonals; of rows and
# each one's matrix.
HLO = """\
ENTRY %main () -> bf16[4,8,16] {
  %x = bf16[4,8,32]{2,1,0} parameter(0)
  %w = bf16[4,32,16]{2,1,0} parameter(1)
  %rows = bf16[64,32]{1,0} parameter(2)
  %sizes = s32[4]{0} parameter(3)
  %a = bf16[4,8,16] convolution(%x, %w), window={size=4 stride=3 lhs_dilate=4}, LABELS
  %b = bf16[7,8,16] convolution(%x, %w), window={size=4 pad=3_3 rhs_reversal=1}, LABELS
  %c = bf16[64,16]{1,0} custom-call(%sizes, %rows, %w), metadata={op_name="ragged-dot-none"}
}
""".replace("LABELS", "dim_labels=0bf_0io->0bf")


BATCHED = 2 * 4 * 8 * 32 * 16


@pytest.mark.parametrize(
    ("name", "flops"), [("a", BATCHED), ("b", 4 * BATCHED), ("c", 2 * 64 * 32 * 16)]
)
def test_operations_of_a_tpu_program_are_those_of_its_products(name, flops):
    others = [each for each in "abc" if each != name]
    lines = [line for line in HLO.splitlines() if not any(f"%{o} =" in line for o in others)]
    assert hlo.flops("\n".join(lines)) == flops


@pytest.mark.slow
@pytest.mark.libtpu
def test_operations_of_a_tpu_program_are_those_that_xla_counts():
    chip = chips("v5e:2x4", {"x": 8}).devices[:1]
    here = NamedSharding(Mesh(chip, ("x",)), P())

    def given(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def step(x, w, y, rows, stack, sizes):
        heads = jnp.einsum("bqhd,bkhd->bhqk", y, y)
        return x @ w, heads, jax.lax.ragged_dot(rows, stack, sizes)

    program = (
        jax.jit(step)
        .lower(
            *(given(256, 512), given(512, 384), given(2, 256, 4, 128), given(1024, 256)),
            *(given(4, 256, 512), given(4, dtype=jnp.int32)),
        )
        .compile({"xla_tpu_enable_ragged_dot_kernel": True})
    )
    products = 2 * (256 * 512 * 384 + 2 * 4 * 256 * 256 * 128 + 1024 * 256 * 512)
    assert hlo.flops(program.as_text()) == products
    assert program.cost_analysis()["flops"] == pytest.approx(products, rel=0.02)
