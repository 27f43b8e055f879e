"""Newton-Schulz: its laws, its numbers against float64, and the programs it compiles to."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from polar_reference import (
    SPECTRA,
    every_table,
    gaussian_spectrum,
    naive_loop,
    orthonormal,
    relative_error,
    true_update,
    with_spectrum,
)

from optax_muon.polar import (
    CUBIC,
    DEEPSEEK_V4,
    KELLER,
    POLAR_EXPRESS,
    POLAR_EXPRESS_8,
    Plain,
    gram_newton_schulz,
    newton_schulz,
    update_rms,
)

plain = functools.partial(newton_schulz, form=Plain())

FORMS = [newton_schulz, gram_newton_schulz]
EPS = float(jnp.finfo(jnp.float32).eps)

every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def gaussian(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# ---------------------------------------------------------------------------------------- numbers


@every_table
@pytest.mark.parametrize("spectrum", ["gaussian", "power law", "32 to 1"])
def test_singular_values_follow_the_scalar_map(table, spectrum):
    u, sigma, vt, x = SPECTRA[spectrum]
    found = plain(jnp.asarray(x, jnp.float32), table)
    # Measured 1e-6 to 5e-6: the float32 rounding of five to ten steps.
    assert relative_error(found, true_update(u, sigma, vt, table)) < 1e-5


@every_table
@pytest.mark.parametrize("spectrum", ["log-spaced to 1e-4", "rank eight and noise"])
def test_small_singular_values_follow_the_scalar_map(table, spectrum):
    u, sigma, vt, x = SPECTRA[spectrum]
    found = newton_schulz(jnp.asarray(x, jnp.float32), table)
    # Rounding at the size of the largest value is lifted by the slope at zero, 8e4 at most.
    slope = table(1e-12) / 1e-12
    assert relative_error(found, true_update(u, sigma, vt, table)) < 1e-5 + slope * EPS / 10


@pytest.mark.parametrize(
    ("table", "steps"), [(KELLER, 1), (KELLER, 10), (DEEPSEEK_V4, 8), (POLAR_EXPRESS_8, 9)]
)
def test_steps_are_the_steps_of_the_scalar_map(table, steps):
    u, sigma, vt, x = SPECTRA["gaussian"]
    found = newton_schulz(jnp.asarray(x, jnp.float32), table, steps=steps)
    assert relative_error(found, true_update(u, sigma, vt, table, steps)) < 1e-5


@every_table
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 17), (17, 1), (1, 1)])
def test_any_shape_equals_a_naive_float64_loop(table, shape):
    x = gaussian(*shape)
    truth = naive_loop(x, table.rows, table.safety)
    # A single row has singular value 1, which CUBIC first sends to 0.02: 280 times its rounding.
    bound = 280 * EPS if table is CUBIC else 2e-5
    # Optimized as a user's program is: POLAR_EXPRESS lifts the rounding of a row 176 times.
    optimized = jax.jit(
        functools.partial(newton_schulz, coefficients=table),
        compiler_options={"xla_backend_optimization_level": 3},
    )
    assert relative_error(optimized(x), truth) < bound


def test_bfloat16_is_the_iteration_of_torch():
    torch = pytest.importorskip("torch")
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = gaussian(96, 192)
    peer = _zeropower_via_newtonschulz(torch.tensor(np.asarray(x)), KELLER.rows[0], 5, 1e-7)
    truth = naive_loop(x, KELLER.rows)
    found = relative_error(newton_schulz(x, dtype=jnp.bfloat16), truth)
    theirs = relative_error(peer.float().numpy(), truth)
    # Both round to 8 bits: 2 % off on this spectrum. Rounding operands alone makes ours no worse.
    assert 0 < found < 0.03
    assert found < 1.2 * theirs


@every_table
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("spectrum", ["gaussian", "power law", "32 to 1"])
def test_half_precision_rounds_operands_alone(table, dtype, spectrum):
    # A naive float64 loop that rounds X, A and b A + c A^2, once each in a step, as torch's does.
    u, sigma, vt, x = SPECTRA[spectrum]
    truth = true_update(u, sigma, vt, table)
    rounded = naive_loop(
        x, table.rows, table.safety, lambda each: each.astype(dtype).astype(np.float64)
    )
    found = relative_error(plain(jnp.asarray(x, jnp.float32), table, dtype=dtype), truth)
    # The sum of 9216 or more independent roundings varies by a few percent.
    assert 0 < found < 1.1 * relative_error(rounded, truth)


@every_table
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(jnp.bfloat16, 0.05), (jnp.float16, 0.05 / 8)],
    ids=["bfloat16", "float16"],
)
def test_half_precision_is_as_near_as_its_digits(table, dtype, bound):
    # float16 has 3 more bits than bfloat16: 8 times nearer. Measured .006-.038 and .0007-.005.
    u, sigma, vt, x = SPECTRA["gaussian"]
    found = newton_schulz(jnp.asarray(x, jnp.float32), table, dtype=dtype)
    assert relative_error(found, true_update(u, sigma, vt, table)) < bound


def test_float64_is_kept_on_cpu():
    u, sigma, vt, x = SPECTRA["gaussian"]
    with jax.enable_x64(True):
        found = newton_schulz(jnp.asarray(x, jnp.float64))
        assert found.dtype == jnp.float64
        assert relative_error(found, true_update(u, sigma, vt, KELLER)) < 1e-13


@every_form
def test_complex_matrices_become_unitary(form):
    x = jax.lax.complex(gaussian(12, 5), gaussian(12, 5, seed=1))
    y = np.asarray(form(x, DEEPSEEK_V4))
    assert y.dtype == np.complex64
    # The table ends in [1.0000, 1.0005].
    np.testing.assert_allclose(y.conj().T @ y, np.eye(5), atol=2e-3)
    phase = np.exp(0.7j).astype(np.complex64)
    np.testing.assert_allclose(form(x * phase, DEEPSEEK_V4), y * phase, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (256, 96), (96, 256), (1024, 256)])
def test_a_fifth_of_the_paper_scale_is_the_update_size_of_adamw(shape):
    # The nominal 0.2 becomes .17 to .21: KELLER does not end at 1.
    update = 0.2 * max(shape) ** 0.5 * newton_schulz(gaussian(*shape))
    assert 0.17 < update_rms(update) < 0.21


@pytest.mark.parametrize("shape", [(16, 512), (512, 16), (64, 2048), (1, 128)])
def test_the_update_of_elongated_matrices_has_the_size_of_its_one_singular_value(shape):
    # Their singular values all lie about 1 / sqrt(k), which KELLER sends to anywhere from .68 to
    # 1.13: the nominal 0.2 is .146 for 64 rows and .21 for 256.
    update = 0.2 * max(shape) ** 0.5 * newton_schulz(gaussian(*shape))
    assert 0.2 * 0.68 < update_rms(update) < 0.2 * 1.14


# ------------------------------------------------------------------------------------------- laws


@every_form
@every_table
def test_rotations_pass_through(form, table):
    # f(Q X R) = Q f(X) R.
    x = gaussian(24, 40)
    q = jnp.asarray(orthonormal(24, 24, 1), jnp.float32)
    r = jnp.asarray(orthonormal(40, 40, 2), jnp.float32)
    assert relative_error(form(q @ x @ r, table), q @ form(x, table) @ r) < 5e-5


@every_form
@every_table
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_scale_of_the_input_does_not_matter(form, table, scale):
    x = gaussian(24, 40)
    # Scaling rounds each entry once, and that is lifted like any rounding.
    assert relative_error(form(x * scale, table), form(x, table)) < 2e-5


@every_form
@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
def test_powers_of_two_change_no_bit(form, exponent):
    x = gaussian(24, 40)
    np.testing.assert_array_equal(form(x * 2.0**exponent), form(x))


@every_form
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(jnp.bfloat16, (1e-30, 1.0, 1e30)), (jnp.float16, (1e-3, 1.0, 1e4))],
    ids=["bfloat16", "float16"],
)
def test_short_inputs_of_any_size_are_served(form, dtype, scales):
    for scale in scales:
        # float16 ends at 65504, and below 6e-5 it has fewer digits: its own range, not ours.
        x = (gaussian(24, 40) * scale).astype(dtype)
        y = form(x)
        assert y.dtype == dtype
        truth = naive_loop(np.asarray(x, np.float64), KELLER.rows)
        # Computed in float32 here, so only the output is rounded: half a unit, 2^-9 or 2^-12.
        assert relative_error(y.astype(jnp.float32), truth) < float(jnp.finfo(dtype).eps) / 2


@every_form
@every_table
def test_transposition_passes_through(form, table):
    x = gaussian(2, 24, 40)
    np.testing.assert_allclose(form(x.mT, table), form(x, table).mT, atol=1e-5)


@every_form
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16], ids=str)
def test_zero_rows_and_columns_stay_zero(form, dtype):
    x = gaussian(12, 20).at[3].set(0).at[:, 7].set(0)
    y = np.asarray(form(x, dtype=dtype))
    assert not y[3].any() and not y[:, 7].any()
    alone = form(jnp.delete(jnp.delete(x, 3, 0), 7, 1), dtype=dtype)
    # Padding changes the order of sums and nothing else.
    tolerance = 1e-5 if dtype is None else 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.delete(np.delete(y, 3, 0), 7, 1), alone, atol=tolerance)


@every_form
@pytest.mark.parametrize("shape", [(6, 8, 24), (2, 3, 24, 8), (3, 16, 16)])
def test_a_batch_is_a_loop(form, shape):
    x = gaussian(*shape) * jnp.exp(gaussian(*shape[:-2], 1, 1) * 10)
    looped = jnp.stack([form(one) for one in x.reshape(-1, *shape[-2:])]).reshape(shape)
    np.testing.assert_allclose(form(x), looped, atol=1e-5)


@every_form
def test_jit_and_vmap_change_nothing(form):
    x = gaussian(3, 16, 24)
    np.testing.assert_allclose(jax.jit(jax.vmap(form))(x), form(x), atol=1e-5)


@every_form
@every_table
def test_zero_in_is_zero_out_beside_matrices_that_are_not(form, table):
    x = gaussian(3, 8, 12).at[1].set(0)
    y = form(x, table)
    assert not np.asarray(y[1]).any()
    np.testing.assert_allclose(y[0], form(x[0], table), atol=1e-5)


@every_form
@every_table
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_finite_input_gives_finite_output(form, table, dtype):
    extremes = [3e38, -1e38, 1e-37, 1e-40, 1e-45]
    hard = [
        jnp.zeros((6, 9)),
        jnp.ones((6, 9)),
        jnp.zeros((6, 9)).at[2, 3].set(3e38),
        *[jnp.full((6, 9), value) for value in extremes],
        gaussian(6, 9).at[0, 0].set(1e30),
    ]
    y = np.asarray(form(jnp.stack(hard), table, dtype=dtype))
    assert np.isfinite(y).all()
    assert np.abs(y).max() < 1.4


@every_form
def test_empty_matrices_pass(form):
    assert form(jnp.zeros((0, 3, 4))).shape == (0, 3, 4)
    assert form(jnp.zeros((3, 0))).shape == (3, 0)


# ----------------------------------------------------------------------------------------- errors


@every_form
def test_what_is_not_a_float_matrix_is_refused(form):
    with pytest.raises(TypeError, match=r"dtype int32 .* floating point is accepted"):
        form(jnp.ones((3, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"shape \(3,\) .* \[\.\.\., m, n\] are accepted"):
        form(jnp.ones(3))


@every_form
def test_what_is_not_a_dtype_to_compute_in_is_refused(form):
    for dtype in (jnp.int32, jnp.complex64, jnp.float8_e4m3fn):
        with pytest.raises(TypeError, match="one of bfloat16, float16, float32, float64"):
            form(jnp.ones((3, 4)), dtype=dtype)


@every_form
def test_steps_that_do_not_fit_raise(form):
    with pytest.raises(ValueError, match="steps=3 does not fit polar_express"):
        form(jnp.ones((3, 4)), POLAR_EXPRESS, steps=3)


# ----------------------------------------------------------------------------- compiled programs


def products(text):
    """Return the operand types and precisions of the matrix products in StableHLO text."""
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    operands = {re.search(r": \(tensor<\w*x(\w+)>, tensor<\w*x(\w+)>\)", x).groups() for x in lines}
    results = {re.search(r"-> tensor<\w*x(\w+)>", x).group(1) for x in lines}
    precisions = set(re.findall(r"precision = \[(\w+), \w+\]", "".join(lines)))
    return len(lines), operands, results, precisions


def lowered(form, platform, **options):
    x = jax.ShapeDtypeStruct((4, 16, 64), jnp.float32)
    traced = jax.jit(lambda x: form(x, **options)).trace(x)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_an_accelerator_program_from_a_cpu_host_multiplies_bfloat16(platform):
    count, operands, results, precisions = products(lowered(plain, platform))
    assert (count, operands, results) == (15, {("bf16", "bf16")}, {"f32"})
    assert precisions == {"DEFAULT"}


def test_a_cpu_program_multiplies_float32():
    count, operands, results, _ = products(lowered(plain, "cpu"))
    assert (count, operands, results) == (15, {("f32", "f32")}, {"f32"})


def test_the_compiled_cpu_program_has_one_branch():
    x = jax.ShapeDtypeStruct((4, 16, 64), jnp.float32)
    text = jax.jit(plain).lower(x).compile().as_text()
    assert len(re.findall(r"= \S+ dot\(", text)) == 15
    assert "bf16" not in text and "conditional" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_an_explicit_float32_is_full_float32(platform):
    _, operands, _, precisions = products(lowered(newton_schulz, platform, dtype=jnp.float32))
    assert (operands, precisions) == ({("f32", "f32")}, {"HIGHEST"})


def test_a_cubic_costs_two_products_a_step():
    assert products(lowered(plain, "cpu", coefficients=CUBIC))[0] == 10


def test_the_gram_form_follows_the_platform():
    assert products(lowered(gram_newton_schulz, "tpu"))[1:3] == ({("bf16", "bf16")}, {"f32"})
    assert products(lowered(gram_newton_schulz, "cpu"))[1:3] == ({("f32", "f32")}, {"f32"})


def test_a_batch_over_devices_needs_no_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    layout = jax.NamedSharding(mesh, jax.P("data"))
    x = gaussian(8, 16, 48)
    program = jax.jit(newton_schulz).lower(jax.device_put(x, layout)).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|permute", program.as_text())
    y = program(jax.device_put(x, layout))
    assert y.sharding.spec[0] == "data"
    np.testing.assert_allclose(jax.device_get(y), jax.device_get(newton_schulz(x)), atol=1e-5)


def test_a_gaussian_helper_has_the_spectrum_it_claims():
    sigma = gaussian_spectrum(8, 16)
    x = with_spectrum(sigma, 8, 16)[3]
    np.testing.assert_allclose(np.linalg.svd(x)[1], sigma, rtol=1e-12)


def test_a_form_that_loops_is_accepted_on_every_platform():
    """On TPUs the first step has arrays for coefficients, which cannot be compared."""
    x = jax.random.normal(jax.random.key(0), (2, 16, 48))
    form = Plain(looped=True)
    np.testing.assert_allclose(newton_schulz(x, form=form), newton_schulz(x), atol=1e-5)
    jax.jit(lambda x: newton_schulz(x, form=form)).trace(x).lower(lowering_platforms=("tpu",))
