"""`optax-muon report`: repeated seeds are one curve with an interval, others are compared."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from commands import refused

from optax_muon.cli.main import main
from optax_muon.cli.reports import runs
from optax_muon.training.loop import StepMetrics
from optax_muon.training.optimizers import REGISTRY
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.styles import STYLES, nth

STEPS = (10, 20, 40)


def run(folder, name, seed=0, lr=0.01, losses=None, steps=40, text="hash", **config):
    """A folder as `train` leaves it, of the optimizers and their held-out losses."""
    losses = losses or {"adamw": (4.0, 3.0, 2.0), "muon": (3.0, 2.0, 1.0)}
    path = RunFolder(folder / name)
    path.path.mkdir()
    numbers = {"lr": lr, "weight_decay": 0.1}
    trials = [{"name": n, "title": n.upper(), "hyper_params": numbers} for n in losses]
    training = {"steps": steps, "seed": seed, "model": {"vocab_size": 256}}
    config |= {"training": training, "trials": trials, "fingerprint": text}
    path.config.write_text(json.dumps(config))
    for name, values in losses.items():
        for step, loss in zip(STEPS, values, strict=False):
            path.journal.write(name, StepMetrics(step, loss, 1.0, lr, 0.1, val_loss=loss))
    return path.path


def test_repeated_seeds_have_a_mean_and_the_interval_of_student(tmp_path, capsys):
    finals = [1.0, 1.2, 1.1, 1.5]
    paths = [
        run(tmp_path, f"s{i}", seed=i, losses={"adamw": (4.0, 3.0, 2.0), "muon": (3.0, 2.0, last)})
        for i, last in enumerate(finals)
    ]
    main(["report", *map(str, paths), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    low, high = scipy.stats.t.interval(
        0.95, len(finals) - 1, np.mean(finals), scipy.stats.sem(finals)
    )
    row = next(line for line in text.splitlines() if line.startswith("| MUON"))
    assert f"| 4 | {np.mean(finals):.4f} | ± {(high - low) / 2:.4f} | 50% |" in row
    assert "MUON" in capsys.readouterr().out
    rows = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 2 * len(STEPS)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".png", ".svg", ".csv"}


def test_runs_that_differ_in_more_than_the_seed_are_rows_of_their_own(tmp_path):
    one, other = run(tmp_path, "one"), run(tmp_path, "other", seed=1, lr=0.02, text="another")
    groups = runs.grouped([*runs.read(one), *runs.read(other)])
    assert [len(group.trials) for group in groups] == [1] * 4
    assert [group.label for group in groups][:3] == [
        "ADAMW, lr 0.01",
        "MUON, lr 0.01",
        "ADAMW, lr 0.02",
    ]
    assert "cannot be compared" in runs.explain(groups)
    assert "nats per byte" in runs.explain(groups)
    assert len(set(runs._styles(groups))) == 4


def test_a_run_under_way_is_shown_and_no_seed_of_a_finished_one(tmp_path):
    whole = run(tmp_path, "whole")
    part = run(tmp_path, "part", seed=1, losses={"adamw": (4.0, 3.0)})
    [adamw, muon] = runs.grouped([*runs.read(whole), *runs.read(part)])
    assert len(adamw.trials) == 1
    [alone] = runs.grouped(runs.read(part))
    assert alone.cells(alone)[4] == "20 of 40"
    assert muon.cells(adamw)[-1] == "50%"


def test_repetitions_under_way_have_mean_and_interval_of_one_step(tmp_path):
    curves = [(4.0, 3.0), (4.2, 3.2, 1.0), (4.1, 3.4)]
    paths = [
        run(tmp_path, f"s{i}", seed=i, losses={"adamw": curve}, steps=80)
        for i, curve in enumerate(curves)
    ]
    [group] = runs.grouped([trial for path in paths for trial in runs.read(path)])
    cells = group.cells(group)
    finals = [3.0, 3.2, 3.4]
    assert (cells[4], cells[6]) == ("20 of 80", "3.2000")
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(finals), scipy.stats.sem(finals))
    assert cells[7] == f"± {(high - low) / 2:.4f}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"pretrained": "runs/small"}, {"pretrained": "runs/base"}),
        ({"pretrained": "runs/small"}, {}),
        (
            {"pretrained": "runs/small", "pretrained_trial": "adamw"},
            {"pretrained": "runs/small", "pretrained_trial": "muon"},
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_runs_of_different_starts_are_rows_of_their_own(one, other, seed, tmp_path):
    paths = [run(tmp_path, "one", **one), run(tmp_path, "other", seed=seed, **other)]
    groups = runs.grouped([trial for path in paths for trial in runs.read(path)])
    assert [group.label for group in groups] == [
        "ADAMW, one",
        "MUON, one",
        "ADAMW, other",
        "MUON, other",
    ]


def test_the_same_seed_twice_is_refused_by_name(tmp_path, capsys):
    one, other = run(tmp_path, "one"), run(tmp_path, "other")
    said = refused(capsys, "report", one, other, "--out", tmp_path / "out")
    assert f"{one} and {other} have the same run of ADAMW, with the same seed 0; give one" in said
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_repeated_whole_is_shown_once(tmp_path):
    stopped, whole = run(tmp_path, "a", losses={"adamw": (4.0, 3.0)}), run(tmp_path, "b")
    [adamw, _] = runs.grouped([*runs.read(stopped), *runs.read(whole)])
    assert adamw.runs == "b"


@pytest.mark.parametrize(
    "lost",
    [
        ("training",),
        ("fingerprint",),
        *(("training", key) for key in ("seed", "steps", "model")),
        ("training", "model", "vocab_size"),
        ("trials", 0, "hyper_params"),
        ("trials", 1, "hyper_params", "lr"),
    ],
    ids=str,
)
def test_a_config_that_lacks_what_is_compared_is_refused_in_a_line(lost, tmp_path, capsys):
    path = run(tmp_path, "a")
    config = json.loads((path / "config.json").read_text())
    *places, key = lost
    part = config
    for place in places:
        part = part[place]
    del part[key]
    (path / "config.json").write_text(json.dumps(config))
    assert f"does not record how {path} was trained" in refused(capsys, "report", path)


def test_what_cannot_be_compared_is_refused_in_a_line(tmp_path, capsys):
    path = run(tmp_path, "a", losses={"adamw": ()})
    assert "has no held-out loss yet" in refused(capsys, "report", path)
    assert "given twice" in refused(capsys, "report", path, f"{path}/../a")
    assert "there is no run" in refused(capsys, "report", tmp_path / "none")
    assert "no run is named" in refused(capsys, "report")


def test_styles_differ_in_color_in_line_and_in_marker():
    for part in ("color", "line", "marker"):
        assert len({getattr(style, part) for style in STYLES}) == len(STYLES)
    assert len({spec.style for spec in REGISTRY.values()}) == len(REGISTRY)
    assert len({nth(number) for number in range(len(STYLES) ** 2)}) == len(STYLES) ** 2


def test_greys_of_neighbouring_styles_differ():
    """Relative luminance (WCAG 2): in black and white the first curves still differ."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    first = [luminance(style.color) for style in STYLES[:3]]
    assert min(abs(a - b) for i, a in enumerate(first) for b in first[:i]) > 0.15
    assert math.isclose(luminance("#ffffff"), 1.0)
