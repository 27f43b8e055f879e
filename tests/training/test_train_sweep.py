"""`optax-muon sweep`: equal budgets, one line per finished run, going on where it stopped."""

import collections
import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

from optax_muon.cli.main import main
from optax_muon.cli.reports import sweep as sweep_report
from optax_muon.training import sweep
from optax_muon.training.optimizers import HyperParams
from optax_muon.training.presets import PRESETS
from optax_muon.training.sweep import Point, SweepTable

pytestmark = pytest.mark.usefixtures("standard_promotion")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMMITTED = {"small": RESULTS / "sweep", "moonlight-tiny": RESULTS / "moonlight" / "sweep"}
POINTS = [
    Point("adamw", 1e-3, 0.1, 2.5),
    Point("adamw", 2e-3, 0.1, 2.25),
    Point("muon", 2e-3, 0.1, 2.0),
    Point("muon", 4e-3, 0.1),
]


def run(folder, *options):
    size = ["--preset", "tiny", "--steps", "12", "--data", str(folder / "text.txt")]
    main(["sweep", *size, "--out", str(folder / "sweep"), *options])
    return (folder / "sweep" / "sweep.csv").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweeps")
    (path / "text.txt").write_text("to be or not to be, that is the question\n" * 100)
    return path


def test_the_grid_is_every_rate_with_every_decay():
    rates = {"adamw": {"lr": (1.0, 2.0)}, "muon": {"lr": (3.0, 4.0)}}
    points = sweep.grid(rates, (0.1, 0.3))
    assert [(p.optimizer, p.lr, p.weight_decay) for p in points] == [
        ("adamw", 1.0, 0.1),
        ("adamw", 2.0, 0.1),
        ("adamw", 1.0, 0.3),
        ("adamw", 2.0, 0.3),
        ("muon", 3.0, 0.1),
        ("muon", 4.0, 0.1),
        ("muon", 3.0, 0.3),
        ("muon", 4.0, 0.3),
    ]


def test_seeds_repeat_every_point_and_the_lowest_mean_is_best():
    rates = {"muon": {"lr": (1.0, 2.0), "adamw_lr": (0.5,)}}
    points = sweep.grid(rates, (0.1,), seeds=(4, 5))
    assert [(p.lr, p.adamw_lr, p.seed) for p in points] == [
        (1.0, 0.5, 4),
        (2.0, 0.5, 4),
        (1.0, 0.5, 5),
        (2.0, 0.5, 5),
    ]
    assert {p.trial.hyper_params for p in points} == {
        HyperParams(1.0, 0.1, 0.5),
        HyperParams(2.0, 0.1, 0.5),
    }
    # A lucky seed of the first setting, and a better mean of the second one.
    losses = (1.0, 1.5, 3.0, 1.75)
    points = [dataclasses.replace(p, val_loss=loss) for p, loss in zip(points, losses, strict=True)]
    winner = sweep.best(points, "muon")
    assert (winner.first.lr, winner.losses) == (2.0, [1.5, 1.75])
    text = sweep_report.markdown(points, "tiny", "byte")
    # t of one degree of freedom is 12.706; the spread 0.1768, over the root of 2.
    assert "| Muon | 2, AdamW's 0.5 | 0.1 | **1.6250 ± 1.5883** |" in text
    assert (
        sweep.best([dataclasses.replace(points[0], val_loss=math.nan), points[2]], "muon") is None
    )


def test_unequal_budgets_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["sweep", "--set", "adamw.lr=1e-3", "muon.lr=1e-3,2e-3"])
    assert end.value.code == 2
    assert (
        "same budget, but the numbers of learning rates are 1 for adamw, 2 for muon"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_sweep_goes_on_with_the_points_that_are_missing(folder, capsys):
    first = run(folder, "--set", "adamw.lr=1e30", "muon.lr=1e-3", "--weight-decay", "0.1")
    both = ["--set", "adamw.lr=1e30,1e-3", "muon.lr=1e-3,4e-3", "--weight-decay", "0.1"]
    assert run(folder, *both).startswith(first)
    points = SweepTable(folder / "sweep" / "sweep.csv").read()
    assert [(p.optimizer, p.lr) for p in points] == [
        ("adamw", 1e30),
        ("muon", 1e-3),
        ("adamw", 1e-3),
        ("muon", 4e-3),
    ]
    assert [math.isfinite(p.val_loss) for p in points] == [False, True, True, True]
    assert (folder / "sweep" / "sweep.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as end:
        run(folder, *both, "--seed", "1")
    assert end.value.code == 2
    assert "training.seed is 0 in the checkpoint and 1 now" in capsys.readouterr().err


def test_points_survive_the_file(tmp_path):
    table = SweepTable(tmp_path / "sweep.csv")
    for point in POINTS:
        table.append(point)
    assert [repr(p) for p in table.read()] == [repr(p) for p in POINTS]  # NaN equals itself here


def test_the_report_marks_the_best_of_each_and_names_the_machine():
    text = sweep_report.markdown(POINTS, "tiny", "byte")
    assert "| AdamW | 0.001 | 0.1 | 2.5000 |" in text
    assert "| AdamW | 0.002 | 0.1 | **2.2500** |" in text
    assert "| Muon | 0.002 | 0.1 | **2.0000** |" in text
    assert "| Muon | 0.004 | 0.1 | diverged |" in text
    assert "Best Muon: lr 0.002, decay 0.1." in text
    assert f"jax {jax.__version__}" in text


def test_an_optimizer_that_always_diverged_has_no_best_point():
    assert sweep.best([Point("adamw", 1.0, 0.1)], "adamw") is None
    assert "Best Muon" not in sweep_report.markdown(POINTS[:2], "tiny", "byte")


@pytest.mark.skipif(not RESULTS.exists(), reason="results are not part of a source archive")
@pytest.mark.parametrize("name", COMMITTED)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_presets_run_at_the_committed_sweeps_best_inside_its_grid(name, optimizer):
    points = SweepTable(COMMITTED[name] / "sweep.csv").read()
    points = [point for point in points if point.optimizer == optimizer]
    winner = sweep.best(points, optimizer)
    lr, decay = winner.first.lr, winner.first.weight_decay
    row = PRESETS[name]
    assert row.hyper_params[optimizer] == winner.first.trial.hyper_params
    assert min(p.lr for p in points) < lr < max(p.lr for p in points)
    decays = {p.weight_decay for p in points}
    # Moonlight's decay was not swept, it is that of `small`.
    inside = min(decays) < decay < max(decays)
    assert (
        inside
        if len(decays) > 1
        else decays == {PRESETS["small"].hyper_params["muon"].weight_decay}
    )
    config = json.loads((COMMITTED[name] / "config.json").read_text())["training"]
    # Fields that the config got since have their defaults.
    assert type(row.model)(**config["model"]) == row.model
    assert (config["batch"], config["steps"]) == (row.batch, row.steps)


@pytest.mark.skipif(not RESULTS.exists(), reason="results are not part of a source archive")
@pytest.mark.parametrize("folder", COMMITTED.values(), ids=COMMITTED)
def test_the_committed_sweeps_gave_every_optimizer_the_same_budget(folder):
    counts = collections.Counter(p.optimizer for p in SweepTable(folder / "sweep.csv").read())
    assert {"adamw", "muon"} <= counts.keys()
    assert len(set(counts.values())) == 1
