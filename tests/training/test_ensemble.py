"""Ensembles: many runs in one program give the numbers of each run alone."""

import dataclasses

import numpy as np
import pytest

import optax_muon
from optax_muon.models import spec
from optax_muon.training import ensemble
from optax_muon.training.config import LINEAR, TrainConfig
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.flops import run_flops
from optax_muon.training.initialize import initial_state
from optax_muon.training.loop import train
from optax_muon.training.optimizers import HyperParams, Trial, optimizer, transformation
from optax_muon.training.presets import PRESETS
from optax_muon.training.pretrain import Pretraining
from optax_muon.training.state import shapes

pytestmark = pytest.mark.usefixtures("standard_promotion")

TINY = PRESETS["tiny"]
CONFIG = TrainConfig(TINY.model, TINY.batch, steps=8, seed=3, eval_every=4, eval_sequences=64)
SAME = HyperParams(1e-2, 0.1, adamw_lr=2e-2)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(None, CONFIG.model.context)


def run(name, members, corpus):
    return list(ensemble.train(CONFIG, optimizer(name), members, corpus))


def test_a_member_alone_is_the_run_of_the_training_loop(corpus):
    trial = Trial(optimizer("muon"), SAME)
    state = initial_state(CONFIG, transformation(trial, CONFIG))
    steps = train(CONFIG, trial, Pretraining(CONFIG, corpus), state)
    expected = {metrics.step: metrics for metrics, _ in steps}
    found = run("muon", [ensemble.EnsembleMember(SAME, CONFIG.seed)], corpus)
    assert [metrics.step for metrics in found] == [4, 8]
    for metrics in found:
        # The rate is the peak times the schedule of a peak of 1: another rounding, of 1e-7.
        np.testing.assert_allclose(metrics.loss, [expected[metrics.step].loss], rtol=1e-5)
        np.testing.assert_allclose(metrics.val_loss, [expected[metrics.step].val_loss], rtol=1e-5)


def test_members_do_not_see_each_other(corpus):
    members = [
        ensemble.EnsembleMember(SAME, 0),
        ensemble.EnsembleMember(dataclasses.replace(SAME, lr=3e-2, weight_decay=0.5), 1),
        ensemble.EnsembleMember(HyperParams(1e30, 0.1, adamw_lr=1e30), 0),
    ]
    together = run("muon", members, corpus)[-1]
    alone = [run("muon", [member], corpus)[-1] for member in members[:2]]
    np.testing.assert_allclose(
        together.val_loss[:2], np.concatenate([each.val_loss for each in alone]), rtol=1e-5
    )
    assert not np.isfinite(together.val_loss[2])


def test_the_rate_of_adamw_moves_only_what_muon_leaves_to_it(corpus):
    first = dataclasses.replace(CONFIG, steps=1, schedule=LINEAR)  # no warm-up from zero
    states = []
    for rate in (None, 5e-2):
        trial = Trial(optimizer("muon"), HyperParams(1e-2, 0.1, rate))
        state = initial_state(first, transformation(trial, first))
        [(_, state)] = train(first, trial, Pretraining(first, corpus), state)
        states.append(state.params)
    with_default, with_own = (optax_muon.named_leaves(params) for params in states)
    moved = {path for path, leaf in with_own.items() if (leaf != with_default[path]).any()}
    rows = optax_muon.label(states[0]).rows
    assert moved == {row.path for row in rows if row.optimizer == "adamw"} != set()


def test_operations_are_those_of_the_formulas():
    """The backward pass computes the blocks again: up to 8 instead of 6 per token and parameter."""
    adamw, muon = (Trial(optimizer(name), SAME) for name in ("adamw", "muon"))
    params = shapes(spec.model(CONFIG.model), transformation(adamw, CONFIG)).params
    found = ensemble.step_flops(CONFIG, adamw.spec, SAME)
    assert 1 <= found / run_flops(CONFIG, adamw, params) <= 8 / 6
    extra = ensemble.step_flops(CONFIG, muon.spec, SAME) - found
    assert extra == muon.spec.step_flops(params, None)
