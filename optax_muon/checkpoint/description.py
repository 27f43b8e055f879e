"""A state described as data: its leaves, the optimizer of each parameter, and the settings.

Two descriptions are compared before arrays are read. Which optimizer trains a parameter follows
from the structure of the state: the named tuple that holds a moment at the parameter's own path.
What the structure does not show, such as beta or the coefficients of Newton-Schulz, comes from the
caller.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_muon.errors import shortened
from optax_muon.matrices.paths import longest_suffix, named_leaves

PARAMS = "params"
"""The item that holds the parameters."""

_TRAINED_BY = {
    "MomentumState": "Muon",
    "MuonState": "Muon",
    "ScaleByAdamState": "AdamW",
}
"""The optimizer of each state class; any other state goes by the name of its class."""

_KEYS = {"leaves", "trained_by", "settings"}
"""The parts of a description."""

_NO_NUMBERS = frozenset("OSUMm")
"""Kinds of numpy dtypes that no checkpoint holds: objects, bytes, strings, times."""

_LONGEST = 200
"""Characters of a setting that a message shows."""

_ABSENT = object()
"""Stands for a setting that is not there, and is spelled `absent`."""


def describe(items: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe a state as data that JSON can hold.

    Args:
        items: What is saved, by name: trees of arrays or `ShapeDtypeStruct`s. Those of `"params"`
            are the parameters, and moments in the other items are found by their paths.
        settings: What the arrays do not show and must not change: beta, coefficients, the model's
            config. Numbers, strings, arrays, dtypes, dataclasses, functions (by name) and
            `functools.partial`s of them, in mappings and sequences.

    Returns:
        Shape and dtype of every leaf by item and path, the state classes that hold moments of each
        parameter, and the settings.

    Raises:
        TypeError: A setting that JSON cannot hold, a leaf that is neither an array nor a number, or
            items that are no mapping of names.

    >>> import jax.numpy as jnp, optax
    >>> params = {"up": jnp.ones((4, 8))}
    >>> items = {"params": params, "opt_state": optax.scale_by_adam().init(params)}
    >>> describe(items, {"beta": 0.95, "mu_dtype": jnp.bfloat16})["trained_by"]
    {'up': ['ScaleByAdamState']}
    """
    if not isinstance(items, Mapping) or not all(isinstance(name, str) for name in items):
        raise TypeError(
            f"items is {_named(items)}; give a mapping from names, such as 'params', to trees."
        )
    return {
        "leaves": {name: _leaves(name, item) for name, item in items.items()},
        "trained_by": _trained_by(items),
        "settings": None if settings is None else to_json(settings),
    }


def check(saved: Mapping[str, Any], new: Mapping[str, Any], where: str = "The checkpoint") -> None:
    """Refuse a state that differs from the one that was saved.

    Args:
        saved: The description in the checkpoint.
        new: The description of what is to be restored. Items that it lacks are not compared, nor
            are settings that are None.
        where: What the checkpoint is called in the message.

    Raises:
        ValueError: Something differs, with a line for each; or one of them is not a description.

    >>> check(describe({}, {"beta": 0.95}), describe({}, {"beta": 0.9}))
    Traceback (most recent call last):
      ...
    ValueError: The checkpoint does not fit what is to be restored:
      beta is 0.95 in the checkpoint and 0.9 now
    """
    for name, description in (("saved", saved), ("new", new)):
        if not isinstance(description, Mapping) or not description.keys() >= _KEYS:
            raise ValueError(
                f"{where}: {name} is not a description; give one that describe has made."
            )
    found = list(_differences(saved, new))
    if found:
        lines = "\n  ".join(shortened(found))
        raise ValueError(f"{where} does not fit what is to be restored:\n  {lines}")


def to_json(settings: Any) -> Any:
    """Settings as they come back from JSON.

    Raises:
        TypeError: A setting that JSON cannot hold.

    >>> to_json({"beta": np.float32(0.5), "rows": (1, 2)})
    {'beta': 0.5, 'rows': [1, 2]}
    """
    try:
        return json.loads(json.dumps(settings, default=_to_json))
    except ValueError as error:  # json's own sentence, "Circular reference detected", names nothing
        raise TypeError("settings contain themselves; remove the cycle.") from error


# ---- describing ----------------------------------------------------------------------------------


def _leaves(name: str, item: Any) -> dict[str, Any]:
    return {path: _leaf(f"{name}/{path}", leaf) for path, leaf in named_leaves(item).items()}


