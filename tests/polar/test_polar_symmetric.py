"""Products known to be symmetric: the numbers, the symmetry to the last bit, and the work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_muon.polar import Full, Panels

WAYS = [Full(), Panels(2), Panels(3), Panels(8)]
every_way = pytest.mark.parametrize("way", WAYS, ids=repr)


def gaussian(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def commuting(m, batch=(), seed=0):
    """Two polynomials of one symmetric matrix, in float64."""
    x = gaussian(*batch, m, 2 * m, dtype=np.float64, seed=seed) / np.sqrt(2 * m)
    gram = x @ np.swapaxes(x, -1, -2)
    return gram, 2 * np.eye(m) - 1.5 * gram + 0.5 * gram @ gram


@every_way
@pytest.mark.parametrize(
    "shape", [(64, 96), (130, 77), (3, 33, 40), (31, 40), (2, 2, 17, 64), (5, 3), (1, 4)]
)
def test_a_gram_matrix_is_numpys(way, shape):
    x = gaussian(*shape)
    found = way(jnp.asarray(x), jnp.asarray(x))
    truth = x.astype(np.float64) @ np.swapaxes(x, -1, -2).astype(np.float64)
    # Sums of k float32 products round by sqrt(k) eps of their terms: 1e-6 of the largest entry.
    np.testing.assert_allclose(found, truth, atol=2e-6 * np.abs(truth).max())


@every_way
@pytest.mark.parametrize("m", [16, 65, 128])
def test_a_product_of_commuting_matrices_is_numpys(way, m):
    a, b = commuting(m, (2,))
    found = way(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(found, a @ b, atol=2e-6 * np.abs(a @ b).max())


@every_way
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_the_result_is_hermitian_to_the_last_bit(way, dtype):
    a, b = (jnp.asarray(x, jnp.float32).astype(dtype) for x in commuting(67))
    c = jax.jit(lambda a, b: way.symmetrize(way(a, b)))(a, b)
    np.testing.assert_array_equal(c, jnp.conj(c.mT))


@pytest.mark.parametrize("way", WAYS[1:], ids=repr)
def test_a_mirrored_gram_matrix_too(way):
    a = jnp.asarray(commuting(67)[0], jnp.float32)
    c = jax.jit(lambda a: way(a, a))(a)
    np.testing.assert_array_equal(c, c.mT)


def test_bfloat16_operands_are_summed_in_float32():
    a, _ = commuting(96)
    short = jnp.asarray(a, jnp.bfloat16)
    found = Panels(4)(short, short)
    assert found.dtype == jnp.float32
    exact = np.asarray(short, np.float64) @ np.asarray(short, np.float64).T
    np.testing.assert_allclose(found, exact, atol=2e-6 * np.abs(exact).max())


@every_way
def test_zero_stays_zero_and_a_batch_is_a_loop(way):
    x = jnp.asarray(gaussian(3, 24, 40)).at[1].set(0.0)
    found = way(x, x)
    assert not found[1].any()
    for i in range(3):
        np.testing.assert_allclose(found[i], way(x[i], x[i]), atol=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=repr)
@pytest.mark.parametrize(("m", "k"), [(64, 64), (64, 256), (100, 100)])
def test_the_compiled_program_does_the_work_that_is_counted(way, m, k):
    x = jax.ShapeDtypeStruct((m, k), jnp.float32)
    text = jax.jit(lambda x: way(x, x)).lower(x).as_text()
    found = 0
    for line in re.findall(r"stablehlo\.dot_general.*", text):
        rows, inner = map(int, re.search(r": \(tensor<(\d+)x(\d+)x", line).groups())
        found += 2 * rows * inner * int(re.search(r"-> tensor<\d+x(\d+)x", line).group(1))
    assert found == way.flops(m, k)


def test_panels_halve_the_work_as_they_become_many():
    shares = [Panels(t).flops(1024, 1024) / Full().flops(1024, 1024) for t in (1, 2, 4, 8)]
    assert shares == [1, 0.75, 0.625, 0.5625]
    # Long sums keep narrower panels busy.
    assert Panels(8).flops(1024, 4096) / Full().flops(1024, 4096) == 0.53125
    # Panels are of equal height: a prime number of rows is one.
    assert Panels(8).flops(31, 31) == Full().flops(31, 31)
