"""Dimension numbers: optax's and MaxText's way to write a view, known by their fields.

Optax's `MuonDimensionNumbers` has `reduction_axis` and `output_axis`; MaxText's has a third field,
`sharding`: the `NamedSharding` of the parameter. `views=` takes trees of either, as MaxText's
`get_muon_weight_dimension_numbers(model, config)` returns them.
"""

from __future__ import annotations

from typing import Any

from optax_muon.matrices.entries import is_function
from optax_muon.matrices.paths import named_leaves


def is_dimension_numbers(node: Any) -> bool:
    """Whether an object has the fields of dimension numbers, whichever package wrote it."""
    return hasattr(node, "reduction_axis") and hasattr(node, "output_axis")


def given_shardings(shardings: Any, views: Any) -> Any:
    """The shardings that are given, or else those that dimension numbers among the views carry.

    Args:
        shardings: what the caller gave as `shardings=`; None if nothing.
        views: what the caller gave as `views=`.

    Returns:
        `shardings`, or `{path: sharding}`, or None.

    >>> import types
    >>> numbers = types.SimpleNamespace(reduction_axis=0, output_axis=1, sharding="P(None, 'fsdp')")
    >>> given_shardings(None, {"up": {"kernel": numbers}, "norm": None})
    {'up/kernel': "P(None, 'fsdp')"}
    """
    if shardings is not None or views is None or is_function(views):
        return shardings
    entries = named_leaves(views, is_leaf=is_dimension_numbers)
    found = {path: getattr(entry, "sharding", None) for path, entry in entries.items()}
    carried = {path: sharding for path, sharding in found.items() if sharding is not None}
    return carried or None
