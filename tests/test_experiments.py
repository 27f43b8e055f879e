"""The experiments of benchmarks/: what they need, what they report, and their own optimizers."""

import concurrent.futures
import dataclasses
import importlib
import math
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_muon.models import spec
from optax_muon.training.optimizers import HyperParams

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = [
    pytest.mark.skipif(
        not BENCHMARKS.exists(), reason="benchmarks are not part of a source archive"
    ),
    pytest.mark.usefixtures("standard_promotion"),
]
EXPERIMENTS = (
    *("scaling_law", "lr_transfer", "update_rms", "weight_decay", "variants", "moonlight_ladder"),
    "compute_optimal",
)
GAINS = {"muon": 0.0, "muon-carried": 0.0, "adamw": 0.05, "muon-no-decay": 0.03, "normuon": -0.02}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def outcome(kind, run):
    """A finished run: its loss is its optimizer's, valleys in the numbers, and a seed's luck.

    Few tokens cost as much as a small size does, so that each budget has a best size.
    """
    loss = 2.0 + GAINS.get(run.optimizer, 0.01) + 1.0 / run.tokens_per_parameter
    for name, best in {"lr": 1.2e-2, "adamw_lr": 1.2e-2, "weight_decay": 0.1}.items():
        if value := getattr(run, name):
            loss += 0.01 * math.log2(value / best) ** 2
    size, layers = int(run.model.split()[0]), int(run.model.split()[-1])
    fields = dict.fromkeys(
        ("query_rms", "mlp_rms", "hidden_rms", "largest_share", "max_logit"), 0.1
    )
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(
        **dataclasses.asdict(run),
        steps=100,
        parameters=50 * size**2 * layers,
        flops=1e6 * size**4 * (1.1 if run.optimizer.startswith("muon") else 1.0),
        val_loss=loss + 0.1 * run.seed + 8.0 / size - (0.3 if run.seed == 0 else 0.0),
        **{name: value for name, value in fields.items() if name in known},
    )


def completed(script):
    """An experiment, and its results when all of its runs are done."""
    experiment = script.experiment(script.Options())
    finished = []
    while True:
        done = {row.run for row in finished}
        missing = [run for run in dict.fromkeys(experiment.needed(finished)) if run not in done]
        if not missing:
            return experiment, importlib.import_module("_experiment").Results(finished)
        finished += [outcome(experiment.kind, run) for run in missing]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_ends_and_reports_seeds_that_no_search_has_seen(name):
    script = importlib.import_module(name)
    experiment, results = completed(script)
    page = "\n".join(experiment.report(results))
    assert "to come" not in page and "nan" not in page
    assert experiment.summary(results)
    if name != "lr_transfer":  # has one seed
        searched = getattr(script, "SEARCH_SEEDS", (0,))
        reported = getattr(script, "FRESH_SEEDS", (1, 2, 3))
        assert {row.seed for row in results.finished} - {*searched} == {*reported}
    experiment.picture(results).savefig(importlib.import_module("io").BytesIO())


def test_differences_are_paired_by_seed():
    _, results = completed(importlib.import_module("weight_decay"))
    script = importlib.import_module("weight_decay")
    summary = script.experiment(script.Options()).summary(results)
    # Seeds differ by 0.1, their pairs not at all.
    assert "20: +0.0300 ± 0.0000; 60: +0.0300 ± 0.0000; 180: +0.0300 ± 0.0000" in summary


def test_variants_are_called_gains_and_losses_by_their_intervals():
    script = importlib.import_module("variants")
    experiment, results = completed(script)
    assert (
        "better: NorMuon -0.0200 ± 0.0000, with fresh seeds -0.0200 ± 0.0000. Worse: "
        in experiment.summary(results)
    )


def test_a_mixture_is_compared_at_the_largest_size_and_over_all_of_them():
    script = importlib.import_module("moonlight_ladder")
    experiment, results = completed(script)
    summary = experiment.summary(results)
    # The planted losses of OPTIMIZERS; AdamW's distance is worth a part of its FLOPs.
    assert "AdamW +0.0500 ± 0.0000; Muon, routers on AdamW +0.0100 ± 0.0000" in summary
    assert f"at {100 * 32**2:,} activated parameters" in summary
    assert 0 < float(summary.split()[2]) < 1


def test_a_search_begins_where_that_of_the_size_below_ended():
    script = importlib.import_module("moonlight_ladder")
    _, results = completed(script)
    first, *others = script.Options().models
    searched = {
        model: {row.lr for row in results.finished if row.model == model and not row.seed}
        for model in (first, *others)
    }
    # From 4.8e-2 down to the planted 1.2e-2 and one further, then around it.
    assert searched[first] == {0.096, 0.048, 0.024, 0.012, 0.006}
    for model in others:
        assert searched[model] == {0.024, 0.012, 0.006}


