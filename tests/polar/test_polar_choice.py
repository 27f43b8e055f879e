"""The choice of a form, held to the tables that the benchmarks have committed."""

import csv
from pathlib import Path

import pytest

from optax_muon.polar import KELLER, choose_form

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def table(name):
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def measured_on_cpu():
    """From shape and dtype to the milliseconds of each form."""
    found = {}
    for row in table("orthogonalize_speed"):
        if row["form"]:
            found.setdefault(row["case"], {})[row["form"]] = float(row["median_ms"])
    return found


def estimated_for_tpus():
    """From chip and shape to the cycles of each form, in the compiler's model."""
    found = {}
    for row in table("tpu_cycles"):
        if row["implementation"] in ("plain", "Gram 3") and not row["options"]:
            case = row["chip"], row["shape"]
            cycles = int(row["products"]) + int(row["rest"])
            found.setdefault(case, {})[row["implementation"]] = cycles
    return found


def chosen(shape, dtype, platform):
    m, n = sorted(map(int, shape.split(" x ")[-2:]))
    return str(choose_form(m, n, KELLER.rows, dtype=dtype, platform=platform))


@pytest.mark.parametrize("case", measured_on_cpu())
def test_the_form_chosen_on_cpu_takes_at_most_a_tenth_longer_than_the_best(case):
    times = measured_on_cpu()[case]
    shape, dtype = case.rsplit(" ", 1)
    assert times[chosen(shape, dtype, "cpu")] <= 1.1 * min(times.values())


@pytest.mark.parametrize("case", estimated_for_tpus(), ids=" ".join)
def test_the_form_chosen_on_tpu_takes_at_most_a_tenth_longer_than_the_best(case):
    cycles = estimated_for_tpus()[case]
    assert len(cycles) == 2
    assert cycles[chosen(case[1], "bfloat16", "tpu")] <= 1.1 * min(cycles.values())