def _leaf(name: str, leaf: Any) -> dict[str, Any]:
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    if array.dtype == jax.dtypes.float0 or getattr(array.dtype, "kind", None) in _NO_NUMBERS:
        raise TypeError(f"{name} is {_named(leaf)}; a checkpoint holds arrays and numbers only.")
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _named(value: Any) -> str:
    """A value with its type, for a message."""
    return f"{repr(value)[:60]}, a {type(value).__name__}"


def _trained_by(items: Mapping[str, Any]) -> dict[str, list[str]]:
    """The state classes that hold a leaf at a parameter's own path, by parameter."""
    found: dict[str, set[str]] = {path: set() for path in named_leaves(items.get(PARAMS))}
    for name, item in items.items():
        for holder in _named_tuples(item) if name != PARAMS else ():
            for field in holder:
                for path in named_leaves(field).keys() & found.keys():
                    found[path].add(type(holder).__name__)
    return {path: sorted(names) for path, names in found.items() if names}


def _named_tuples(node: Any) -> Iterator[Any]:
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        yield node
    for child in jax.tree.leaves(node, is_leaf=lambda below: below is not node):
        if child is not node:
            yield from _named_tuples(child)


def _to_json(value: Any) -> Any:
    """Express a value that JSON lacks by values that it has."""
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": value.args, **value.keywords}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value).tolist()
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, np.dtype):
        return value.name
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(
        f"settings hold {value!r}, a {type(value).__name__}, which JSON cannot hold; give"
        " numbers, strings, arrays, dtypes, dataclasses or functions."
    )


# ---- comparing -----------------------------------------------------------------------------------


def _differences(saved: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    moved = _moved(saved["trained_by"], new["trained_by"]) if new["trained_by"] else {}
    yield from moved.values()
    for item, leaves in new["leaves"].items():
        yield from _leaf_differences(item, saved["leaves"].get(item, {}), leaves, moved)
    if new["settings"] is not None:
        yield from _setting_differences(saved["settings"] or {}, new["settings"])


def _moved(saved: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Parameters that another optimizer trains now, each with its line."""
    lines = {}
    for path in saved.keys() & new.keys():
        before = [name for name in saved[path] if name not in new[path]]
        now = [name for name in new[path] if name not in saved[path]]
        if before and now:
            lines[path] = (
                f"{path} was trained by {_title(before)} and is now trained by {_title(now)}"
            )
    return dict(sorted(lines.items()))


def _title(holders: list[str]) -> str:
    return " with ".join(_TRAINED_BY.get(name, name.removesuffix("State")) for name in holders)


def _leaf_differences(
    item: str,
    saved: Mapping[str, Any],
    new: Mapping[str, Any],
    moved: Mapping[str, str],
) -> Iterator[str]:
    for path in {**saved, **new}:
        if item != PARAMS and longest_suffix(moved, path) is not None:
            continue  # has a line of its own already
        name = f"{item}/{path}" if path else item
        if path not in new:
            yield f"{name} {_spell(saved[path])} is in the checkpoint and not in the new state"
        elif path not in saved:
            yield f"{name} {_spell(new[path])} is not in the checkpoint"
        elif saved[path] != new[path]:
            yield f"{name} is {_spell(saved[path])} in the checkpoint and {_spell(new[path])} now"


def _spell(leaf: Mapping[str, Any]) -> str:
    return f"{leaf['dtype']} {leaf['shape']}"


def _setting_differences(saved: Any, new: Any) -> Iterator[str]:
    saved, new = dict(_flat(saved)), dict(_flat(new))
    for key in saved | new:
        before, now = saved.get(key, _ABSENT), new.get(key, _ABSENT)
        if not _equal(before, now):
            name = key or "settings"
            yield f"{name} is {_value(before)} in the checkpoint and {_value(now)} now"


def _equal(before: Any, now: Any) -> bool:
    """Whether two values of JSON are equal; NaN equals NaN."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_equal, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(_equal(before[k], now[k]) for k in before)
    if isinstance(before, float) and isinstance(now, float) and math.isnan(before):
        return math.isnan(now)
    return bool(before == now)


def _value(value: Any) -> str:
    """A setting for a message; a long one, such as an array, is cut."""
    if value is _ABSENT:
        return "absent"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with dotted names; lists stay whole."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else key)
