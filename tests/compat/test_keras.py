"""An optax chain in Keras: the numbers of a loop in jax, saved, loaded, with Keras's options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_muon
from optax_muon.extras import MissingExtraError

compat = pytest.importorskip("optax_muon.compat.keras", exc_type=MissingExtraError)
keras = pytest.importorskip("keras")

pytestmark = [
    pytest.mark.usefixtures("promotion"),
    # Keras's variables with numpy 2.
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
    ),
]

X = np.float32(np.random.default_rng(0).normal(size=(64, 8)))
Y = np.float32(np.sin(X[:, :4]))
BOUNDARY, RATES = 5, (0.02, 0.005)


@pytest.fixture(scope="module")
def promotion():
    """Keras promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@keras.saving.register_keras_serializable("tests")
def chain():
    return optax_muon.muon(1.0, views={"second/kernel": optax_muon.View(0, 1)})


def network():
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(16, activation="tanh", name="first"),
        keras.layers.Dense(16, activation="tanh", name="second"),
        keras.layers.Dense(4, name="head"),
    ]
    return keras.Sequential([keras.Input((8,)), *layers])


def fit(model, epochs):
    return model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0).history["loss"]


@pytest.fixture(scope="module")
def trained(promotion):
    """A model after eight steps, and its values before them."""
    model = network()
    before = {
        path: np.asarray(x) for path, x in compat.params_of(model.trainable_variables).items()
    }
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([BOUNDARY - 1], list(RATES))
    optimizer = compat.OptaxOptimizer(chain, learning_rate=rate)
    model.compile(optimizer, loss="mse", jit_compile=True)
    fit(model, epochs=2)
    return model, before


def test_a_fit_is_a_loop_in_jax(trained):
    model, params = trained
    tx = optax_muon.muon(
        optax.piecewise_constant_schedule(RATES[0], {BOUNDARY: RATES[1] / RATES[0]}),
        views={"second/kernel": optax_muon.View(0, 1)},
    )

    @jax.jit
    def step(params, state, x, y):
        def loss(p):
            x1 = jnp.tanh(x @ p["first/kernel"] + p["first/bias"])
            x2 = jnp.tanh(x1 @ p["second/kernel"] + p["second/bias"])
            return jnp.mean((x2 @ p["head/kernel"] + p["head/bias"] - y) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for start in [0, 16, 32, 48] * 2:
        params, state = step(params, state, X[start : start + 16], Y[start : start + 16])
    for path, found in compat.params_of(model.trainable_variables).items():
        # Eight steps in float32, whose gradients are summed in another order.
        np.testing.assert_allclose(found, params[path], atol=2e-5, err_msg=path)


def test_a_loaded_model_goes_on_as_the_saved_one(trained, tmp_path):
    model, _ = trained
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    names = [variable.name for variable in model.optimizer.variables]
    assert [variable.name for variable in loaded.optimizer.variables] == names
    assert sum("_mu_" in name for name in names) == 6
    for ours, theirs in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert fit(loaded, epochs=1) == fit(model, epochs=1)


def test_accumulation_clipping_and_averages_of_keras_apply():
    """Two gradients `g` and `3 g`, clipped to norm 1, are one step on `g / |g|`."""
    kernel = keras.Variable(np.ones((4, 8), "float32"), name="kernel")
    grad = np.float32(np.random.default_rng(1).normal(size=(4, 8)))
    tx = optax_muon.muon(0.1)
    optimizer = compat.OptaxOptimizer(
        lambda: tx, gradient_accumulation_steps=2, clipnorm=1.0, use_ema=True, ema_momentum=0.5
    )
    optimizer.build([kernel])
    apply = jax.jit(optimizer.stateless_apply)
    values, state = [kernel.value], [v.value for v in optimizer.variables]
    for factor in (1.0, 3.0):
        values, state = apply(state, [factor * grad], values)
    params = {"kernel": kernel.value}
    grads = {"kernel": grad / np.linalg.norm(grad)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(values[0], 1.0 + updates["kernel"], atol=1e-6)


def test_a_chain_itself_is_refused():
    with pytest.raises(TypeError, match=r"a function without arguments .* lambda: optax_muon"):
        compat.OptaxOptimizer(optax_muon.muon(0.1))


def test_two_variables_of_one_path_are_refused():
    twice = [keras.Variable(np.ones((4, 8)), name="kernel") for _ in range(2)]
    with pytest.raises(ValueError, match="Two variables have the path 'kernel'; rename a layer"):
        compat.params_of(twice)


def test_the_layers_of_keras_are_read():
    layers, image = keras.layers, (None, 8, 8, 16)
    built = {
        layers.Embedding(32, 16, name="tokens"): (None, 6),
        layers.LayerNormalization(name="norm"): (None, 6, 16),
        layers.LSTM(16, name="lstm"): (None, 6, 16),
        layers.Conv2D(32, 3, name="conv"): image,
        layers.BatchNormalization(name="bn"): image,
        layers.SeparableConv2D(32, 3, name="separable"): image,
        layers.DepthwiseConv2D(3, name="depthwise"): image,
        layers.Dense(32, name="hidden"): (None, 16),
        layers.Dense(16, name="down"): (None, 32),
        layers.Dense(1, name="head"): (None, 16),
    }
    attention = layers.MultiHeadAttention(2, 8, name="attention")

    def params():
        for layer, shape in built.items():
            layer.build(shape)
        attention.build((None, 6, 16), (None, 6, 16))
        built_layers = (*built, attention)
        return compat.params_of(v for layer in built_layers for v in layer.trainable_variables)

    rows = optax_muon.label(jax.eval_shape(params)).rows
    assert {row.path for row in rows if row.view is not None} == {
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "attention_output")),
        "lstm/lstm_cell/kernel",
        "lstm/lstm_cell/recurrent_kernel",
        "conv/kernel",
        "separable/pointwise_kernel",
        "hidden/kernel",
        "down/kernel",
    }
