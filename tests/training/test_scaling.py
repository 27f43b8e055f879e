"""Scaling laws: searches end at the best run, fits find the law that made the data."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from optax_muon.cli.main import main
from optax_muon.cli.reports import scaling as report
from optax_muon.errors import UsageError
from optax_muon.training import power_law, scaling, sweep
from optax_muon.training.ladder import FACTOR, ladder
from optax_muon.training.search import search, tune


@dataclasses.dataclass(frozen=True)
class Run:
    """What is searched."""

    lr: float
    batch: int
    weight_decay: float
    seed: int = 0


def searched(loss_of, start, names):
    """Search until nothing is missing; the best run, and all that were needed."""
    losses = {}
    while True:
        missing, best = search(losses, start, names)
        if not missing:
            return best, [*losses]
        assert not losses.keys() & set(missing)
        losses |= {run: loss_of(run) for run in missing}


def test_a_search_ends_where_both_neighbours_of_every_number_are_worse():
    def loss(run):
        lr, batch, decay = (math.log2(x) for x in (run.lr, run.batch, run.weight_decay))
        return (lr + 5) ** 2 + 0.5 * (batch - 4) ** 2 + 0.3 * (decay + 1 + 0.2 * (lr + 5)) ** 2

    start = Run(2**-9, 8, 0.125)
    best, finished = searched(loss, start, ("lr", "batch", "weight_decay", "lr"))
    assert best.batch == 16 and math.log2(best.lr) == pytest.approx(-5, abs=0.01)
    assert math.log2(best.weight_decay) == pytest.approx(-1, abs=0.01)
    assert len(finished) < 20


@pytest.mark.parametrize("lr", [2.35e-3, 6.25e-3, 4.7 / 3e3])
def test_a_number_that_is_halved_and_doubled_is_the_same_run(lr):
    # The best rate falls with the decay: the second search of rates turns back.
    def loss(run):
        best = lr / 8 if run.weight_decay == 0.1 else lr / 2
        return abs(math.log2(run.lr / best)) - 10 * (run.weight_decay == 0.2)

    best, finished = searched(loss, Run(lr, 8, 0.1), ("lr", "weight_decay", "lr"))
    rates = sorted({run.lr for run in finished})
    assert all(high / low > 1.9 for low, high in itertools.pairwise(rates))
    assert best.lr == rates[-3] and lr in rates


def test_a_search_goes_around_runs_that_diverged():
    def loss(run):
        return math.nan if run.lr > 0.01 else -run.lr

    start = Run(4e-3, 8, 0.1)
    best, finished = searched(loss, start, ("lr",))
    assert best.lr == 8e-3
    assert [run.lr for run in finished] == [4e-3, 2e-3, 8e-3, 1.6e-2]


@pytest.mark.parametrize(("search_seeds", "best"), [(None, 8e-3), ([0], 8e-3), ([0, 4, 5], 4e-3)])
def test_a_search_with_several_seeds_is_not_won_by_a_lucky_one(search_seeds, best):
    def loss(run):
        lucky = run.lr == 8e-3 and run.seed == 0
        return abs(math.log2(run.lr / 4e-3)) - 2 * lucky + 0.01 * run.seed

    start, seeds = Run(2e-3, 8, 0.1), [1, 2]
    losses, repeats = {}, []
    while not repeats:
        missing, repeats = tune(losses, start, ["lr"], seeds, search_seeds)
        assert not losses.keys() & set(missing)
        losses |= {run: loss(run) for run in missing}
    assert [(run.lr, run.seed) for run in repeats] == [(best, 1), (best, 2)]
    assert {run.seed for run in losses} == {*seeds, *(search_seeds or [0])}


@pytest.mark.parametrize("e", [0.0, 0.5])
def test_a_fit_finds_the_law_that_the_losses_follow(e):
    law = power_law.PowerLaw(0.3, 0.08, e)
    flops = np.geomspace(1e11, 1e14, 5)
    found = power_law.fit(flops, law(flops).tolist(), irreducible=e > 0)
    np.testing.assert_allclose(found(flops), law(flops), rtol=1e-4)
    np.testing.assert_allclose([found.a, found.b, found.e], [0.3, 0.08, e], rtol=0.02, atol=1e-9)
    assert found.inverse(float(law(1e12))) == pytest.approx(1e12, rel=1e-2)


@pytest.mark.parametrize("losses", [(2.0, 2.1, 2.2), (2.0, 2.0, 2.0), (3.0, 2.5, 2.6)])
def test_a_law_with_an_offset_never_rises(losses):
    found = power_law.fit([1e15, 1e16, 1e17], losses, irreducible=True)
    curve = found([1e15, 1e16, 1e17])
    assert found.b >= 0
    assert min(losses) - 1e-3 < curve.min() <= curve.max() < max(losses) + 1e-3


def test_the_ratio_is_the_factor_between_two_curves_and_noise_widens_its_interval():
    law, flops = power_law.PowerLaw(0.3, 0.08), np.geomspace(1e11, 1e14, 5)
    noise = np.random.default_rng(0).normal(size=(5, 3))

    def curve(factor, spread):
        losses = law(flops / factor)[:, None] * (1 + spread * noise)
        cost = tuple(flops.tolist())
        return power_law.Curve({"flops": cost}, tuple(map(tuple, losses.tolist())))

    exact = power_law.ratio(curve(1.0, 0.0), curve(0.5, 0.0), 4, "flops")
    assert (exact.low, exact.middle, exact.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-6)
    noisy = power_law.ratio(curve(1.0, 0.0), curve(0.5, 0.01), 4, "flops")
    assert noisy.low < noisy.middle < noisy.high
    assert noisy.high - noisy.low < 0.5


def test_intervals_hold_the_truth_as_often_as_they_say():
    random, law, flops = np.random.default_rng(1), power_law.PowerLaw(0.3, 0.08), (1e11, 1e12, 1e13)

    def curve(factor):
        losses = law(np.divide(flops, factor))[:, None] + 0.01 * random.normal(size=(3, 3))
        return power_law.Curve({"flops": flops}, tuple(map(tuple, losses.tolist())))

    studies, inside = 400, np.zeros(4)
    for _ in range(studies):
        adamw, muon = curve(1.0), curve(0.5)
        low, high = np.quantile(adamw.resamples(random), (0.05, 0.95), axis=0)
        inside[:3] += (low <= law(flops)) & (law(flops) <= high)
        ratio = power_law.ratio(adamw, muon, 2, "flops")
        inside[3] += ratio.low <= 0.5 <= ratio.high
    # 0.9, give or take three standard errors of 400 studies, 0.015 each.
    np.testing.assert_allclose(inside / studies, 0.9, atol=0.045)


@pytest.mark.parametrize("kind", ["llama", "moonlight"])
def test_a_ladder_takes_the_budget_in_steps_of_four(kind):
    rungs = ladder(kind, 1e14, sizes=4, runs=10)
    flops = [rung.flops for rung in rungs]
    # Widths are multiples of 8, so a size is off by up to a few tenths.
    assert 10 * sum(flops) == pytest.approx(1e14, rel=0.3)
    steps = [after / before for before, after in itertools.pairwise(flops)]
    assert all(0.5 * FACTOR < step < 2 * FACTOR for step in steps)
    assert all(rung.tokens / rung.parameters == pytest.approx(20, rel=0.02) for rung in rungs)


def test_a_budget_that_is_too_small_for_its_sizes_is_refused():
    with pytest.raises(UsageError, match=r"--budget is 1e\+09; 4 different sizes need more"):
        ladder("llama", 1e9, sizes=4, runs=10)
    with pytest.raises(UsageError, match="--model is mamba; models of many sizes are llama, moon"):
        ladder("mamba", 1e13, sizes=4, runs=10)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose runs have the losses of known laws: Muon needs half of AdamW's operations."""
    ran = []

    def loss(rung, point):
        """The law, a valley in the learning rate, and a seed's luck; the search has most of it."""
        share = {"adamw": 1.0, "muon": 0.5}[point.optimizer]
        valley = 0.01 * math.log2(point.lr / {"adamw": 2e-3, "muon": 4e-3}[point.optimizer]) ** 2
        luck = {0: -0.2, 1: 0.001, 2: -0.001}[point.seed]
        return float(power_law.PowerLaw(0.3, 0.08)(rung.flops / share)) + valley + luck

    def run_all(rung, points, table):
        for point in points:
            ran.append((rung.name, point.title))
            table.append(dataclasses.replace(point, val_loss=loss(rung, point)))

    monkeypatch.setattr(sweep, "run_all", run_all)
    rungs = ladder("llama", 1e13, sizes=3, runs=10)
    found = scaling.Study(rungs, ("adamw", "muon"), 2, tmp_path)
    found.run(lambda rung: rung)
    return found, ran


