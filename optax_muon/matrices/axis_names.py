"""Names of axes: what parameters, or trees beside them, say of each axis, and how that is read.

Names come from linen's boxes (`Partitioned`, `LogicallyPartitioned`), from the metadata of
`nnx.Variable`, haliax's `NamedArray`, or a tree of logical names as `nn.get_partition_spec` returns
it. All are recognized by their attributes, so that none of these packages is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any

import jax

from optax_muon.matrices.paths import named_leaves
from optax_muon.matrices.views import View

Names = tuple[str | None, ...]
"""One name per axis, None for an axis without one."""

_METADATA = ("sharding_names", "out_sharding", "sharding", "logical_axes")

# Roles of axes, by the logical names of t5x, MaxText, Levanter and Flax's examples.
_STACK = re.compile(r"(\w*_)?(layers?|blocks?|stages?|scan|stack(ed)?|repeats?)")
_EXPERT = re.compile(r"(\w*_)?(exp|experts?)")
_PART = re.compile(r"qkv|q_k_v|kv_parts?|gate_up|parts?")
_TABLE = re.compile(r"vocab(ulary)?(_size)?|tokens?|(\w*_)?pos(itions?)?|\w*relpos\w*|buckets?")
_HEADS = re.compile(
    r"(\w*_)?heads?(_dim|_size|_per_group)?|kv|(\w+_)?head_\w+|joined_kv|\w*heads_per_group"
)
_FEATURES = re.compile(
    r"\w*embed\w*|\w*mlp\w*|(\w+_)?(model|width|hidden|features?|dim|intermediate|lora|norm)(_\w+)?"
    r"|d_\w+|\w*lora\w*|in|out|(\w+_)?channels?|ffn?|ffw"
)
# Names that are more often axes of a mesh than of a parameter say nothing.
_MESH = frozenset({"model", "data", "fsdp", "tensor", "tp", "dp", "mp", "hidden_sharded"})


@dataclasses.dataclass(frozen=True)
class AxisRoles:
    """The axes of one parameter by role; axes count from the front."""

    batch: tuple[int, ...]
    """Stacked layers, experts, the parts of a fused kernel."""
    stack: tuple[int, ...]
    """Those of `batch` that are stacked layers."""
    table: tuple[int, ...]
    """Rows of a table: vocabulary or positions."""
    heads: tuple[int, ...]
    """Heads, and the features of one head."""
    features: tuple[int, ...]
    """Axes of features, and of axes without a name."""
    known: bool
    """Whether every axis but one has a name with a known meaning."""

    @classmethod
    def of(cls, names: Names) -> AxisRoles:
        """Sort axes by the meaning of their names.

        >>> AxisRoles.of(("heads", "layers", "kv", "embed")).heads
        (0, 2)
        """
        roles = [_role(name) for name in names]

        def axes(*wanted: str) -> tuple[int, ...]:
            return tuple(axis for axis, role in enumerate(roles) if role in wanted)

        unknown, unnamed = roles.count("unknown"), roles.count("unnamed")
        named = len(roles) - unknown - unnamed
        return cls(
            batch=axes("stack", "expert", "part"),
            stack=axes("stack"),
            table=axes("table"),
            heads=axes("heads"),
            features=axes("features", "unnamed"),
            known=unknown == 0 and unnamed <= 1 and named > 0,
        )


def axis_names(tree: Any) -> dict[str, Names]:
    """Read the names of axes that parameters carry.

    Args:
        tree: parameters, boxed or with metadata. Plain arrays carry no names and are left out.

    Returns:
        Path of the parameter, or of the box around it, to one name per axis.

    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> kernel = nn.LogicallyPartitioned(jnp.zeros((8, 32)), names=("embed", "mlp"))
    >>> axis_names({"up": {"kernel": kernel}})
    {'up/kernel': ('embed', 'mlp')}
    """
    nodes = named_leaves(tree, is_leaf=lambda node: _carried(node) is not None)
    found = ((path, _carried(node)) for path, node in nodes.items())
    return {path: names for path, names in found if names is not None}


def as_names(value: Any) -> Names | None:
    """Read a tuple of names or a `PartitionSpec`; None if it is neither.

    >>> as_names(jax.sharding.PartitionSpec("embed", None))
    ('embed', None)
    >>> as_names((3, 4)) is None
    True
    """
    if not isinstance(value, list | tuple | jax.sharding.PartitionSpec):
        return None
    names = tuple(value)
    plain = all(name is None or isinstance(name, str) for name in names)
    return names if plain and any(isinstance(name, str) for name in names) else None


def read_view(roles: AxisRoles, out_first: bool) -> View | str | None:
    """Read a parameter whose axes all have a meaning.

    Args:
        roles: the roles of its axes.
        out_first: whether the layer's outputs are stored in front of its inputs.

    Returns:
        Its view, None for a vector or a table, or "unknown".
    """
    if not roles.known:
        return "unknown"
    if roles.table:
        return None
    groups = [axes for axes in (roles.features, roles.heads) if axes]
    if not roles.heads and len(roles.features) == 2:
        groups = [roles.features[:1], roles.features[1:]]
    elif len(roles.features) > 1 or not roles.features:
        return "unknown"
    if len(groups) < 2:
        return None
    first, second = sorted(groups)
    return View(second, first) if out_first else View(first, second)


@functools.lru_cache(maxsize=1024)
def _role(name: str | None) -> str:
    if name is None:
        return "unnamed"
    lower = name.lower()
    if lower in _MESH:
        return "unknown"
    table = (
        ("stack", _STACK),
        ("expert", _EXPERT),
        ("part", _PART),
        ("table", _TABLE),
        ("heads", _HEADS),
        ("features", _FEATURES),
    )
    return next((role for role, pattern in table if pattern.fullmatch(lower)), "unknown")


def _carried(node: Any) -> Names | None:
    """The names that a box around an array carries."""
    if isinstance(node, dict | list | tuple) or node is None:
        return None
    axes = getattr(node, "axes", None)
    if hasattr(node, "array") and isinstance(axes, Iterable):
        axes = tuple(axes)
        return tuple(axis.name for axis in axes) if all(map(_is_named_axis, axes)) else None
    metadata = getattr(node, "get_metadata", None)
    if callable(metadata):
        found = metadata()
        if not isinstance(found, dict):
            return None
        return next((n for key in _METADATA if (n := as_names(found.get(key)))), None)
    return as_names(getattr(node, "names", None)) if hasattr(node, "unbox") else None


def _is_named_axis(axis: Any) -> bool:
    return isinstance(getattr(axis, "name", None), str) and hasattr(axis, "size")
