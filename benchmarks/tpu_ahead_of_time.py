"""Compile a whole Muon update for TPU pods that we do not own, and read the compiled program.

libtpu compiles for any TPU on any computer, and the compiled program tells the collectives, their
bytes and dtypes, the temporary memory and the operations of a device. Nothing runs, so step times
are unknown; the compiler's cycle estimates are its model. It gets `optax_muon.compiler_options`.
A collective that nothing overlaps is said to block; its exposed time, at the link rate of the
planner, is what the cycles under it do not cover. The update is that of the optimizer and
`apply_updates`, on float32 parameters, gradients and momenta; parameters and state are donated.
optax-muon runs on Explicit mesh axes; optax.contrib.muon does not trace there, and gets Auto axes
with the same shardings.

    pip install -e '.[tpu]' && python benchmarks/tpu_ahead_of_time.py

Every row is compiled in a process of its own with a time limit. Rows that are already in the table
are kept: delete a line of results/tpu_ahead_of_time.csv to compile it again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _jax
import _topologies
import jax
import optax
from _topologies import MACHINES, Machine
from jax.sharding import AxisType, Mesh

import optax_muon
from optax_muon import CostModel
from optax_muon.hlo import Collective
from optax_muon.models import abstract, spec

TABLE = Path(__file__).parent / "results" / "tpu_ahead_of_time.csv"
PAGE = TABLE.with_suffix(".md")
LIMIT = 240
"""Seconds of processor time that a row may take."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """A model's parameters, and the two mesh axes that they are sharded over."""

    make: Callable[[], Any]
    axes: tuple[str, str]
    extents: dict[int, tuple[int, int]]
    """Devices along the axes, by chips of a slice."""

    def mesh_axes(self, machine: Machine) -> dict[str, int]:
        """The axes of a slice and their devices."""
        return dict(zip(self.axes, self.extents[machine.chips], strict=True))


def _params(name: str, **changes: int) -> abstract.Tree:
    """The parameters of a model, layers stacked, as shapes and mesh axes."""
    return spec.model(dataclasses.replace(spec.named_configs()[name], **changes)).abstract_params


_LLAMA = {16: (4, 4), 64: (16, 4), 256: (32, 8), 512: (64, 8)}
TREES = {
    "Llama 3 8B": Tree(
        lambda: abstract.unstacked(_params("llama3-8b"), "layers"), ("fsdp", "tensor"), _LLAMA
    ),
    "Llama 3 8B, scanned": Tree(
        functools.partial(_params, "llama3-8b"), ("fsdp", "tensor"), _LLAMA
    ),
    "Moonlight 16B": Tree(
        functools.partial(_params, "moonlight-16b-a3b"),
        ("expert", "fsdp"),
        {16: (4, 4), 64: (16, 4), 256: (16, 16), 512: (64, 8)},
    ),
}
# So small that a test compiles it: tests/sharding/test_blocked_moves.py.
TREES["4 layers of Llama 3 1B, scanned"] = Tree(
    functools.partial(_params, "llama3-1b", num_hidden_layers=4), ("fsdp", "tensor"), {8: (4, 2)}
)
OPTIMIZERS = ("optax-muon", "optax.contrib.muon")


@dataclasses.dataclass(frozen=True)
class CompiledUpdate:
    """One update of one tree on one machine; per device, and 0 where nothing compiled."""

    optimizer: str
    tree: str
    machine: str
    mesh: str
    outcome: str
    """`compiled`, or the reason why not."""
    all_to_all: int = 0
    """All-to-alls that an update runs, counted in every iteration of a loop."""
    all_gather: int = 0
    all_reduce: int = 0
    others: int = 0
    """Collectives of other kinds, permutes and reduce-scatters."""
    collective_mib: float = 0.0
    """Result bytes of all collectives."""
    planned_mib: float = 0.0
    """The same as optax-muon's plan states it."""
    payload: str = ""
    """Dtypes of all-to-alls and all-gathers."""
    dcn: int = 0
    """Transfers between slices."""
    temporary_gib: float = 0.0
    """Memory besides parameters, gradients and state."""
    gflop: float = 0.0
    """Operations as XLA counts them, those of a loop once."""
    planned_gflop: float = 0.0
    """Operations as optax-muon's plan counts them: the orthogonalizations alone."""
    balanced_gflop: float = 0.0
    """Operations per chip if all orthogonalizations were spread evenly over a slice."""
    compile_s: float = 0.0
    """Seconds of processor time, on the computer that compiled it."""
    hlo_mb: float = 0.0
    """Length of the program's text."""
    products_mcycles: float = 0.0
    """Million cycles of products, as the compiler estimates them; 0 in rows of before."""
    rest_mcycles: float = 0.0
    """Million cycles of everything else."""
    limit_mcycles: float = 0.0
    """Million cycles of the planned products at the peak of the matrix units."""
    blocked: int = 0
    """Collectives under which nothing is computed."""
    blocked_mib: float = 0.0
    """Result bytes of those."""
    exposed_ms: float = 0.0
    """Time of messages that no cycles cover, at the planner's link rate."""
    planned_products_ms: float = 0.0
    """Time of the products as the plan models it."""
    planned_exposed_ms: float = 0.0
    """The same of the messages that nothing hides."""
    planned_passes_ms: float = 0.0
    """The same of passes over whole arrays."""

    @property
    def over_limit(self) -> float:
        """All cycles and the exposed messages, over the limit of the products."""
        limit_ms = self.limit_mcycles * 1e9 / MACHINES[self.machine].kind.clock
        return self.compiled_ms / limit_ms

    @property
    def compiled_ms(self) -> float:
        """Time of all cycles and the exposed messages."""
        cycles = self.products_mcycles + self.rest_mcycles
        return cycles * 1e9 / MACHINES[self.machine].kind.clock + self.exposed_ms

    @property
    def planned_ms(self) -> float:
        """The same as the plan models it."""
        return self.planned_products_ms + self.planned_passes_ms + self.planned_exposed_ms