def test_a_study_reports_seeds_that_its_search_has_not_seen(study):
    found, ran = study
    assert len(set(ran)) == len(ran)
    for rung in found.rungs:
        for name in found.optimizers:
            setting = found.best(rung, name)
            assert [point.seed for point in setting.points] == [1, 2]
            # Within a factor of the square root of two of the valley's floor.
            floor = {"adamw": 2e-3, "muon": 4e-3}[name]
            assert abs(math.log2(setting.first.lr / floor)) <= 0.51
    ran.clear()
    found.run(lambda rung: rung)
    assert not ran


def test_a_study_finds_the_share_of_the_operations(study):
    found, _ = study
    curves = {name: scaling.curve(sizes) for name, sizes in found.results().items()}
    for place, rung in enumerate(found.rungs):
        ratio = power_law.ratio(curves["adamw"], curves["muon"], place, "model_flops")
        # The valleys' floors lie between the tried rates, which moves a loss by up to 0.0025: at an
        # exponent of 0.08, of a loss of 1, by 3 %. Seeds add 1 %.
        assert ratio.middle == pytest.approx(0.5, rel=0.1), rung.name
    text = report.markdown(found.results(), "llama")
    assert "FLOPs of Muon over AdamW's" in text and text.count("| Muon |") == 4


def test_the_command_prints_its_ladder_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["scaling", "--plan", "--sizes", "2"])
    assert "lr to start from" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]
    with pytest.raises(SystemExit) as end:
        main(["scaling", "--optimizers", "adamw", "adamw"])
    assert end.value.code == 2
    assert "must name each optimizer once" in capsys.readouterr().err
