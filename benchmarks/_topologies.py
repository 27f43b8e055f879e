"""Meshes of TPU chips that we do not own, and programs compiled for them in a child process."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import _table
from jax.sharding import AxisType, Mesh


class Compiled(Protocol):
    """A row of a table of compiled programs."""

    @property
    def outcome(self) -> str:
        """`compiled`, or the reason why not."""


Row = TypeVar("Row", bound=Compiled)

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # For chips.py, which the tests use as well.
    "PYTHONPATH": str(Path(__file__).parent.parent / "tests"),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a kind of TPU."""

    flops_per_cycle: int
    """Operations of all matrix units per cycle: 2 x units x rows x columns."""
    clock: float
    """Cycles per second."""

    @property
    def peak(self) -> float:
        """Operations per second of all matrix units."""
        return self.flops_per_cycle * self.clock


CHIPS = {
    "v4": Chip(2 * 8 * 128**2, 1.05e9),
    "v5p": Chip(2 * 8 * 128**2, 1.75e9),
    "v5e": Chip(2 * 4 * 128**2, 1.5e9),
    "v6e": Chip(2 * 4 * 256**2, 1.75e9),
    # A device is one of the chip's two cores; the clock is that of its published peak.
    "7x": Chip(2 * 4 * 256**2, 2.2e9),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """TPU chips, as libtpu names them."""

    topology: str
    chips: int
    """Number of chips of a slice."""
    kind: Chip
    """What each of them is."""
    slices: int = 1
    """Number of slices, joined by the data-center network; parameters are replicated over them."""


MACHINES = {
    "v5p 2x2x2": Machine("v5p:2x2x2", 8, CHIPS["v5p"]),
    "v5e 4x4": Machine("v5e:4x4", 16, CHIPS["v5e"]),
    "v5p 4x4x4": Machine("v5p:4x4x4", 64, CHIPS["v5p"]),
    "2 slices of v5e 8x8": Machine("v5e:8x8", 64, CHIPS["v5e"], slices=2),
    "v5e 16x16": Machine("v5e:16x16", 256, CHIPS["v5e"]),
    "v6e 16x16": Machine("v6e:16x16", 256, CHIPS["v6e"]),
    "v5p 8x8x8": Machine("v5p:8x8x8", 512, CHIPS["v5p"]),
}


def extents_of(machine: Machine, axes: Mapping[str, int]) -> dict[str, int]:
    """The mesh axes of all chips: `slice` first if there are several, then those of a slice."""
    return ({"slice": machine.slices} if machine.slices > 1 else {}) | dict(axes)


def mesh_of(machine: Machine, axes: Mapping[str, int], kind: AxisType) -> Mesh:
    """Arrange the machine's chips in a mesh with these axes within a slice."""
    from chips import chips

    return chips(machine.topology, extents_of(machine, axes), kind, machine.slices)


def in_words(machine: Machine, axes: Mapping[str, int]) -> str:
    """The mesh in words."""
    return " x ".join(f"{axis} {extent}" for axis, extent in extents_of(machine, axes).items())


def in_process(script: str, arguments: Sequence[str], seconds: int) -> dict[str, Any] | str:
    """Run a script in a process of its own and return its last line, which is JSON.

    Args:
        script: path of the script.
        arguments: its command line.
        seconds: processor time that it may take.

    Returns:
        What it printed, or the reason in words if it ran out of time or of the chips' memory.

    Raises:
        RuntimeError: it failed for any other reason.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds)),
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"not compiled in {seconds} s"
    if "exceeds available" in done.stderr or "CompileTimeHbmOom" in done.stderr:
        needs = re.search(r"Used ([\d.]+[GM]) of ([\d.]+[GM]) hbm", done.stderr)
        return "out of memory" + (f": needs {needs[1]} of {needs[2]}" if needs else "")
    raise RuntimeError(done.stderr)


def fill(
    table: Path,
    kind: type[Row],
    cases: Iterable[tuple[str, ...]],
    case_of: Callable[[Row], tuple[str, ...]],
    compile_case: Callable[..., Row],
) -> list[Row]:
    """Compile the rows that are not in a table yet, and save it after each.

    Args:
        table: the CSV file.
        kind: the dataclass of a row; its `outcome` is shown.
        cases: what the table is to have.
        case_of: the case of a row.
        compile_case: makes a row of a case.

    Returns:
        All rows.
    """
    rows = _table.read(table, kind)
    known = set(map(case_of, rows))
    for case in cases:
        if case not in known:
            row = compile_case(*case)
            print(f"{', '.join(case)}: {row.outcome}", flush=True)
            rows.append(row)
            _table.write(table, kind, rows)
    return rows


def main(arguments: Sequence[str], row: Callable[..., Any], fill_table: Callable[[], None]) -> None:
    """The command line of a script: fill its table, or print the row that arguments name."""
    if arguments:
        print(json.dumps(dataclasses.asdict(row(*arguments))))
    elif importlib.util.find_spec("libtpu") is None:
        print("libtpu is missing: pip install -e '.[tpu]'")
    else:
        fill_table()


def versions() -> str:
    """The versions that compiled the programs."""
    names = ("jax", "libtpu", "optax")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
