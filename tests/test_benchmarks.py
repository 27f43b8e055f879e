"""The scripts of benchmarks/ run from end to end in toy sizes; no test looks at their times."""

import csv
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import optax_muon
from optax_muon.matrices import assign, paths

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="benchmarks are not part of a source archive"
)
TIMED = {"case", "implementation", "lower_ms", "median_ms", "upper_ms", "rounds"}
COLUMNS = {
    "compile_time": TIMED | {"hlo_bytes", "over_optax", "over_shallowest"},
    "flops_and_bytes": {
        *("case", "implementation", "gflop", "over_plain", "mbyte", "over_least", "loops")
    },
    "orthogonalize_speed": TIMED | {"form", "gflops", "over_optax", "over_torch"},
    "share_of_step": TIMED | {"share", "over_adamw"},
    "update_speed": TIMED | {"ours_over", "ours_bfloat16_over"},
}


@pytest.fixture(autouse=True)
def as_users_run_them(monkeypatch):
    """Scripts import their neighbours; optax.contrib.muon does not run under strict promotion."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes half the time
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def bench():
    return importlib.import_module("_bench")


@pytest.fixture
def measured(bench, tmp_path):
    """Run a script in toy size and read its table."""

    def run(name, **options):
        script = importlib.import_module(name)
        script.main(bench.Options(quick=True, repeats=1, out=tmp_path, **options))
        with (tmp_path / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", COLUMNS)
def test_a_script_writes_its_table_page_and_picture(name, measured, tmp_path):
    rows = measured(name)
    assert set(rows[0]) == COLUMNS[name]
    assert len({row["implementation"] for row in rows}) > 1
    page = (tmp_path / f"{name}.md").read_text()
    assert all(row["case"].split()[0] in page for row in rows)
    assert f"jax {jax.__version__}" in page
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000


def test_what_is_measured_again_replaces_its_own_rows_only(bench, tmp_path):
    table = importlib.import_module("_table")

    @dataclasses.dataclass(frozen=True)
    class Row:
        case: "str"
        median_ms: "float"

    path = tmp_path / "some.csv"
    table.write(path, Row, [Row("a", 1.0), Row("b", 2.0), Row("b", 2.5), Row("gone", 3.0)])
    rows = bench.merged(path, Row, [Row("b", 4.0), Row("c", 5.0)], ["c", "b", "a"])
    assert rows == [Row("c", 5.0), Row("b", 4.0), Row("a", 1.0)]


def test_the_gpu_script_says_in_a_line_that_it_needs_one():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, BENCHMARKS / "gpu.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "gpu.py needs a GPU that jax sees; here it sees cpu only.\n"


def test_ratios_are_those_of_single_rounds(bench):
    times, other = bench.Times((1.0, 4.0, 9.0)), bench.Times((2.0, 2.0, 3.0))
    assert times.over(other) == 2
    assert times.quartiles == (2.5, 4, 6.5)
    assert times.milliseconds() == {"lower_ms": 2500, "median_ms": 4000, "upper_ms": 6500}


def test_all_implementations_take_the_same_first_step_on_matrices():
    pytest.importorskip("torch")
    ours, torch, trees = map(importlib.import_module, ("_jax", "_torch", "_trees"))
    params, grads = (trees.normal(trees.TOYS["toy"](), seed) for seed in (0, 1))
    views = assign.assign(params)

    def as_torch_holds_them(tree):
        """Every matrix [out, in] on its own."""
        for path, leaf in paths.named_leaves(tree).items():
            for stack in (
                () if views[path] is None else views[path].bind(leaf.shape).to_matrices(leaf)
            ):
                yield from np.asarray(stack).swapaxes(-1, -2)

    transformations = (optax_muon.muon(**ours.MUON), ours.contrib_muon(params))
    stepped = [as_torch_holds_them(ours.Update(tx, params, grads)()[0]) for tx in transformations]
    matrices = [p.detach().numpy() for p in torch.Update(params, grads, torch.float32).matrices]
    assert len(matrices) == 16
    for was, *now in zip(as_torch_holds_them(params), *stepped, matrices, strict=True):
        mine, *theirs = (each - was for each in now)
        assert np.linalg.norm(mine) > 1e-4 * np.linalg.norm(was)
        for other in theirs:
            # A step of 2e-4 on parameters of 1 has lost half its digits.
            assert np.linalg.norm(other - mine) < 2e-3 * np.linalg.norm(mine)


def test_the_committed_cycles_are_of_every_program_and_above_the_limit():
    script = importlib.import_module("tpu_cycles")
    rows = importlib.import_module("_table").read(script.TABLE, script.CompiledProduct)
    found = {(row.chip, row.case, row.implementation, row.options) for row in rows}
    assert found == set(script.cases())
    for row in rows:
        limits = script.limits(script.SHAPES[row.case], script.CHIPS[row.chip])
        assert (row.limit, row.least) == limits
        assert row.products + row.rest > row.limit


def test_the_limit_is_that_of_the_matrix_units():
    script = importlib.import_module("tpu_cycles")
    # 15 products of 4096 x 4096 x 4096; a v5p has 459 TFLOP/s at 1.75 GHz.
    limit, least = script.limits((4096, 4096), script.CHIPS["v5p"])
    assert limit == least == pytest.approx(15 * 2 * 4096**3 / 459e12 * 1.75e9, rel=2e-3)
