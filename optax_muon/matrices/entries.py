"""Arguments that hold an entry for every parameter: views, shardings, masks.

Such an argument is a tree like the parameters, a prefix of one, a dict from paths or globs, a
single entry, or a function of the parameters that returns one of these. An entry holds for the
parameter at its path and for all below it. Where several fit, the exact path decides before all
others, then the longest. What matches no parameter is an error, and so is a parameter without an
entry where every parameter needs one.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from optax_muon.matrices.paths import is_masked, longest_prefix, named_leaves

_GLOB = re.compile(r"[*?[]")
_LISTED = 8


def broadcast(
    name: str, argument: Any, tree: Any, *, is_entry: Callable[[Any], bool], expected: str
) -> dict[str, Any]:
    """Give every parameter its entry of an argument.

    Args:
        name: the argument, as errors call it.
        argument: a tree of entries, a prefix of one, a dict from paths or globs, one entry, or a
            function of the parameters that returns one of these.
        tree: the parameters. Leaves masked by optax get no entry and hide those that they may have.
        is_entry: whether an object is an entry.
        expected: what an entry is, in words, for errors.

    Returns:
        `{path: entry}` of every array in the tree, in its order.

    Raises:
        ValueError: an entry matches no parameter, a parameter has none, or two that are equally
            long disagree.
        TypeError: something in the argument is no entry.

    >>> params = {"up": {"kernel": jax.numpy.ones(2), "bias": jax.numpy.ones(2)}}
    >>> options = {"is_entry": lambda x: isinstance(x, bool), "expected": "True or False"}
    >>> broadcast("mask", {"up": True, "*/bias": False}, params, **options)
    {'up/bias': False, 'up/kernel': True}
    >>> broadcast("mask", {"up": {"kernl": True}}, params, **options)
    Traceback (most recent call last):
    ValueError: mask['up/kernl'] matches no parameter; there are 'up/kernel', 'up/bias'.
    """
    if is_function(argument):
        argument = argument(tree)
    entries = named_leaves(argument, is_leaf=lambda node: node is None or is_entry(node))
    positions = named_leaves(tree, is_leaf=is_position)
    keys = keys_of(name, entries, positions)
    arrays = [path for path, leaf in positions.items() if hasattr(leaf, "dtype")]
    for key in dict.fromkeys(keys[path] for path in arrays):
        if key is not None and not is_entry(entries[key]):
            place = f"{name}[{key!r}]" if key else name
            raise TypeError(f"{place} is {entries[key]!r}; expected {expected}.")
    missing = [path for path in arrays if keys[path] is None]
    if missing:
        raise ValueError(
            f"{name} has no entry for {listed(missing)}; expected {expected} for each of them, or"
            " for a module above."
        )
    return {path: entries[key] for path in arrays if (key := keys[path]) is not None}


def keys_of(
    name: str, entries: Mapping[str, Any], positions: Mapping[str, Any]
) -> dict[str, str | None]:
    """Which entry holds for every position of a tree; None where none does.

    Args:
        name: the argument, as errors call it.
        entries: path or glob to entry.
        positions: path to leaf, to None or to a masked leaf.

    Raises:
        ValueError: an entry matches no parameter, or two that are equally long disagree.
    """
    globs = [(key, re.compile(fnmatch.translate(key))) for key in entries if _GLOB.search(key)]
    fitting = {path: _fitting(entries, globs, path) for path in positions}
    _check_used(name, entries, positions, fitting)
    return {path: _best(name, entries, fits, path) for path, fits in fitting.items()}


def is_function(argument: Any) -> bool:
    """Whether an argument is to be called.

    An equinox module of entries may have a `__call__`, but it is a tree.

    >>> is_function(len), is_function({"kernel": len}), is_function(True)
    (True, False, False)
    """
    is_leaf = jax.tree_util.all_leaves([argument])
    # jax.tree_util.Partial is a tree of its arguments.
    return callable(argument) and (is_leaf or isinstance(argument, functools.partial))


def is_position(node: Any) -> bool:
    """Whether a node without an array has a place of its own: a masked leaf, or a None."""
    return node is None or is_masked(node)


def listed(names: Iterable[str]) -> str:
    """Quote some names, the first eight of them."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def _fitting(
    entries: Mapping[str, Any], globs: list[tuple[str, re.Pattern[str]]], path: str
) -> list[str]:
    """The entries for a path: its own, those of the modules above it, and globs."""
    above = longest_prefix(entries, path)
    named = [] if above is None else [above]
    while above:
        above = longest_prefix(entries, above.rpartition("/")[0])
        named += [] if above is None else [above]
    return [*named, *(key for key, glob in globs if glob.match(path) and key not in named)]


def _best(name: str, entries: Mapping[str, Any], fits: list[str], path: str) -> str | None:
    """The exact path, or else the longest of the entries that fit."""
    if not fits or path in entries:
        return path if fits else None
    best = max(fits, key=len)
    equals = [key for key in fits if len(key) == len(best)]
    if any(entries[key] != entries[best] for key in equals):
        raise ValueError(
            f"{path} fits {listed(equals)} of {name}, which disagree; name it in full."
        )
    return best


def _check_used(
    name: str,
    entries: Mapping[str, Any],
    positions: Mapping[str, Any],
    fitting: Mapping[str, list[str]],
) -> None:
    hidden = [path for path, leaf in positions.items() if is_masked(leaf)]
    used = set(itertools.chain(*(fitting[p] for p, leaf in positions.items() if leaf is not None)))
    absent = {path for path, leaf in positions.items() if leaf is None}
    for key, entry in entries.items():
        # One entry for the whole tree fits an empty one; a None stands where the tree has None.
        fits = key in used or key == "" or (entry is None and key in absent)
        if not fits and not any(_may_hide(path, key) for path in hidden):
            close = difflib.get_close_matches(key, positions, n=3, cutoff=0.4)
            raise ValueError(
                f"{name}[{key!r}] matches no parameter; there are"
                f" {listed(close or positions) or 'none'}."
            )


def _may_hide(masked: str, key: str) -> bool:
    """Whether an entry may be for what a mask hides, which can be a whole subtree."""
    return masked == "" or key.startswith(f"{masked}/") or bool(_GLOB.search(key))
