"""Fit the rates by which a form is chosen to the tables of measured times and of estimated cycles.

The time of a form is modelled as a sum of four: operations, numbers that products read and write,
numbers that everything else writes, and numbers that are transposed, each over a rate. Least
squares of relative errors give the rates in `optax_muon/platforms.py`: for CPUs from
`results/orthogonalize_speed.csv`, for each kind of TPU from `results/tpu_cycles.csv`, with no more
operations than its matrix units can do.

    python benchmarks/form_rates.py
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.optimize
from _topologies import CHIPS

from optax_muon.polar import KELLER, Form, Gram, Panels, Plain, default_restarts
from optax_muon.polar.selection import full_products

RESULTS = Path(__file__).parent / "results"
Timed = tuple[tuple[int, ...], Form, float]
"""Shape, form, and seconds."""


def main() -> None:
    """Print the rates of each platform and dtype."""
    for dtype in ("float32", "bfloat16"):
        print("cpu", dtype, fitted([*on_cpu(dtype)]))
    for chip in CHIPS:
        print("tpu", chip, "bfloat16", fitted([*on_tpu(chip)], CHIPS[chip].peak))


def on_cpu(dtype: str) -> Iterator[Timed]:
    """All forms that were timed on a CPU."""
    for row in table("orthogonalize_speed"):
        *shape, operands = row["case"].replace(" x ", " ").split()
        if operands == dtype and row["form"]:
            yield (
                tuple(map(int, shape)),
                form_of(row["form"], dtype, "cpu"),
                float(row["median_ms"]) / 1e3,
            )


def on_tpu(chip: str) -> Iterator[Timed]:
    """All forms that were compiled for a chip, without options."""
    for row in table("tpu_cycles"):
        ours = row["implementation"] in ("plain", "Gram 3")
        if row["chip"] == chip and ours and not row["options"] and row["outcome"] == "compiled":
            shape = tuple(map(int, row["shape"].split(" x ")))
            form = form_of(row["implementation"], "bfloat16", "tpu")
            yield shape, form, (int(row["products"]) + int(row["rest"])) / CHIPS[chip].clock


def table(name: str) -> list[dict[str, str]]:
    """The rows of a table of results."""
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def form_of(name: str, dtype: str, platform: str) -> Form:
    """The form that prints as `name`."""
    kind, _, panels = name.partition(", ")
    products = Panels(int(panels.split()[0])) if panels else full_products(platform, dtype)
    if kind == "plain":
        return Plain(products)
    return Gram(default_restarts(len(KELLER.rows), dtype), products)


def fitted(timed: list[Timed], peak: float = math.inf) -> str:
    """The four rates, as `Rates` takes them, and the error of the model."""
    seconds = np.array([each for *_, each in timed])
    counts = np.array([counted(shape, form) for shape, form, _ in timed], np.float64)
    largest = np.maximum(counts.max(axis=0), 1)
    # Nothing multiplies faster than the data sheet says.
    least = [largest[0] / peak, 0, 0, 0]
    found = scipy.optimize.lsq_linear(
        counts / largest / seconds[:, None], np.ones(len(timed)), (least, np.inf), method="bvls"
    )
    inverse = found.x
    rates = [scale / one if one else math.inf for scale, one in zip(largest, inverse, strict=True)]
    error = counts @ (inverse / largest) / seconds - 1
    return f"Rates({', '.join(f'{rate:.3g}' for rate in rates)}), off by {error.std():.0%}"


def counted(shape: tuple[int, ...], form: Form) -> list[int]:
    """What the model counts of a stack."""
    work = form.count(*sorted(shape[-2:]), KELLER.rows) * math.prod(shape[:-2])
    return [work.flops, work.operands, work.passes, work.transposed]


if __name__ == "__main__":
    main()
