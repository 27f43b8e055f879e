"""Names of leaves: one path for linen, nnx, equinox and plain trees.

Everything that this package decides, it decides for a path: `layers/0/kernel`. A flat mapping from
path to view needs none of the gymnastics that masked trees ask for: the leaves that survive
`optax.partition` keep their full paths.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import jax
import optax

# The key that a box around an array adds: `.value` for nnx.Variable and linen's nn.Partitioned.
_BOX_KEYS = ("value", "raw_value")


def path_name(path: tuple[Any, ...]) -> str:
    """Name a key path: `(DictKey('a'), SequenceKey(0), GetAttrKey('value'))` is `a/0`.

    >>> import jax
    >>> [(path, _)], _ = jax.tree.flatten_with_path({"layer": [1.0]})
    >>> path_name(path)
    'layer/0'
    """
    boxed = bool(path) and getattr(path[-1], "name", None) in _BOX_KEYS
    keys = path[:-1] if boxed else path
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Flatten a tree into `{path: leaf}`, in the tree's own order.

    Args:
        tree: Any tree, of parameters or of views.
        is_leaf: As in `jax.tree.leaves`.

    Raises:
        ValueError: two leaves have one path, as in `{"a/b": x, "a": {"b": y}}`.

    >>> named_leaves({"layer": [1.0, {"norm": 2.0}]})
    {'layer/0': 1.0, 'layer/1/norm': 2.0}
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf):
        name = path_name(path)
        if name in leaves:
            raise ValueError(f"Two parameters have the path {name!r}; rename one of them.")
        leaves[name] = leaf
    return leaves


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
