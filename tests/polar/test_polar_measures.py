"""The measures: against numpy loops, at their bounds, and finite where matrices are zero."""

import jax.numpy as jnp
import numpy as np
import pytest
from polar_reference import not_finite, orthonormal, with_spectrum

from optax_muon.polar import orthogonality_error, stable_rank, svd_entropy, update_rms

MEASURES = [orthogonality_error, stable_rank, svd_entropy, update_rms]
SCALE_FREE = [stable_rank, svd_entropy]


def gaussian(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loop(x, measure):
    """Apply a numpy function of one float64 matrix over the batch axes."""
    x = np.asarray(x, np.float64)
    return np.array([measure(one) for one in x.reshape(-1, *x.shape[-2:])]).reshape(x.shape[:-2])


def entropy_by_loop(x):
    squares = [s * s for s in np.linalg.svd(x)[1]]
    shares = [square / sum(squares) for square in squares]
    return -sum(q * np.log(q) for q in shares) / np.log(len(shares))


def orthogonality_by_loop(x):
    squares = np.linalg.svd(x)[1] ** 2
    return np.sqrt(np.mean((squares - 1) ** 2))


TRUTH = {
    svd_entropy: entropy_by_loop,
    stable_rank: lambda x: (np.linalg.norm(x) / np.linalg.norm(x, 2)) ** 2,
    update_rms: lambda x: np.sqrt(np.mean(x**2)),
    orthogonality_error: orthogonality_by_loop,
}


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (2, 3, 5, 8)])
def test_a_measure_is_its_definition_in_a_numpy_loop(measure, shape):
    x = gaussian(*shape)
    found = measure(x)
    assert found.shape == shape[:-2] and found.dtype == jnp.float32
    np.testing.assert_allclose(found, loop(x, TRUTH[measure]), rtol=1e-5)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64], ids=str)
def test_any_float_is_measured_in_float32(measure, dtype):
    x = gaussian(6, 9).astype(dtype)
    found = measure(x)
    assert found.dtype == jnp.float32
    exact = np.asarray(x.astype(jnp.complex64)).real
    np.testing.assert_allclose(found, loop(exact, TRUTH[measure]), rtol=1e-5)


@pytest.mark.parametrize(
    ("measure", "value"),
    [(orthogonality_error, 1), (stable_rank, 0), (svd_entropy, 0), (update_rms, 0)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_zero_matrices_have_the_documented_value(measure, value):
    x = gaussian(3, 6, 9).at[1].set(0)
    found = measure(x)
    assert found[1] == value
    np.testing.assert_allclose(found[2], measure(x[2]), rtol=1e-5)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
@not_finite
def test_a_matrix_that_is_not_finite_has_no_finite_measure(measure, bad):
    x = gaussian(3, 6, 9).at[1, 2, 3].set(bad)
    found = measure(x)
    assert not jnp.isfinite(found[1])
    np.testing.assert_allclose(found[::2], loop(x[::2], TRUTH[measure]), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_an_orthogonal_matrix_has_entropy_one_full_rank_and_no_error(shape):
    x = jnp.asarray(orthonormal(*shape, seed=0), jnp.float32)
    np.testing.assert_allclose(svd_entropy(x), 1, atol=1e-5)
    np.testing.assert_allclose(stable_rank(x), min(shape), rtol=1e-5)
    np.testing.assert_allclose(orthogonality_error(x), 0, atol=1e-6)
    np.testing.assert_allclose(update_rms(x), max(shape) ** -0.5, rtol=1e-5)


def test_a_rank_one_matrix_has_entropy_zero_and_stable_rank_one():
    x = gaussian(8, 1) @ gaussian(1, 20, seed=1)
    np.testing.assert_allclose(svd_entropy(x), 0, atol=1e-5)
    np.testing.assert_allclose(stable_rank(x), 1, rtol=1e-5)


def test_entropy_lies_between_its_bounds_and_orders_spectra_by_evenness():
    spectra = [1 / np.arange(1, 13.0) ** power for power in (4, 2, 1, 0.5, 0)]
    found = [
        float(svd_entropy(jnp.asarray(with_spectrum(sigma, 12, 20)[3], jnp.float32)))
        for sigma in spectra
    ]
    assert found == sorted(found)
    assert found[0] > 0 and found[-1] <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_a_single_row_or_column_is_one_direction(shape):
    x = gaussian(*shape)
    assert svd_entropy(x) == 0
    np.testing.assert_allclose(stable_rank(x), 1, rtol=1e-6)


@pytest.mark.parametrize("measure", SCALE_FREE, ids=lambda measure: measure.__name__)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_what_counts_directions_does_not_see_the_scale(measure, scale):
    x = gaussian(6, 9)
    np.testing.assert_allclose(measure(x * scale), measure(x), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_rms_neither_overflows_nor_underflows(scale):
    x = gaussian(6, 9)
    np.testing.assert_allclose(update_rms(x * scale), scale * float(update_rms(x)), rtol=1e-5)


def test_a_rank_r_factor_misses_the_rest_of_the_identity():
    x = np.zeros((8, 12), np.float32)
    x[:6, :6] = np.eye(6)
    # Two of eight singular values are 0 instead of 1.
    np.testing.assert_allclose(orthogonality_error(jnp.asarray(x)), (2 / 8) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_what_is_not_a_float_matrix_is_refused(measure):
    with pytest.raises(TypeError, match="floating point is accepted"):
        measure(jnp.ones((3, 4), jnp.int32))
    with pytest.raises(ValueError, match="are accepted"):
        measure(jnp.ones(3))
