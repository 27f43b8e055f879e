"""Loss over cost: the best runs of each size, their fits, and the ratio of costs at equal loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import _runs
import _table
from _experiment import Results
from _runs import Row
from _variants import SPECS

from optax_muon.training import power_law
from optax_muon.training.power_law import Curve

COSTS = {
    "model_flops": "6ND over AdamW's",
    "flops": "all FLOPs over AdamW's",
    "seconds": "seconds over AdamW's",
}
"""What is compared at equal loss, with the titles of the columns."""
BASELINE = "adamw"
RATIOS = "Ratios are medians [5%, 95%] of 1000 draws of the mean losses."

Points = Mapping[str, list[list[Row]]]
"""The runs of each size at an optimizer's best numbers, by optimizer; seeds inside."""


def curve(sizes: list[list[Row]], results: Results) -> Curve:
    """What an optimizer reached at each size."""
    firsts = [rows[0] for rows in sizes]
    return Curve(
        {
            "model_flops": tuple(row.model_flops for row in firsts),
            "flops": tuple(row.flops for row in firsts),
            "seconds": tuple(map(results.seconds, firsts)),
        },
        losses=tuple(tuple(_runs.losses(rows)) for rows in sizes),
    )


def fitted(points: Points[Row], results: Results) -> dict[str, Curve]:
    """The curves that have enough sizes for a fit."""
    return {
        name: curve(sizes, results)
        for name, sizes in points.items()
        if len(sizes) >= power_law.FITTED
    }


def is_measured(curves: Mapping[str, Curve], of: str) -> bool:
    """Whether a cost is known at every size."""
    return not any(math.isnan(cost) for each in curves.values() for cost in each.costs[of])


def ratios(points: Points[Row], results: Results) -> list[str]:
    """The lines of a table: what each optimizer costs over AdamW's fit, at each of its losses."""
    curves = fitted(points, results)
    costs = [of for of in COSTS if is_measured(curves, of)]
    rows = (
        (
            SPECS[name].title,
            model,
            *(power_law.ratio(curves[BASELINE], curves[name], place, of) for of in costs),
        )
        for name in curves
        if name != BASELINE
        for place, model in enumerate(rows[0].model for rows in points[name])
    )
    return _table.markdown(("optimizer", "at the loss of", *(COSTS[of] for of in costs)), rows)
