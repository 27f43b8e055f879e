"""Compile whole training steps of Moonlight 16B-A3B for TPU pods, and read what the programs do.

A step is the paper's: 2048 sequences of 8192 tokens in micro-batches, bfloat16 products of float32
parameters, the mean gradient over the micro-batches clipped at a global norm of 1, Muon for every
matrix and AdamW for the rest, router biases updated by the load of their experts. Parameters,
momenta and biases are donated. It is the step of `training/step.py`, on Explicit mesh axes.

    pip install -e '.[train,tpu]' && python benchmarks/moonlight_step.py

Every row is compiled in a process of its own with a time limit. Rows that are in the table already
are kept: delete a line of results/moonlight_step.csv to compile it again.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _table
import _topologies
import jax
import jax.numpy as jnp
from _topologies import MACHINES
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon.models import spec
from optax_muon.models.abstract import on_mesh
from optax_muon.models.mesh import BATCH, present_axes
from optax_muon.models.moe import experts
from optax_muon.models.moonlight import CONFIGS, Moonlight, MoonlightConfig, count
from optax_muon.training import flops
from optax_muon.training.config import THREE_STAGE, TrainConfig
from optax_muon.training.optimizers import REGISTRY, HyperParams, Trial, transformation
from optax_muon.training.state import abstract, shardings
from optax_muon.training.step import step as training_step

TABLE = Path(__file__).parent / "results" / "moonlight_step.csv"
PAGE = TABLE.with_suffix(".md")
LIMIT = 1200
"""Seconds of processor time that a row may take."""
MUON = Trial(REGISTRY["muon"], HyperParams(4.2e-4, 0.1))
"""The paper's numbers (arXiv 2502.16982, section 3.3)."""
OPTIONS = {"xla_tpu_enable_ragged_dot_kernel": True}
"""For libtpu: without it, every chip but v5p multiplies every row with every expert it holds."""
SEQUENCES = 2048
STEPS = 175_834
"""Steps of the paper's 5.7T tokens; no size in the program depends on them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """How a step is divided over a machine."""

    machine: str
    axes: Mapping[str, int]
    """Mesh axes."""
    accumulate: int
    """Micro-batches."""
    hbm_gib: float
    """Memory of a chip, as libtpu states it when a program needs more."""
    saved: str
    """What a block saves for its backward pass, `MoonlightConfig.saved`."""


CASES = {
    case.machine: case
    for case in (
        Case("v5p 4x4x4", {"fsdp": 4, "expert": 16}, 8, 95.73, "rows"),
        Case("v5e 16x16", {"fsdp": 16, "expert": 16}, 8, 15.75, "attention"),
    )
}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """One step on one machine; per device unless stated otherwise, 0 where nothing compiled."""

    machine: str
    mesh: str
    sequences: int
    """In a step, on all devices."""
    tokens: int
    """In a step, on all devices."""
    accumulate: int
    """Micro-batches of a step."""
    outcome: str
    """`compiled`, which means that it fits, or the reason why not."""
    saved: str = "inputs"
    """What a block saves for its backward pass, `MoonlightConfig.saved`."""
    arguments_gib: float = 0.0
    """Memory of parameters, momenta, biases and tokens."""
    donated_gib: float = 0.0
    """The part of these that the results overwrite."""
    output_gib: float = 0.0
    """Memory of the results."""
    temporary_gib: float = 0.0
    """Peak memory of everything else."""
    total_gib: float = 0.0
    """Memory of all of these."""
    hbm_gib: float = 0.0
    """Memory of the chip."""
    tflop: float = 0.0
    """Operations of all compiled products, counted in every iteration of a loop."""
    model_tflop: float = 0.0
    """6 per token and parameter that multiplies it, head and attention scores included."""
    visible_tflop: float = 0.0
    """The same without the scores of keys after their query."""
    paper_tflop: float = 0.0
    """6 per token and active parameter, embedding and head left out, as the paper counts them."""
    optimizer_tflop: float = 0.0
    """Operations of the orthogonalizations, as planned."""
    optimizer_mib: float = 0.0
    """Result bytes of the optimizer's collectives, as planned."""
    all_gather: int = 0
    """Number of all-gathers, counted in every iteration of a loop."""
    all_gather_mib: float = 0.0
    """Bytes of their results."""
    all_reduce: int = 0
    all_reduce_mib: float = 0.0
    reduce_scatter: int = 0
    reduce_scatter_mib: float = 0.0
    all_to_all: int = 0
    all_to_all_mib: float = 0.0
    others: int = 0
    others_mib: float = 0.0
    compile_s: float = 0.0
    """Seconds of processor time, on the computer that compiled it."""
    hlo_mb: float = 0.0
    """Length of the program's text."""