def fill_table() -> None:
    """Compile the rows that are not in the table yet."""
    rows = _topologies.fill(
        TABLE,
        CompiledUpdate,
        cases(),
        lambda row: (row.optimizer, row.machine, row.tree),
        in_process,
    )
    PAGE.write_text(page(rows))


def cases() -> list[tuple[str, str, str]]:
    """Optimizer, machine and tree of every row."""
    return [
        (optimizer, machine, tree)
        for optimizer, machine, tree in itertools.product(OPTIMIZERS, MACHINES, TREES)
        if MACHINES[machine].chips in TREES[tree].extents
    ]


def in_process(optimizer: str, machine: str, tree: str) -> CompiledUpdate:
    """Compile a row in a process of its own."""
    found = _topologies.in_process(__file__, (tree, machine, optimizer), LIMIT)
    if isinstance(found, str):
        chips = MACHINES[machine]
        mesh = _topologies.in_words(chips, TREES[tree].mesh_axes(chips))
        return CompiledUpdate(optimizer, tree, machine, mesh, found)
    return CompiledUpdate(**found)


def compile_row(tree: str, machine: str, optimizer: str) -> CompiledUpdate:
    """Compile an update and read the program."""
    from optax_muon.hlo import collective_bytes, collective_counts, collectives, cycles

    ours = optimizer == "optax-muon"
    chips, axes = MACHINES[machine], TREES[tree].mesh_axes(MACHINES[machine])
    mesh = _topologies.mesh_of(chips, axes, AxisType.Explicit if ours else AxisType.Auto)
    params = abstract.on_mesh(TREES[tree].make(), mesh)
    # Types do not say which mesh axis crosses slices; these abstract arrays do.
    plan = optax_muon.plan(params)
    tx = optax_muon.muon(3e-4, plan=plan) if ours else _jax.contrib_muon(params)
    start = time.process_time()
    program = compile_update(tx, params, mesh)
    seconds = time.process_time() - start
    text = program.as_text()
    estimate = cycles(text)
    blocked = [each for each in collectives(text) if each.blocks]
    kinds = collective_counts(text)
    return CompiledUpdate(
        optimizer,
        tree,
        machine,
        _topologies.in_words(chips, axes),
        "compiled",
        *(kinds.pop(kind, 0) for kind in ("all-to-all", "all-gather", "all-reduce")),
        others=sum(kinds.values()),
        collective_mib=round(collective_bytes(text) / 2**20, 1),
        planned_mib=round(plan.cost.collective_bytes / 2**20, 1) if ours else 0,
        payload=payload(text),
        dcn=len(re.findall(r" send\(.*megascale", text)),
        temporary_gib=round(program.memory_analysis().temp_size_in_bytes / 2**30, 3),
        gflop=round(program.cost_analysis()["flops"] / 1e9, 1),
        planned_gflop=round(plan.cost.flops / 1e9, 1) if ours else 0,
        balanced_gflop=round(plan.balanced_flops / 1e9, 1),
        compile_s=round(seconds),
        hlo_mb=round(len(text) / 1e6, 2),
        products_mcycles=round(estimate.products / 1e6, 2),
        rest_mcycles=round(estimate.rest / 1e6, 2),
        limit_mcycles=round((plan.cost.flops if ours else 0) / chips.kind.flops_per_cycle / 1e6, 2),
        blocked=sum(each.times for each in blocked),
        blocked_mib=round(sum(each.bytes * each.times for each in blocked) / 2**20, 1),
        exposed_ms=round(sum(exposed_ms(each, chips, plan.model) for each in collectives(text)), 3),
        planned_products_ms=round(plan.product_seconds * 1e3, 3) if ours else 0,
        planned_exposed_ms=round(plan.exposed_seconds * 1e3, 3) if ours else 0,
        planned_passes_ms=round(plan.pass_seconds * 1e3, 3) if ours else 0,
    )