def test_the_optima_of_budgets_are_those_of_the_planted_law():
    """L = A / N^a + B / D^b has its optimum at N ~ C^(b / (a + b)) (Hoffmann et al., Eq. 4)."""
    script = importlib.import_module("compute_optimal")
    a, b = 0.4, 0.3
    protocol = script.Protocol(script.MODELS, script.RATES, ())
    names = [*script.MODELS]

    def planted(run):
        n = script.spec.model(script.MODELS[run.model]).active
        d = run.tokens_per_parameter * n
        # The optimum of the middle budget is at 32 x 2, 31,904 parameters.
        at = 31_904**a / a, (5.2e10 / 6 / 31_904) ** b / b
        loss = 1 + 0.1 * (at[0] / n**a + at[1] / d**b) + 0.1 * run.seed
        return script.Finished(
            **dataclasses.asdict(run), steps=1, parameters=n, flops=1.0, val_loss=loss
        )

    finished = []
    while missing := set(protocol.needed(finished)) - {row.run for row in finished}:
        finished += [planted(run) for run in missing]
    curves = protocol.curves(finished)
    assert len(curves) == len(script.RATES)
    for curve in curves:
        place = names.index(curve.sizes[curve.best][0].model)
        models = [rows[0].model for rows in curve.sizes]
        assert set(names[place - script.AROUND : place + script.AROUND + 1]) <= set(models)
    law = script.sizes_law(curves)
    # A parabola is not quite the curve: its vertex is some per cent beside the minimum.
    assert law.optima[1] == pytest.approx(31_904, rel=0.1)
    assert law.growth.p == pytest.approx(b / (a + b), abs=0.05)
    assert script.tokens_law(law).growth.p == pytest.approx(1 - law.growth.p)
    # All seeds differ by the same amount everywhere, or the resamples would disagree.
    assert law.exponent.high >= law.growth.p >= law.exponent.low


def test_the_rates_of_the_budgets_are_those_of_the_fitted_law():
    script = importlib.import_module("compute_optimal")
    law = script.searched_law("lr", [])
    law = script.power_law.growth(law.flops[:4], law.optima[:4])  # the runs used these sizes
    for budget, rate in script.RATES.items():
        assert rate == pytest.approx(law(budget), rel=0.03)


@pytest.fixture
def compiled_in_half_the_time():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_in_half_the_time")
def test_a_mixture_is_trained_and_its_routing_measured(tmp_path):
    runs, models, routing = map(importlib.import_module, ("_runs", "_models", "_routing"))
    for name in ("train", "held_out"):  # a random text in place of the download
        text = np.random.default_rng(0).integers(97, 123, 50_000).astype(np.uint8)
        np.save(tmp_path / f"{name}.npy", text)
    ladder = runs.Ladder(models.TOY_MIXTURES, tmp_path / "runs.csv", tmp_path, routing.Routed)
    [model] = models.TOY_MIXTURES
    whole = runs.Run(model, "muon", 0.1, batch=2, lr=1e-2, weight_decay=0.1)
    per_head = dataclasses.replace(whole, optimizer="muon-per-head")
    assert [ladder.config(run).per_head for run in (whole, per_head)] == [False, True]
    assert ladder.config(whole).bias_update_speed > 0
    [row] = runs.train(ladder, [per_head])
    assert row.val_loss < np.log(256)
    # With 2 of 8 experts for a token, an expert has at most 4 times its even share.
    assert 1 <= row.largest_share <= 4
    assert row.max_logit > 0


def some_run(lr):
    return importlib.import_module("_runs").Run("16 x 2", "muon", 0.1, 2, lr, weight_decay=0.1)


def test_a_run_that_fails_loses_none_that_is_under_way(tmp_path, monkeypatch):
    runs, failed = importlib.import_module("_runs"), threading.Event()

    def train(ladder, group):
        [run] = group
        if run.lr == 2:
            failed.set()
            raise MemoryError("run 2")
        failed.wait()
        time.sleep(0.1)
        return [outcome(runs.Finished, run)]

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "_pool", concurrent.futures.ThreadPoolExecutor)
    monkeypatch.setattr(runs._corpus, "load", lambda folder: None)
    ladder = runs.Ladder({}, tmp_path / "runs.csv", tmp_path)
    with pytest.raises(MemoryError, match="run 2"):
        ladder.complete(lambda finished: map(some_run, range(1, 50)), workers=2)
    done = {row.lr for row in ladder.finished()}
    assert 1 in done and 2 not in done
    assert len(done) < 10, "what had not begun is not begun"


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    runs, table = map(importlib.import_module, ("_runs", "_table"))
    first, path = outcome(runs.Finished, some_run(1.0)), tmp_path / "runs.csv"
    table.write(path, runs.Finished, [first])

    def killed():
        yield first
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.write(path, runs.Finished, killed())
    assert table.read(path, runs.Finished) == [first]


