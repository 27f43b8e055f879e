"""Balance and gates at the ends of their ranges, held to whole numbers and to float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_muon.models.moe import Router, gate_scaling, imbalance, update_bias

SPEED = np.float32(1e-3)
MOST = 2**31 - 1


def truth(load):
    """The change of the biases in whole numbers of Python, which have no largest one."""
    loads = [int(each) for each in load]
    signs = [np.sign(float(sum(loads) - len(loads) * each)) for each in loads]
    return SPEED * (np.array(signs) - np.mean(signs))


LOADS = {
    "balanced": [7, 7, 7, 7],
    "one apart": [8, 7, 7, 6],
    "a mean between two": [3, 4, 4, 4],
    "one apart above 2^24": [2**24 + 1, 2**24, 2**24, 2**24],
    "one apart above 2^30": [2**30 + 1, 2**30, 2**30 - 1, 2**30],
    "a sum above 2^31": [2**30, 2**30 + 1, 2**30 + 2, 2**30 + 5],
    "the largest": [MOST, MOST - 1, MOST, MOST],
    "the largest, all equal": [MOST] * 5,
    "one expert has all": [MOST, 0, 0],
    "no tokens": [0, 0, 0, 0],
    "one expert": [9],
    "odd experts": [2**24 + 1, 2**24, 2**24 + 1, 2**24, 2**24, 2**24, 2**24],
}


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_loads_are_compared_as_whole_numbers(load, dtype):
    got = jax.jit(update_bias)(jnp.zeros(len(load)), jnp.array(load, dtype), SPEED)
    np.testing.assert_allclose(got, truth(load), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
def test_a_narrow_dtype_does_not_wrap_round(dtype):
    load = [100, 101, 102, 3, *[90] * 200]
    got = update_bias(jnp.zeros(len(load)), jnp.array(load, dtype), SPEED)
    np.testing.assert_allclose(got, truth(load), rtol=1e-5, atol=1e-10)


def test_random_loads_of_many_layers():
    rng = np.random.default_rng(0)
    loads = rng.integers(2**30 - 2, 2**30 + 3, [50, 64])
    got = update_bias(jnp.zeros([50, 64]), jnp.array(loads, np.int32), SPEED)
    expected = np.stack([truth(load) for load in loads])
    # float32 rounds 1e-3 and the mean of 64 signs.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_imbalance_of_large_and_of_no_loads(load):
    exact = max(load) * len(load) / sum(load) - 1 if sum(load) else 0.0
    above = (max(load) * len(load) - sum(load)) / max(1, sum(load))  # without the cancellation
    np.testing.assert_allclose(exact, above, atol=1e-9)
    got = float(imbalance(jnp.array(load, np.int32)))
    np.testing.assert_allclose(got, above, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("experts", "chosen"), [(0, 0), (4, 0), (4, -1), (4, 5)])
def test_a_scale_of_no_experts_is_refused(experts, chosen):
    with pytest.raises(ValueError, match=f"num_experts_per_tok is {chosen}, it must be at least 1"):
        gate_scaling(experts, chosen)


# ---- gates ---------------------------------------------------------------------------------------


def routed(logits, scale=2.0, bias=None):
    """What a router of as many features as experts gives for these logits, and its gradient."""
    logits = np.asarray(logits, np.float32)
    experts = logits.shape[-1]
    router = Router(experts, 2, 1, 1, True, scale)
    params = {"params": {"kernel": jnp.eye(experts)}}
    bias = jnp.zeros(experts) if bias is None else jnp.asarray(bias, jnp.float32)
    routing = functools.partial(router.apply, params)
    slope = jax.grad(lambda x: (routing(x, bias).gates[0, 0] * jnp.arange(1.0, 3.0)).sum())
    x = jnp.asarray(logits)[None, None]
    return routing(x, bias), slope(x)


def shares(logits, chosen):
    """Scores of the chosen over their sum, in float64 and by logarithms."""
    logarithms = -np.logaddexp(0, -np.asarray(logits, np.float64))[chosen]
    powers = np.exp(logarithms - logarithms.max())
    return powers / powers.sum()


LOGITS = {
    "all equal": [0.0, 0.0, 0.0, 0.0],
    "usual": [0.3, -1.2, 2.0, 0.1],
    "small": [-20.0, -21.0, -22.0, -23.0],
    "below 1e-10": [-30.0, -31.0, -29.5, -40.0],
    "denormal": [-95.0, -96.0, -97.0, -95.5],
    "one that is not zero": [-50.0, -300.0, -300.0, -300.0],
    "all zero": [-200.0, -200.0, -200.0, -200.0],
    "all zero and different": [-200.0, -201.0, -200.5, -500.0],
    "huge": [-1e30, -1e30, -2e30, -1e30],
    "the lowest": [-3.4e38] * 4,
    "saturated": [200.0, 300.0, 1e30, 90.0],
}


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS.keys())
def test_gates_are_shares_however_small_the_scores_are(logits):
    with jax.debug_nans(True):
        routing, slope = routed(logits)
    chosen = np.asarray(routing.chosen)[0, 0]
    # Below 1e-38 a gate is zero in float32.
    np.testing.assert_allclose(
        routing.gates[0, 0], 2 * shares(logits, chosen), rtol=2e-5, atol=1e-37
    )
    np.testing.assert_allclose(routing.gates.sum(), 2.0, rtol=1e-6)
    everywhere = shares(logits, slice(None))
    entropy = -(everywhere * np.log(np.where(everywhere > 0, everywhere, 1))).sum()
    np.testing.assert_allclose(routing.entropy, entropy, rtol=2e-5, atol=1e-6)
    assert np.isfinite(slope).all()


def test_scores_that_all_underflow_share_evenly():
    routing, _ = routed([-200.0] * 4)
    np.testing.assert_array_equal(routing.gates[0, 0], [1.0, 1.0])
    np.testing.assert_allclose(routing.entropy, np.log(4), rtol=1e-6)


def test_overflowed_logits_share_evenly():
    """`x @ kernel` may overflow to minus infinity."""
    router = Router(4, 2, 1, 1, True, 2.0)
    params = {"params": {"kernel": jnp.full([4, 4], -1e30)}}
    routing = router.apply(params, jnp.full([1, 1, 4], 1e30), jnp.zeros(4))
    np.testing.assert_array_equal(routing.gates[0, 0], [1.0, 1.0])
    np.testing.assert_allclose(routing.entropy, np.log(4), rtol=1e-6)


def test_usual_gates_are_those_of_deepseek_bit_for_bit():
    logits = np.random.default_rng(0).normal(size=8).astype(np.float32)
    routing, _ = routed(logits, scale=1.7)
    scores = jax.nn.sigmoid(jnp.asarray(logits))[routing.chosen[0, 0]]
    expected = scores / (scores.sum(keepdims=True) + 1e-20) * 1.7
    np.testing.assert_array_equal(routing.gates[0, 0], expected)