def exposed_ms(each: Collective, chips: Machine, model: CostModel) -> float:
    """Milliseconds of a collective that the work under it does not cover."""
    size = len(each.groups[0]) if each.groups else chips.chips
    share = 1.0 if each.kind == "collective-permute" else (size - 1) / size
    received = each.bytes * share * (2 if each.kind == "all-reduce" else 1)
    seconds = received / model.bandwidth
    return each.times * max(0.0, seconds - each.overlapped_cycles / chips.kind.clock) * 1e3


def compile_update(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Compile `tx` and `apply_updates`, parameters and state donated and sharded alike."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    state_shardings = optax_muon.state_shardings(tx, params, shardings)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(tx.init, params),
            state_shardings,
        )
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, state_shardings))
        options = optax_muon.compiler_options(mesh.devices.flat[0].device_kind)
        return jitted.lower(params, state, params).compile(compiler_options=options)


def payload(text: str) -> str:
    """Dtypes of what all-to-alls and all-gathers bring."""
    found = re.findall(r"= \(?(\w+)\[[^=]*? (?:all-to-all|all-gather)(?:-start)?\(", text)
    return " ".join(sorted(set(found)))


HEADS = (
    *("chips", "optimizer", "all-to-all", "all-gather", "all-reduce", "other", "MiB", "planned"),
    *("moved in", "between slices", "temporary GiB", "work", "compiled in", "HLO"),
    *("Mcycles of products", "rest", "limit", "blocked", "MiB blocked", "exposed ms"),
    *("over the limit", "planned ms", "planned over compiled"),
)

INTRODUCTION = """\
Made by `benchmarks/tpu_ahead_of_time.py`, which says what is compiled; all numbers are in the CSV
next to this file. Per chip and update: number of collectives, counted in every iteration of a loop;
MiB of their results, in the program and in optax-muon's plan; dtypes of all-to-alls and
all-gathers; transfers between slices; memory besides parameters, gradients and state; operations
over a balanced share of all orthogonalizations among the chips of a slice (for optax-muon as
planned; for optax.contrib.muon as XLA counts them, with loops counted once); processor seconds of
compilation; size of the program's text; million cycles of products and of everything else by the
compiler's model, and at the peak of the matrix units; collectives under which nothing is computed
and their MiB; milliseconds of messages that no cycles cover, at the planner's link rate; all cycles
and the exposed messages over the limit; milliseconds of an update in optax-muon's plan, and over
those of the cycles and the exposed messages. Rows without cycles were compiled without
`compiler_options`. Where there are fewer matrices than chips, optax-muon sums Gram matrices and
gathers rows of Gram matrices that several chips compute together."""


def page(rows: Sequence[CompiledUpdate]) -> str:
    """The Markdown page."""
    title = "# One Muon update, compiled ahead of time for TPUs"
    lines = [title, "", INTRODUCTION, "", _topologies.versions()]
    for tree in TREES:
        lines += [
            "",
            f"## {tree}",
            "",
            _topologies.line(HEADS),
            _topologies.line("---" for _ in HEADS),
        ]
        lines += [
            _topologies.line(cells(row))
            for machine, optimizer in itertools.product(MACHINES, OPTIMIZERS)
            for row in rows
            if (row.tree, row.machine, row.optimizer) == (tree, machine, optimizer)
        ]
    return "\n".join(lines) + "\n"


def cells(row: CompiledUpdate) -> tuple[str, ...]:
    """The cells of a row."""
    chips = f"{row.machine}: {row.mesh}"
    if row.outcome != "compiled":
        return (chips, row.optimizer, row.outcome, *[""] * (len(HEADS) - 3))
    work = (row.planned_gflop or row.gflop) / row.balanced_gflop
    return (
        chips,
        row.optimizer,
        *(str(n) for n in (row.all_to_all, row.all_gather, row.all_reduce, row.others)),
        f"{row.collective_mib:.0f}",
        f"{row.planned_mib:.0f}" if row.planned_mib else "",
        row.payload,
        str(row.dcn),
        f"{row.temporary_gib:.2f}",
        f"{work:.2f}",
        f"{row.compile_s:.0f} s",
        f"{row.hlo_mb:.1f} MB",
        *estimates(row),
    )


def estimates(row: CompiledUpdate) -> tuple[str, ...]:
    """The cells of what the compiler estimates; empty in rows of before."""
    if not row.products_mcycles:
        return ("",) * 9
    return (
        *(f"{n:.1f}" for n in (row.products_mcycles, row.rest_mcycles)),
        f"{row.limit_mcycles:.1f}" if row.limit_mcycles else "",
        str(row.blocked),
        f"{row.blocked_mib:.0f}",
        f"{row.exposed_ms:.2f}",
        f"{row.over_limit:.2f}" if row.limit_mcycles else "",
        f"{row.planned_ms:.1f}" if row.planned_passes_ms else "",
        f"{row.planned_ms / row.compiled_ms:.2f}" if row.planned_passes_ms else "",
    )


if __name__ == "__main__":
    _topologies.main(sys.argv[1:], compile_row, fill_table)