@pytest.mark.parametrize(
    ("platforms", "backend", "alone"),
    [(None, "cpu", True), ("cpu", "cpu", True), (None, "gpu", False), ("cuda", "gpu", False)],
)
def test_a_run_has_a_core_where_it_is_a_program(platforms, backend, alone, monkeypatch):
    runs, given = importlib.import_module("_runs"), []
    monkeypatch.setattr(runs.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(
        concurrent.futures, "ProcessPoolExecutor", lambda *options: given.extend(options)
    )
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        runs._pool(2)
        groups = runs._groups([some_run(1.0), some_run(2.0)])
    finally:
        jax.config.update("jax_platforms", before)
    assert (runs._take_core in given) == alone
    assert len(groups) == (2 if alone else 1)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_bench_leaves_out_what_searches_and_trains_for_hours():
    command = ["make", "--dry-run", "bench"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in BENCHMARKS.glob("[!_]*.py"):
        text = path.read_text()
        searches = "import Experiment" in text or "search import tune" in text
        assert (f"benchmarks/{path.name}" in done.stdout) != searches, path.name


def test_the_page_is_made_of_the_committed_results():
    page = importlib.import_module("page")
    assert page.PAGE.read_text() == page.text()
    readme = page.README.read_text()
    assert readme == page.with_evidence(readme)
    for name in page.OTHER:
        assert (page.RESULTS / name).exists()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_soap_turns_with_its_gradients():
    """In turned coordinates the eigenbasis turns as well: the steps are the same ones, turned."""
    soap = importlib.import_module("_soap").scale_by_soap()
    left, right = (np.linalg.qr(normal(seed, side, side))[0] for seed, side in ((8, 5), (9, 5)))
    step = jax.jit(soap.update)

    def run(turn):
        state = soap.init(jnp.zeros([5, 5]))
        for seed in range(12):  # past the first orthogonal iteration
            update, state = step(jnp.asarray(turn(normal(seed, 5, 5))), state)
        return update

    plain, turned = run(lambda g: g), run(lambda g: left @ g @ right.T)
    # Squares are averaged over 12 steps in float32, and the bases are found to about 1e-5.
    np.testing.assert_allclose(turned, left @ plain @ right.T, atol=2e-3)


def test_soap_is_adam_where_the_axes_are_the_eigenvectors():
    soap = importlib.import_module("_soap")
    grads = [jnp.diag(jnp.asarray(normal(seed, 4))) for seed in range(5)]
    adam = optax.scale_by_adam(soap.BETA1, soap.BETA2, soap.EPSILON)
    mine, theirs = soap.scale_by_soap(), adam
    states = [mine.init(grads[0]), theirs.init(grads[0])]
    for g in grads:
        found, states[0] = mine.update(g, states[0])
        expected, states[1] = theirs.update(g, states[1])
    np.testing.assert_allclose(jnp.diag(found), jnp.diag(expected), rtol=1e-4)


def test_two_momenta_are_two_averages():
    variants = importlib.import_module("_variants")
    link = variants.two_momenta()
    grads = [normal(seed, 3, 2) for seed in range(6)]
    state = link.init(jnp.zeros([3, 2]))
    for g in grads:
        update, state = link.update(jnp.asarray(g), state)
    expected = np.zeros([3, 2])
    for beta in variants.TWO_SCALES:
        weights = [(1 - beta) * beta ** (len(grads) - 1 - i) for i in range(len(grads))]
        average = sum(w * g for w, g in zip(weights, grads, strict=True))
        expected += beta * average + (1 - beta) * grads[-1]
    np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_variants_change_the_step_of_muon():
    variants = importlib.import_module("_variants")
    tree = jax.tree.map(jnp.asarray, {
        "layers": {
            "attn": {f"{n}_proj": {"kernel": normal(0, 2, 32, 32)} for n in "qkv"},
            "mlp": {"up_proj": {"kernel": normal(1, 2, 32, 88)}},
        }
    })  # fmt: skip
    numbers = HyperParams(1e-2, 0.1)

    heads = spec.model(importlib.import_module("_models").llama(32, 2)).per_head_views

    def updates(name):
        views = heads if name in variants.PER_HEAD else None
        tx = variants.SPECS[name].build(lambda count: 1e-2, numbers, views)

        @jax.jit
        def steps(tree):
            state = tx.init(tree)
            for factor in (1.0, -0.5, 0.3):
                gradients = jax.tree.map(lambda p: factor * p + jnp.cos(9 * p), tree)  # noqa: B023
                updates, state = tx.update(gradients, state, tree)
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates)])

        return np.asarray(steps(tree))

    muon = updates("muon")
    for name in ("muon-per-head", "muon-two-momenta", "muon-cautious-decay", "contrib-muon"):
        change = np.linalg.norm(updates(name) - muon) / np.linalg.norm(muon)
        assert change > 1e-3, name
