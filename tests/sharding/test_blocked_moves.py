"""What an update waits for, in the program that libtpu schedules, held to the committed table."""

import importlib
from pathlib import Path

import jax
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.libtpu]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TREE, MACHINE = "4 layers of Llama 3 1B, scanned", "v5p 2x2x2"


def test_no_more_moves_block_than_in_the_committed_table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("tpu_ahead_of_time")
    rows = importlib.import_module("_table").read(script.TABLE, script.CompiledUpdate)
    ours = [row for row in rows if row.optimizer == "optax-muon"]
    [committed] = [row for row in ours if (row.tree, row.machine) == (TREE, MACHINE)]
    with jax.numpy_dtype_promotion("standard"):  # Flax's initializers promote.
        compiled = script.compile_row(TREE, MACHINE, "optax-muon")
    assert compiled.collective_mib == committed.collective_mib
    assert compiled.blocked <= committed.blocked
    assert compiled.blocked_mib <= committed.blocked_mib
