"""What programs for TPUs compute, run on CPU: the laws hold there as well."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from polar_reference import every_table, naive_loop, not_finite, relative_error

from optax_muon.platforms import PLATFORMS
from optax_muon.polar import KELLER, Barrier, Gram, NewtonSchulz, Plain

FORMS = {"plain": Plain(Barrier()), "gram": Gram((3,), Barrier())}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def as_on_tpu(monkeypatch):
    """Let the norm enter the first step, and tall matrices stay as they lie."""
    here = dataclasses.replace(PLATFORMS["cpu"], operand_barrier=True)
    module = sys.modules[NewtonSchulz.__module__]
    monkeypatch.setattr(module, "get_platform", lambda name: here)


def gaussian(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@every_form
@every_table
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (17, 1)])
def test_any_shape_equals_a_naive_float64_loop(form, table, shape):
    x = gaussian(*shape)
    truth = naive_loop(x, table.rows, table.safety)
    # A single column has singular value 1, which CUBIC first sends to 0.02: 280 times its rounding.
    bound = 280 * float(jnp.finfo(jnp.float32).eps) if table.name == "cubic" else 3e-5
    assert relative_error(NewtonSchulz(table, form=form)(x), truth) < bound


@every_form
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
def test_powers_of_two_change_no_bit(form, dtype, exponent):
    run = NewtonSchulz(dtype=dtype, form=form)
    x = gaussian(24, 40)
    np.testing.assert_array_equal(run(x * 2.0**exponent), run(x))


@every_form
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_a_batch_is_a_loop_whatever_the_scales(form, dtype):
    run = NewtonSchulz(dtype=dtype, form=form)
    x = gaussian(4, 40, 24) * jnp.array([1e-30, 0.0, 1.0, 1e30])[:, None, None]
    y = run(x)
    assert not y[1].any()
    tolerance = 1e-5 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    for each, alone in zip(y, map(run, x), strict=True):
        np.testing.assert_allclose(each, alone, atol=tolerance)


@every_form
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
def test_a_long_side_overflows_in_no_dtype(form, dtype, tall):
    x = jnp.sign(gaussian(3, 70_000))  # of entries of 1, the Gram matrix has 70,000 as diagonal
    run = NewtonSchulz(dtype=dtype, form=form)
    y = run(x.T).T if tall else run(x)
    # A few units of rounding.
    assert relative_error(y, naive_loop(x, KELLER.rows)) < 16 * float(jnp.finfo(dtype).eps)


@every_form
@not_finite
@pytest.mark.parametrize("shape", [(12, 24), (24, 12)], ids=["wide", "tall"])
def test_a_matrix_that_is_not_finite_becomes_nan_and_its_neighbours_do_not(form, shape, bad):
    x = gaussian(3, *shape).at[1, 2, 3].set(bad)
    y = NewtonSchulz(form=form)(x)
    assert jnp.isnan(y[1]).all()
    for alone in (0, 2):
        assert relative_error(y[alone], naive_loop(x[alone], KELLER.rows)) < 3e-5


@every_form
def test_the_derivative_at_a_zero_matrix_is_zero(form):
    run = NewtonSchulz(form=form)
    slope = jax.grad(lambda x: run(x).sum())(jnp.zeros((6, 9)))
    assert not slope.any()


@every_form
def test_complex_matrices_become_unitary(form):
    x = jax.lax.complex(gaussian(12, 5), gaussian(12, 5)[::-1])
    y, truth = (functools.partial(NewtonSchulz, form=each)()(x) for each in (form, Plain()))
    np.testing.assert_allclose(y, truth, atol=1e-4)
