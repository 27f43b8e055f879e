"""Forms: one update, whichever is chosen, and the choice of one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from polar_reference import (
    SPECTRA,
    every_spectrum,
    every_table,
    naive_loop,
    not_finite,
    relative_error,
    true_update,
)

from optax_muon import hlo
from optax_muon.platforms import PLATFORMS
from optax_muon.polar import (
    CUBIC,
    KELLER,
    POLAR_EXPRESS_8,
    AsStored,
    Barrier,
    Full,
    Gram,
    NewtonSchulz,
    Panels,
    Plain,
    choose_form,
    default_restarts,
    newton_schulz,
)


def forms(table, dtype):
    restarts = default_restarts(len(table.rows), dtype)
    kinds = [Plain, functools.partial(Gram, restarts)]
    panels = [Plain(Panels(3), looped=True), Gram(restarts), Gram(restarts, Panels(3))]
    products = [Barrier(), AsStored()] if dtype == jnp.float32 else [Barrier()]
    others = [form(each) for each in products for form in kinds]
    return [*panels, *others]


def error_in_bfloat16(table, spectrum):
    """From a form to its error on matrices of this spectrum."""
    u, sigma, vt, x = SPECTRA[spectrum]
    x, truth = jnp.asarray(x, jnp.float32), true_update(u, sigma, vt, table)
    run = functools.partial(newton_schulz, x, table, dtype=jnp.bfloat16)
    return lambda form: relative_error(run(form=form), truth)


@every_table
@every_spectrum
def test_all_forms_give_one_update_in_float32(table, spectrum):
    u, sigma, vt, x = SPECTRA[spectrum]
    x = jnp.asarray(x, jnp.float32)
    if spectrum == "rank one":
        # Every form leaves some units of rounding in each of 95 null directions, on their own, and
        # they grow by the slope at zero: against the truth, 1 to 2.5 units of 1.2e-7.
        reference = true_update(u, sigma, vt, table)
        slope = math.prod(a for a, _, _ in table.rows)
        bound = max(1e-4, 3 * jnp.finfo(jnp.float32).eps * slope)
    else:
        reference, bound = newton_schulz(x, table, form=Plain()), 1e-4
    for form in (Plain(), *forms(table, jnp.float32)):
        assert relative_error(newton_schulz(x, table, form=form), reference) < bound, form


@every_table
@every_spectrum
def test_all_forms_have_the_error_of_the_plain_one_in_bfloat16(table, spectrum):
    error = error_in_bfloat16(table, spectrum)
    plain = error(Plain())
    for form in forms(table, jnp.bfloat16):
        # Measured 0.8 to 1.84.
        assert error(form) < 2 * plain, form


@not_finite
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("shape", [(12, 24), (24, 12)], ids=["wide", "tall"])
def test_a_matrix_that_is_not_finite_becomes_nan_and_its_neighbours_do_not(shape, dtype, bad):
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    x[1, 2, 3], x[3] = bad, 0
    for form in (None, Plain(), *forms(KELLER, dtype)):
        y = np.asarray(newton_schulz(jnp.asarray(x), dtype=dtype, form=form))
        assert np.isnan(y[1]).all(), form
        for alone in (0, 2):
            # The loop without rounding: two or three digits of half precision are left.
            bound = 1e-4 if dtype == jnp.float32 else 0.05
            assert relative_error(y[alone], naive_loop(x[alone], KELLER.rows)) < bound, form
        assert not y[3].any(), form


@every_table
@every_spectrum
def test_rounding_what_is_added_to_a_square_costs_the_plain_form_no_accuracy(table, spectrum):
    error = error_in_bfloat16(table, spectrum)
    # Measured 1.0: both round A once, before it is squared and added.
    assert error(Plain(Barrier())) < 1.05 * error(Plain())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_table
def test_square_matrices_take_steps_and_elongated_ones_their_gram_matrix(table, dtype, platform):
    take = functools.partial(choose_form, rows=table.rows, dtype=dtype, platform=platform)
    assert isinstance(take(512, 512), Plain)
    assert isinstance(take(512, 4096), Gram)
    assert take(64, 2048).restarts == default_restarts(len(table.rows), dtype)


@pytest.mark.parametrize("aspect", [1, 4])
def test_large_products_are_halved_on_cpu_and_no_others(aspect):
    def halved(platform, dtype):
        forms = [
            choose_form(m, aspect * m, KELLER.rows, dtype=dtype, platform=platform)
            for m in (64, 128, 256, 512, 1024, 2048, 4096)
        ]
        return [not isinstance(form.products, Full) for form in forms]

    for dtype in ("float32", "bfloat16"):
        on_cpu = halved("cpu", dtype)
        assert on_cpu == sorted(on_cpu)  # once it pays, it pays for every larger matrix
        assert on_cpu[0] is False and on_cpu[-1] is True
    # Mirroring costs more of a fast product: it pays later in bfloat16.
    assert sum(halved("cpu", "bfloat16")) <= sum(halved("cpu", "float32"))
    assert not any(halved("tpu", "bfloat16") + halved("gpu", "bfloat16"))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("platform", PLATFORMS)
@every_table
def test_no_choice_takes_more_operations_than_whole_products_step_by_step(table, platform, devices):
    for m, n in ((64, 64), (512, 512), (512, 768), (1024, 4096), (256, 8192)):
        count = NewtonSchulz(table).count(m, n, devices, platform=platform)
        plain = NewtonSchulz(table, form=Plain()).count(m, n, devices, platform=platform)
        if devices == 1:
            assert count.flops <= plain.flops
        else:  # operations may be spent where they save a sum
            assert count.flops <= plain.flops or count.sums < plain.sums


def test_a_tall_matrix_counts_as_its_transpose():
    counted = functools.partial(NewtonSchulz().count, platform="tpu")
    assert counted(2048, 512) == counted(512, 2048)


def test_shared_columns_take_the_gram_form_where_sums_are_dear():
    take = functools.partial(choose_form, 512, 2048, KELLER.rows)
    assert isinstance(take(dtype="bfloat16", platform="tpu", devices=8), Gram)
    # Between fake devices of one CPU the repeated m x m algebra costs more than the sums.
    assert isinstance(take(dtype="float32", platform="cpu", devices=8), Plain)


def compiled_flops(m, n, **options):
    """Operations of the products in the compiled program, those in loops once per iteration."""
    x = jax.ShapeDtypeStruct((m, n), jnp.float32)
    program = jax.jit(functools.partial(newton_schulz, **options)).lower(x).compile()
    return hlo.flops(program.as_text())


@pytest.mark.parametrize(
    ("m", "n", "most"),
    [(1024, 1024, 0.75), (2048, 2048, 0.75), (1024, 4096, 0.48), (2048, 8192, 0.45)],
)
def test_the_work_against_the_plain_form(m, n, most):
    plain = Plain().count(m, n, KELLER.rows).flops
    assert compiled_flops(m, n) <= most * plain


@pytest.mark.parametrize(("m", "n"), [(96, 96), (512, 512), (512, 640), (768, 3072), (1000, 4000)])
@pytest.mark.parametrize("table", [KELLER, POLAR_EXPRESS_8, CUBIC], ids=lambda table: table.name)
def test_the_program_does_what_is_counted(m, n, table):
    form = choose_form(m, n, table.rows, dtype="float32", platform="cpu")
    assert compiled_flops(m, n, coefficients=table) == form.count(m, n, table.rows).flops


def test_forms_that_differ_are_printed_differently_and_counts_name_their_form():
    forms = [Plain(), Plain(Panels(4)), Gram((2, 4)), Gram((3,)), Gram((3,), Panels(8))]
    assert len({str(form) for form in forms}) == len(forms)
    for form in forms:
        assert form.count(512, 1024, KELLER.rows).form == str(form)
