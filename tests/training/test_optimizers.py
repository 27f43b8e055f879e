"""The optimizers of the command, against plain optax chains; and what their trials share."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_muon
from optax_muon.training.config import TrainConfig
from optax_muon.training.data.corpus import load_corpus
from optax_muon.training.initialize import initial_state
from optax_muon.training.loop import train
from optax_muon.training.optimizers import HyperParams, Trial, optimizer, transformation
from optax_muon.training.presets import PRESETS
from optax_muon.training.pretrain import Pretraining

pytestmark = pytest.mark.usefixtures("standard_promotion")

CONFIG = TrainConfig(PRESETS["tiny"].model, 8, 4, seed=0, eval_every=4, eval_sequences=4)
NUMBERS = HyperParams(1e-2, 0.3)
APART = HyperParams(1e-2, 0.3, adamw_lr=5e-3)


def adamw(peak):
    return optax.adamw(CONFIG.learning_rate(peak), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3)


PLAIN = {
    "adamw": (NUMBERS, adamw(1e-2)),
    "muon": (NUMBERS, optax_muon.muon(CONFIG.learning_rate(1e-2), weight_decay=0.3)),
    "muon-carried": (
        APART,
        optax_muon.muon(CONFIG.learning_rate(1e-2), weight_decay=0.3, fallback=adamw(5e-3)),
    ),
    "lion": (
        NUMBERS,
        optax.lion(CONFIG.learning_rate(1e-2), b1=0.95, b2=0.98, weight_decay=0.3),
    ),
}
"""The chains that the trials stand for, written with optax."""


@pytest.mark.parametrize("name", PLAIN)
def test_its_updates_are_those_of_a_plain_chain_with_the_schedule(name):
    hyper_params, plain = PLAIN[name]
    trial = Trial(optimizer(name), hyper_params)
    tx, plain = transformation(trial, CONFIG), optax.chain(optax.clip_by_global_norm(1.0), plain)
    rng = np.random.default_rng(0)
    shapes = {"up_proj": {"kernel": (8, 16)}, "norm": {"scale": (8,)}}

    def draw(shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))
    state, expected_state = tx.init(params), plain.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for lr in CONFIG.learning_rates(hyper_params.lr):
        grads = jax.tree.map(lambda leaf: draw(leaf.shape), params)
        found, state = jax.jit(tx.update)(grads, state, params, **trial.numbers(lr))
        expected, expected_state = jax.jit(plain.update)(grads, expected_state, params)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            # Numbers as arguments round elsewhere than constants that XLA folds: a few eps.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max() + 1e-12)


def test_trials_of_one_optimizer_compile_one_step(text):
    """Whatever their learning rates, decays and seeds, as those of a sweep."""
    corpus = load_corpus(text, CONFIG.model.context)
    jax.clear_caches()  # of what another test has compiled
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    def run(name, numbers, seed):
        config = TrainConfig(CONFIG.model, 8, 4, seed, eval_every=4, eval_sequences=4)
        trial = Trial(optimizer(name), numbers)
        state = initial_state(config, transformation(trial, config))
        return [
            metrics.loss for metrics, _ in train(config, trial, Pretraining(config, corpus), state)
        ]

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = run("muon", NUMBERS, 0)
        assert compiled
        compiled.clear()
        others = [run("muon-carried", HyperParams(3e-2, 0.1), 0), run("muon", NUMBERS, 1)]
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert all(first != other for other in others)
    assert first[0] == others[0][0] != others[1][0], "the seed draws parameters and batches"