def fill_table() -> None:
    """Compile the rows that are not in the table yet."""
    rows = _topologies.fill(
        TABLE,
        CompiledStep,
        ((machine,) for machine in CASES),
        lambda row: (row.machine,),
        in_process,
    )
    PAGE.write_text(page(rows))


def in_process(machine: str) -> CompiledStep:
    """Compile a row in a process of its own."""
    found = _topologies.in_process(__file__, [machine], LIMIT)
    if isinstance(found, str):
        return CompiledStep(**known_fields(CASES[machine]), outcome=found)
    return CompiledStep(**found)


def known_fields(case: Case) -> dict[str, Any]:
    """The fields of a row that are known before it is compiled."""
    return {
        "machine": case.machine,
        "mesh": _topologies.in_words(MACHINES[case.machine], case.axes),
        "sequences": SEQUENCES,
        "tokens": SEQUENCES * CONFIGS["moonlight-16b-a3b"].context,
        "accumulate": case.accumulate,
        "saved": case.saved,
    }


def compile_row(machine: str) -> CompiledStep:
    """Compile a step and read the program."""
    case = CASES[machine]
    mesh = _topologies.mesh_of(MACHINES[case.machine], case.axes, AxisType.Explicit)
    model = dataclasses.replace(CONFIGS["moonlight-16b-a3b"], saved=case.saved)
    config = config_of(model, SEQUENCES)
    start = time.process_time()
    program = compile_step(config, mesh, case.accumulate, OPTIONS)
    seconds = time.process_time() - start
    read = measures(program, config, mesh, case.accumulate)
    return CompiledStep(
        **known_fields(case),
        outcome="compiled",
        hbm_gib=case.hbm_gib,
        compile_s=round(seconds),
        **read,
    )


def config_of(config: MoonlightConfig, sequences: int) -> TrainConfig:
    """The paper's training, of a model of these sizes."""
    return TrainConfig(
        config, sequences, STEPS, 0, 100, sequences, THREE_STAGE, bias_update_speed=1e-3
    )


def compile_step(
    config: TrainConfig, mesh: Mesh, accumulate: int, options: Mapping[str, Any] | None = None
) -> Any:
    """Compile a training step with Muon from shapes alone; `options` go to the compiler."""
    model, tx = spec.model(config.model), transformation(MUON, config)
    with jax.set_mesh(mesh):
        shape = (accumulate, config.batch // accumulate, config.model.context + 1)
        over = NamedSharding(mesh, P(None, present_axes(BATCH)))
        step = jax.jit(
            functools.partial(training_step, model, tx, **MUON.numbers(1e-3)),
            donate_argnums=0,
            out_shardings=(shardings(model, tx, mesh), None),
        )
        return step.lower(
            abstract(model, tx, mesh),
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=over),
            jax.ShapeDtypeStruct((), jnp.float32),
        ).compile(dict(options or {}))


def measures(program: Any, config: TrainConfig, mesh: Mesh, accumulate: int) -> dict[str, Any]:
    """What a device holds, computes and receives in a step."""
    from optax_muon import hlo

    text, memory = program.as_text(), program.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }
    sizes["total"] = sum(sizes.values()) - 2 * sizes["donated"]
    plan = optax_muon.plan(on_mesh(Moonlight(config.model).abstract_params, mesh))
    tokens = config.batch * config.model.context / mesh.size
    own = config.batch * flops.sequence_flops(config) / mesh.size
    context = config.model.context
    masked = 6 * tokens * Moonlight(config.model).attended * (context - 1) / 2
    trips = functools.partial(even_trips, expert_blocks(config, mesh, accumulate))
    return {
        **{f"{name}_gib": round(size / 2**30, 3) for name, size in sizes.items()},
        "tflop": round(hlo.flops(text, trips) / 1e12, 1),
        "model_tflop": round(own / 1e12, 1),
        "visible_tflop": round((own - masked) / 1e12, 1),
        "paper_tflop": round(6 * count(config.model).active * tokens / 1e12, 1),
        "optimizer_tflop": round(plan.cost.flops / 1e12, 3),
        "optimizer_mib": round(plan.cost.collective_bytes / 2**20, 1),
        **received(text),
        "hlo_mb": round(len(text) / 1e6, 2),
    }


def expert_blocks(config: TrainConfig, mesh: Mesh, accumulate: int) -> int:
    """Blocks of rows for the experts of a device in a layer, if all are chosen equally often."""
    model = config.model
    rows = config.batch // accumulate * model.context * model.num_experts_per_tok // mesh.size
    return -(-rows // experts.BLOCK)


def even_trips(blocks: int, op_name: str) -> int:
    """Iterations of a loop if all experts are chosen equally often: no round is a further one."""
    return 0 if experts.FURTHER_ROUNDS in op_name else blocks


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "others")


