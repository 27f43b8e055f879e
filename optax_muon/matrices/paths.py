"""Names of leaves: one path for linen, nnx, equinox and plain trees.

Everything that this package decides, it decides for a path: `layers/0/kernel`. A flat mapping from
path to view needs none of the gymnastics that masked trees ask for: the leaves that survive
`optax.partition` keep their full paths.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import optax

# The keys of a box around an array: `.value` for nnx.Variable and linen's nn.Partitioned.
_BOXES = (["value"], ["raw_value"])


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Flatten a tree into `{path: leaf}`, in the tree's own order.

    A box around an array, such as `nnx.Variable` and linen's `Partitioned`, adds nothing to its
    path.

    Args:
        tree: Any tree, of parameters or of views.
        is_leaf: As in `jax.tree.leaves`.

    Raises:
        ValueError: two leaves have one path, as in `{"a/b": x, "a": {"b": y}}`.

    >>> named_leaves({"layer": [1.0, {"norm": 2.0}]})
    {'layer/0': 1.0, 'layer/1/norm': 2.0}
    """
    leaves: dict[str, Any] = {}
    for path, leaf in _leaves_with_path(tree, is_leaf or (lambda node: False)):
        name = "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)
        if name in leaves:
            raise ValueError(f"Two parameters have the path {name!r}; rename one of them.")
        leaves[name] = leaf
    return leaves


def map_named(
    function: Callable[..., Any],
    tree: Any,
    *rest: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Map a function over the leaves of trees and their paths, which `named_leaves` tells.

    Args:
        function: `(path, leaf, *leaves of the rest) -> leaf`.
        tree: Any tree, whose paths they are.
        rest: Trees of its structure, or of one below it.
        is_leaf: As in `jax.tree.map`.

    >>> map_named(lambda path, leaf: f"{path}: {leaf}", {"layer": [1.0]})
    {'layer': ['layer/0: 1.0']}
    """
    names = jax.tree.unflatten(jax.tree.structure(tree, is_leaf), named_leaves(tree, is_leaf))
    return jax.tree.map(function, names, tree, *rest)


def _leaves_with_path(
    tree: Any, is_leaf: Callable[[Any], bool]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """As `jax.tree.leaves_with_path`, but an array in a box has the path of the box."""
    nodes = jax.tree.leaves_with_path(tree, is_leaf=lambda node: is_leaf(node) or _is_box(node))
    for path, node in nodes:
        for below, leaf in jax.tree.leaves_with_path(node, is_leaf=is_leaf):
            yield (path if len(below) == 1 else (*path, *below)), leaf


def _is_box(node: Any) -> bool:
    """Whether a node has one child, its value: an attention's fields q, k and `value` are three."""
    if node is None or isinstance(node, dict | list | tuple):
        return False
    below = jax.tree.leaves_with_path(node, is_leaf=lambda child: child is not node)
    return [getattr(key, "name", None) for path, _ in below for key in path] in _BOXES


def is_masked(leaf: Any) -> bool:
    """Whether `optax.masked` or `optax.partition` has taken this leaf away."""
    return isinstance(leaf, optax.MaskedNode)


def longest_prefix(entries: Container[str], name: str) -> str | None:
    """The longest entry that is the path itself or lies above it; None if there is none.

    Pass a set or a mapping: every prefix of the path is looked up once.

    >>> longest_prefix(["layers", "layers/0", "head"], "layers/0/kernel")
    'layers/0'
    >>> longest_prefix([""], "anything")          # the root covers all
    ''
    """
    prefix = name
    while prefix not in entries:
        if not prefix:
            return None
        prefix = prefix.rpartition("/")[0]
    return prefix


def longest_suffix(entries: Container[str], name: str) -> str | None:
    """The longest entry that is the path itself or its end; None if there is none.

    A moment's path ends in that of its parameter. Pass a set or a mapping, as to `longest_prefix`.

    >>> longest_suffix({"kernel", "layers/0/kernel"}, "opt_state/1/mu/layers/0/kernel")
    'layers/0/kernel'
    >>> longest_suffix({"": 1}, "opt_state/1/mu")  # a lone parameter
    ''
    """
    suffix = name
    while suffix not in entries:
        if not suffix:
            return None
        suffix = suffix.partition("/")[2]
    return suffix
