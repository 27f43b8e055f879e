"""A state described as data: its leaves, the optimizer of each parameter, and the settings.

Two descriptions are compared before arrays are read. Which optimizer trains a parameter follows
from the structure of the state: the named tuple that holds a moment at the parameter's own path.
What the structure does not show, such as beta or the coefficients of Newton-Schulz, comes from the
caller.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import types
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

_RENAMED = {
    f"optax_muon.transforms.scale.{before}.<locals>.<lambda>": f"optax_muon.transforms.scale.{now}"
    for before, now in {
        "match_rms": "MatchRms",
        "keller_scale": "KellerScale",
        "spectral_scale": "SpectralScale",
        "fixed_scale": "FixedScale",
    }.items()
}
"""Functions that older code saved by another name, and by nothing else."""

_ABSENT = object()
"""Stands for a setting that is not there, and is spelled `absent`."""


def describe(items: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe a state as data that JSON can hold.

    Args:
        items: What is saved, by name: trees of arrays or `ShapeDtypeStruct`s. Those of `"params"`
            are the parameters, and moments in the other items are found by their paths.
        settings: What the arrays do not show and must not change: beta, coefficients, the model's
            config. Numbers, strings, arrays, dtypes, dataclasses, functions (by name, with what
            they close over) and `functools.partial`s of them, in mappings and sequences.

    Returns:
        Shape and dtype of every leaf by item and path, the state classes that hold moments of each
        parameter, and the settings.

    Raises:
        TypeError: A setting that JSON cannot hold, a lambda that closes over nothing, a leaf that
            is neither an array nor a number, or items that are no mapping of names.

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
        return _called(value.func, {"arguments": value.args, **value.keywords})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _called(type(value), fields) if callable(value) else fields
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value).tolist()
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, np.dtype):
        return value.name
    if callable(value) and hasattr(value, "__qualname__"):
        return _function(value)
    if callable(value) and hasattr(value, "__name__"):  # as `jnp.maximum`, a ufunc
        return f"{type(value).__name__}.{value.__name__}"
    raise TypeError(
        f"settings hold {value!r}, a {type(value).__name__}, which JSON cannot hold; give"
        " numbers, strings, arrays, dtypes, dataclasses or functions that hold nothing else."
    )


def _function(value: Any) -> Any:
    """A function by name, with the values that tell it apart from others of that name."""
    name = f"{value.__module__}.{value.__qualname__}"
    held = _held(value)
    if not held and name.endswith("<lambda>"):
        raise TypeError(
            f"settings hold the function {name}, which has no name of its own and closes over"
            " nothing, so that another would look the same; give a number or a name in its place."
        )
    return _called(name, held) if held else name


def _called(function: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    """A function that holds values, as a `partial` of it would be described."""
    others = {f"{key}_" if key == "function" else key: value for key, value in held.items()}
    return {"function": function, **others}


def _held(function: Any) -> dict[str, Any]:
    """What a method is bound to, and what a function made in another closes over, by name."""
    if isinstance(function, types.MethodType):
        bound = {} if isinstance(function.__self__, type) else {"self": function.__self__}
        return bound | _held(function.__func__)
    if "<" not in function.__qualname__:  # neither `<locals>` nor `<lambda>`
        return {}
    if not hasattr(function, "__code__"):  # as a result of `jax.jit`
        function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | {
        # A cell is empty while what it will hold is not defined yet.
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
        if cell != types.CellType()
    }


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
    saved, new = dict(_flat(saved)), dict(_flat(_as_known(saved, new)))
    for key in saved | new:
        before, now = saved.get(key, _ABSENT), new.get(key, _ABSENT)
        if not _equal(before, now):
            name = key or "settings"
            yield f"{name} is {_value(before)} in the checkpoint and {_value(now)} now"


def _as_known(saved: Any, new: Any) -> Any:
    """New settings without what older code did not save, where it saved the rest.

    It saved functions by name alone, and callable dataclasses without the name of their class.
    """
    if isinstance(saved, list) and isinstance(new, list) and len(saved) == len(new):
        return [_as_known(*pair) for pair in zip(saved, new, strict=True)]
    if not isinstance(new, dict):
        return new
    if isinstance(saved, str) and new.get("function") == _RENAMED.get(saved, saved):
        return saved
    if not isinstance(saved, dict):
        return new
    if saved and saved.keys() == new.keys() - {"function"}:
        new = {key: new[key] for key in saved}
    return {key: _as_known(saved.get(key, _ABSENT), value) for key, value in new.items()}


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
