"""The tables: as published, cut only where they may be, and the generator that computes them."""

import dataclasses

import numpy as np
import pytest
from polar_reference import every_table

from optax_muon.polar import (
    COEFFICIENTS,
    CUBIC,
    DEEPSEEK_V4,
    KELLER,
    POLAR_EXPRESS,
    POLAR_EXPRESS_8,
    YOU,
    YOU_6,
    polar_express,
)


@every_table
def test_a_table_names_itself_its_source_and_its_division(table):
    assert table.name and table.source
    assert table.safety >= 1
    assert table.take() == table.take(len(table.rows)) == table.rows


# Slope at zero, and the band of outputs over [1e-3, 1] and over [1e-2, 1] of the Frobenius norm,
# measured independently to the digits written: peers' tables evaluated in exact arithmetic.
BANDS = [
    (KELLER, 485, (0.470, 1.202), (0.682, 1.134)),
    (YOU, 493, (0.475, 1.145), (0.978, 1.032)),
    (YOU_6, 1138, (0.866, 0.999), (0.996, 0.999)),
    (POLAR_EXPRESS, 970, (0.847, 1.141), (0.859, 1.141)),
    (POLAR_EXPRESS_8, 6469, (1.000, 1.000), (1.000, 1.000)),
    (DEEPSEEK_V4, 7.9e4, (1.0000, 1.0005), (1.0000, 1.0005)),
    (CUBIC, 119, (0.119, 1.300), (0.774, 1.300)),
]


@pytest.mark.parametrize(
    ("table", "slope", "thousandth", "hundredth"), BANDS, ids=[row[0].name for row in BANDS]
)
def test_singular_values_land_in_the_known_band(table, slope, thousandth, hundredth):
    for lower, band in ((1e-3, thousandth), (1e-2, hundredth)):
        landed = table(np.geomspace(lower, 1, 100_001))
        # Half a unit of the last digit, and one more for the grid.
        np.testing.assert_allclose((landed.min(), landed.max()), band, rtol=0, atol=1e-3)
    np.testing.assert_allclose(table(1e-12) / 1e-12, slope, rtol=5e-3)


def test_every_table_has_a_known_band():
    assert [row[0] for row in BANDS] == list(COEFFICIENTS.values())


@every_table
def test_an_input_a_little_above_its_norm_does_not_diverge(table):
    # bfloat16 rounding lengthens a rank-one matrix by at most 2^-8 = 0.4 %.
    assert np.abs(table(np.linspace(0, 1.004, 10_001))).max() < 1.31


def test_no_steps_given_means_the_whole_table():
    assert KELLER.take() == ((3.4445, -4.7750, 2.0315),) * 5
    assert DEEPSEEK_V4.take() == ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


@pytest.mark.parametrize(
    ("table", "steps"),
    [(KELLER, 1), (KELLER, 3), (KELLER, 10), (DEEPSEEK_V4, 8), (DEEPSEEK_V4, 12)],
)
def test_the_tail_may_be_dropped_or_repeated(table, steps):
    rows = table.take(steps)
    assert len(rows) == steps
    shared = min(steps, len(table.rows))
    assert rows[:shared] == table.rows[:shared]
    assert set(rows[shared:]) <= {table.tail}


def test_polar_express_continues_with_its_converged_step():
    assert POLAR_EXPRESS_8.take(10)[8:] == ((1.875, -1.25, 0.375),) * 2


@pytest.mark.parametrize(
    ("table", "steps"),
    [
        *[(table, 0) for table in COEFFICIENTS.values()],
        *[(table, -1) for table in COEFFICIENTS.values()],
        *[(table, 4) for table in (YOU, POLAR_EXPRESS, CUBIC)],
        *[(table, 7) for table in (YOU, YOU_6, POLAR_EXPRESS, POLAR_EXPRESS_8, DEEPSEEK_V4, CUBIC)],
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_any_other_cut_raises_one_clear_sentence(table, steps):
    with pytest.raises(ValueError) as failure:
        table.take(steps)
    message = str(failure.value)
    assert f"steps={steps}" in message and table.name in message
    assert f"{len(table.rows)} " in message and message.count(".") == 1


def test_the_number_of_steps_is_an_integer():
    assert KELLER.take(np.int64(2)) == KELLER.take(2)
    with pytest.raises(TypeError):
        KELLER.take(5.0)


def test_a_table_is_a_value():
    assert hash(KELLER) == hash(dataclasses.replace(KELLER))
    with pytest.raises(dataclasses.FrozenInstanceError):
        KELLER.safety = 2.0


def test_the_generator_reproduces_the_five_published_rows():
    generated = polar_express()
    assert generated.safety == POLAR_EXPRESS.safety
    np.testing.assert_allclose(generated.rows, POLAR_EXPRESS.rows, rtol=1e-12)


def test_the_generator_reproduces_the_eight_published_rows():
    generated = polar_express(steps=8, safety=0.01)
    assert generated.safety == POLAR_EXPRESS_8.safety
    # The interval shrinks to a point, where the 4 x 4 system is ill-conditioned: the last rows
    # are as good as the solver, and the map as good as ever.
    for tolerance, rows in ((1e-12, slice(0, 6)), (1e-10, slice(6, 7)), (1e-5, slice(7, 8))):
        np.testing.assert_allclose(generated.rows[rows], POLAR_EXPRESS_8.rows[rows], rtol=tolerance)
    sigma = np.geomspace(1e-3, 1, 1001)
    np.testing.assert_allclose(generated(sigma), POLAR_EXPRESS_8(sigma), rtol=1e-10)


@pytest.mark.parametrize("lower", [1e-4, 1e-3, 1e-2])
def test_more_steps_come_nearer_to_one(lower):
    sigma = np.geomspace(2 * lower, 1, 2001)
    errors = [np.abs(polar_express(n, lower)(sigma) - 1).max() for n in (4, 6, 8, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_one_step_is_the_minimax_quintic():
    # Without cushion and safety the error of the best polynomial meets its bound at 4 points
    # (Chebyshev's equioscillation), with alternating signs.
    sigma = np.linspace(0.1, 1, 100_001)
    error = polar_express(1, lower=0.1, cushion=0, safety=0)(sigma) - 1
    bound = np.abs(error).max()
    inner = error[1:-1]
    turns = (np.diff(error[:-1]) * np.diff(error[1:])) < 0
    extremes = np.concatenate([error[:1], inner[turns], error[-1:]])
    np.testing.assert_allclose(extremes, bound * np.array([-1, 1, -1, 1]), rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lower": 0.0}, {"lower": 1.0}])
def test_the_generator_says_what_it_accepts(wrong):
    with pytest.raises(ValueError, match=r"polar_express: .* accepted"):
        polar_express(**wrong)
