"""The exact factor: against a float64 decomposition, and on matrices that have null directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from polar_reference import not_finite, orthonormal, relative_error, with_spectrum

from optax_muon.polar import DEEPSEEK_V4, newton_schulz, polar_svd, update_rms


def gaussian(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (2, 3, 8, 5), (1, 9), (9, 1)])
def test_it_is_the_float64_polar_factor(shape):
    x = gaussian(*shape)
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    # Conditioned by the gap to zero: 1e-7 over the smallest singular value, here about 1e-2.
    assert relative_error(polar_svd(x), u @ vt) < 1e-4


def test_it_is_where_newton_schulz_goes():
    x = gaussian(24, 48)
    # DEEPSEEK_V4 ends within 5e-4 of 1.
    assert relative_error(newton_schulz(x, DEEPSEEK_V4), polar_svd(x)) < 1e-3


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_null_directions_stay_zero(rank):
    sigma = np.zeros(12)
    sigma[:rank] = np.linspace(1, 2, rank)
    u, _, vt, x = with_spectrum(sigma, 12, 20)
    found = polar_svd(jnp.asarray(x, jnp.float32))
    assert relative_error(found, u[:, :rank] @ vt[:rank]) < 1e-5


def test_zero_in_is_zero_out_beside_matrices_that_are_not():
    x = gaussian(3, 6, 9).at[1].set(0)
    y = polar_svd(x)
    assert not np.asarray(y[1]).any()
    np.testing.assert_allclose(y[2], polar_svd(x[2]), atol=1e-6)


@not_finite
def test_a_matrix_that_is_not_finite_becomes_nan_and_its_neighbours_do_not(bad):
    x = gaussian(3, 6, 9).at[1, 2, 3].set(bad)
    y = polar_svd(x)
    assert jnp.isnan(y[1]).all()
    for alone in (0, 2):
        u, _, vt = np.linalg.svd(np.asarray(x[alone], np.float64), full_matrices=False)
        assert relative_error(y[alone], u @ vt) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_input_does_not_matter(scale):
    x = gaussian(12, 20)
    np.testing.assert_allclose(polar_svd(x * scale), polar_svd(x), atol=1e-5)


def test_rotations_pass_through():
    x = gaussian(12, 20)
    q = jnp.asarray(orthonormal(12, 12, 1), jnp.float32)
    r = jnp.asarray(orthonormal(20, 20, 2), jnp.float32)
    np.testing.assert_allclose(polar_svd(q @ x @ r), q @ polar_svd(x) @ r, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64], ids=str)
def test_the_dtype_is_kept(dtype):
    x = gaussian(6, 9).astype(dtype)
    y = polar_svd(x)
    assert y.dtype == dtype
    wide = np.asarray(y.astype(jnp.complex64))
    np.testing.assert_allclose(wide @ wide.conj().T, np.eye(6), atol=0.02)


def test_float64_is_exact_to_float64():
    u, _, vt, x = with_spectrum(np.geomspace(1, 1e-3, 12), 12, 20)
    with jax.enable_x64(True):
        assert relative_error(polar_svd(jnp.asarray(x, jnp.float64)), u @ vt) < 1e-11


# --------------------------------------------------------------------- Lemma 1 of arXiv 2502.16982


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (1, 64)])
def test_lemma_1_a_full_rank_update_has_rms_one_over_the_root_of_the_long_side(shape):
    found = update_rms(polar_svd(gaussian(*shape)))
    np.testing.assert_allclose(found, max(shape) ** -0.5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_lemma_1_an_update_of_rank_r_has_rms_root_of_r_over_the_entries(rank):
    x = gaussian(16, rank) @ gaussian(rank, 48, seed=1)
    np.testing.assert_allclose(update_rms(polar_svd(x)), (rank / (16 * 48)) ** 0.5, rtol=1e-5)


def test_what_is_not_a_float_matrix_is_refused():
    with pytest.raises(TypeError, match="floating point is accepted"):
        polar_svd(jnp.ones((3, 4), jnp.int32))
    with pytest.raises(ValueError, match="are accepted"):
        polar_svd(jnp.ones(3))
