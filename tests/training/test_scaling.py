"""The experiments: searches end at the best run, fits find the law that made the data."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from optax_muon.training import power_law
from optax_muon.training.search import search

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="benchmarks are not part of a source archive"
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def runs():
    return importlib.import_module("_runs")


def searched(loss_of, start, names):
    """Search until nothing is missing; the best run, and all that were needed."""
    losses = {}
    while True:
        missing, best = search(losses, start, names)
        if not missing:
            return best, [*losses]
        assert not losses.keys() & set(missing)
        losses |= {run: loss_of(run) for run in missing}


def test_a_search_ends_where_both_neighbours_of_every_number_are_worse(runs):
    def loss(run):
        lr, batch, decay = (math.log2(x) for x in (run.lr, run.batch, run.weight_decay))
        return (lr + 5) ** 2 + 0.5 * (batch - 4) ** 2 + 0.3 * (decay + 1 + 0.2 * (lr + 5)) ** 2

    start = runs.Run("any", "muon", 20.0, 8, 2**-9, 0.125)
    best, finished = searched(loss, start, ("lr", "batch", "weight_decay", "lr"))
    assert best.batch == 16 and math.log2(best.lr) == pytest.approx(-5, abs=0.01)
    assert math.log2(best.weight_decay) == pytest.approx(-1, abs=0.01)
    assert len(finished) < 20


def test_a_search_goes_around_runs_that_diverged(runs):
    def loss(run):
        return math.nan if run.lr > 0.01 else -run.lr

    start = runs.Run("any", "adamw", 20.0, 8, 4e-3, 0.1)
    best, finished = searched(loss, start, ("lr",))
    assert best.lr == 8e-3
    assert [run.lr for run in finished] == [4e-3, 2e-3, 8e-3, 1.6e-2]


@pytest.mark.parametrize("e", [0.0, 0.5])
def test_a_fit_finds_the_law_that_the_losses_follow(e):
    law = power_law.PowerLaw(0.3, 0.08, e)
    flops = np.geomspace(1e11, 1e14, 5)
    found = power_law.fit(flops, law(flops).tolist(), irreducible=e > 0)
    np.testing.assert_allclose(found(flops), law(flops), rtol=1e-4)
    np.testing.assert_allclose([found.a, found.b, found.e], [0.3, 0.08, e], rtol=0.02, atol=1e-9)
    assert found.inverse(float(law(1e12))) == pytest.approx(1e12, rel=1e-2)


def test_the_ratio_is_the_factor_between_two_curves_and_noise_widens_its_interval():
    law, flops = power_law.PowerLaw(0.3, 0.08), np.geomspace(1e11, 1e14, 5)
    noise = np.random.default_rng(0).normal(size=(5, 3))

    def curve(factor, spread):
        losses = law(flops / factor)[:, None] * (1 + spread * noise)
        cost = tuple(flops.tolist())
        return power_law.Curve(cost, cost, cost, tuple(map(tuple, losses.tolist())))

    exact = power_law.ratio(curve(1.0, 0.0), curve(0.5, 0.0), 4, "flops")
    assert (exact.low, exact.middle, exact.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-6)
    noisy = power_law.ratio(curve(1.0, 0.0), curve(0.5, 0.01), 4, "flops")
    assert noisy.low < noisy.middle < noisy.high
    assert noisy.high - noisy.low < 0.5