def received(text: str) -> dict[str, Any]:
    """Collectives by kind: how many, and MiB of their results."""
    from optax_muon.hlo import collectives

    found = dict.fromkeys(KINDS, (0, 0))
    for each in collectives(text, functools.partial(even_trips, 1)):
        kind = each.kind if each.kind in KINDS else "others"
        times, size = found[kind]
        found[kind] = times + each.times, size + each.times * each.bytes
    names = {kind: kind.replace("-", "_") for kind in found}
    return {names[kind]: times for kind, (times, _) in found.items()} | {
        f"{names[kind]}_mib": round(size / 2**20, 1) for kind, (_, size) in found.items()
    }


INTRODUCTION = """\
Made by `benchmarks/moonlight_step.py`, which says what is compiled; the CSV next to this file has
the same numbers. Everything is per chip and step; a step has {tokens:.1f} million tokens on all
chips. Memory is the compiler's own analysis; it refuses a program that does not fit. Operations are
those of all products in the compiled program. A multiply-add counts as two, every iteration of a
loop counts, and the loops over blocks of rows and over rounds of the exchange run as often as if
all experts were chosen equally often. They include recomputation in the backward pass and the
optimizer, but of the masked attention scores only those of a block of queries with itself. The
model's own operations are 6 per token and parameter that multiplies it, and 6 per attention score
and feature, masked ones included, as is usual; the next line leaves those out. The optimizer's are
those of its orthogonalizations, as planned. Collectives are counted in every iteration of a loop;
MiB are those of their results.

The compiler gets `--xla_tpu_enable_ragged_dot_kernel=true`, the default on v5p; to train on v5e,
set it in `LIBTPU_INIT_ARGS`. Without it XLA multiplies all rows with all experts of the chip, four
here, instead of each row with its own expert."""


def page(rows: Sequence[CompiledStep]) -> str:
    """The Markdown page, a column for each machine."""
    tokens = SEQUENCES * CONFIGS["moonlight-16b-a3b"].context / 1e6
    title = "# One training step of Moonlight 16B-A3B, compiled ahead of time for TPUs"
    columns = [cells(row) for row in rows]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [title, "", INTRODUCTION.format(tokens=tokens), "", _topologies.versions(), ""]
    table = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return "\n".join([*lines, *_table.markdown(["", *(row.machine for row in rows)], table)]) + "\n"


SAVED_IN_WORDS = {
    "inputs": "inputs of blocks",
    "attention": "inputs of blocks, outputs of heads",
    "rows": "inputs of blocks, outputs of heads, rows of experts",
}


def cells(row: CompiledStep) -> dict[str, str]:
    """The cells of a row, by their names."""
    head = {
        "mesh": row.mesh,
        "micro-batches": f"{row.accumulate} of {row.sequences // row.accumulate} sequences",
        "saved for the backward pass": SAVED_IN_WORDS[row.saved],
        "outcome": row.outcome,
    }
    if row.outcome != "compiled":
        return head
    optimizer = row.optimizer_tflop / row.tflop
    kinds = {"all-gathers": "all_gather", "all-reduces": "all_reduce"}
    kinds |= {"reduce-scatters": "reduce_scatter", "all-to-alls": "all_to_all", "others": "others"}
    return head | {
        "parameters, momenta, biases, tokens": f"{row.arguments_gib:.2f} GiB",
        "results, in place of the former state": f"{row.output_gib:.2f} GiB",
        "temporary": f"{row.temporary_gib:.2f} GiB",
        "total": f"{row.total_gib:.2f} of {row.hbm_gib:.2f} GiB",
        "operations of all products": f"{row.tflop:.0f} Tflop",
        "the model's own": f"{row.model_tflop:.0f} Tflop, {row.model_tflop / row.tflop:.0%}",
        "without masked scores": f"{row.visible_tflop:.0f} Tflop,"
        f" {row.visible_tflop / row.tflop:.0%}",
        "6 N D of the paper's 2.24B active": f"{row.paper_tflop:.0f} Tflop",
        "the optimizer's": f"{row.optimizer_tflop:.2f} Tflop, {optimizer:.2%}",
        **{
            name: f"{getattr(row, kind)}, {getattr(row, f'{kind}_mib'):.0f} MiB"
            for name, kind in kinds.items()
        },
        "of all, the optimizer's as planned": f"{row.optimizer_mib:.0f} MiB",
        "compiled in": f"{row.compile_s:.0f} s",
        "program": f"{row.hlo_mb:.1f} MB",
    }


if __name__ == "__main__":
    _topologies.main(sys.argv[1:], compile_row, fill_table)
