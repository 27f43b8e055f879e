"""Names of axes: what parameters, or trees beside them, say of each axis, and how that is read.

Names come from linen's boxes (`Partitioned`, `LogicallyPartitioned`), from the metadata of
`nnx.Variable`, haliax's `NamedArray`, or a tree of logical names as `nn.get_partition_spec` returns
it. The layers of haliax, which Levanter's models are made of, say more: `Linear` and `Conv` name
the axes that they contract and produce, `Stacked` names the axis of its layers. All are recognized
by their attributes, so that none of these packages is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from optax_muon.matrices.paths import named_leaves
from optax_muon.matrices.rules import Decision, Kind
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


@dataclasses.dataclass(frozen=True)
class CarriedAxes:
    """What the parameters of a tree say of their own axes."""

    names: Mapping[str, Names]
    """Path of a parameter, or of the box around it, to one name per axis."""
    layers: Mapping[str, Decision]
    """Path of a weight to what its layer says: which axes it contracts and which it produces."""

    @classmethod
    def of(cls, tree: Any) -> CarriedAxes:
        """Look at every node of a tree.

        Args:
            tree: parameters, boxed or with metadata. Plain arrays carry nothing and are left out.

        >>> import flax.linen as nn
        >>> import jax.numpy as jnp
        >>> kernel = nn.LogicallyPartitioned(jnp.zeros((8, 32)), names=("embed", "mlp"))
        >>> CarriedAxes.of({"up": {"kernel": kernel}}).names
        {'up/kernel': ('embed', 'mlp')}
        """
        stacks: set[str] = set()
        layers: dict[int, Decision] = {}

        def visit(node: Any) -> bool:
            if isinstance(node, dict | list | tuple) or node is None:
                return False
            if hasattr(node, "stacked") and _is_named_axis(getattr(node, "Block", None)):
                stacks.add(node.Block.name)
            if hasattr(node, "In") and hasattr(node, "Out"):
                weight = getattr(node, "weight", None)
                if _carried(weight) is not None:
                    layers[id(weight)] = _read_layer(node)
            return _carried(node) is not None

        nodes = named_leaves(tree, is_leaf=visit)
        carried = ((path, _carried(node)) for path, node in nodes.items())
        # The axis along which a module stacks its layers is known, whatever it is called.
        names = {
            path: tuple("layers" if name in stacks else name for name in found)
            for path, found in carried
            if found is not None
        }
        return cls(names, {p: layers[id(n)] for p, n in nodes.items() if id(n) in layers})

    def names_of(self, path: str) -> Names | None:
        """The names of a parameter's axes."""
        return self.names.get(path) or self.names.get(path.rpartition("/")[0])

    def layer_of(self, path: str) -> Decision | None:
        """What its layer says of a weight."""
        return self.layers.get(path) or self.layers.get(path.rpartition("/")[0])


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


def read_names(roles: AxisRoles, out_first: bool) -> Decision | None:
    """Read a parameter by the roles of its axes.

    Args:
        roles: the roles of its axes.
        out_first: whether the layer's outputs are stored in front of its inputs.

    Returns:
        Its decision; None if the names do not say enough.
    """
    if not roles.known:
        return None
    if roles.table:
        return Decision(None, "axis names")
    groups = [axes for axes in (roles.features, roles.heads) if axes]
    if not roles.heads and len(roles.features) == 2:
        groups = [roles.features[:1], roles.features[1:]]
    elif len(roles.features) > 1 or not roles.features:
        return None
    if len(groups) < 2:
        return Decision(None, "axis names")
    first, second = sorted(groups)
    view = View(second, first) if out_first else View(first, second)
    return Decision(view, "axis names")


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


def _read_layer(layer: Any) -> Decision:
    """Read the weight of a layer that names the axes it contracts and those it produces.

    Those of haliax are `Linear`, `MoELinear` and `Conv`; Levanter's Muon flattens the two groups
    in the same way. Axes in neither group are batch: layers and experts. So are the parts of a
    fused kernel, which are matrices of their own.
    """
    axes = tuple(layer.weight.axes)
    spatial = _group(getattr(layer, "Spatial", ()))
    contracted, produced = _group(layer.In), _group(layer.Out)
    if any(_role(name) == "table" for name in produced):
        return Decision(None, "output head: its layer writes a vocabulary", kind=Kind.HEAD)
    if spatial and all(axis.size == 1 for axis in axes if axis.name in contracted):
        return Decision(None, "depthwise convolution")
    rows, cols = (_places(axes, names) for names in (contracted | spatial, produced))
    view = View(rows, cols) if rows and cols else None
    return Decision(view, "the axes that its layer contracts and produces")


def _places(axes: tuple[Any, ...], names: frozenset[str]) -> tuple[int, ...]:
    """Where a group of axes stands, without the parts of a fused kernel."""
    whole = [a for a, axis in enumerate(axes) if axis.name in names]
    return tuple(a for a in whole if _role(axes[a].name) != "part") or tuple(whole)


def _group(axes: Any) -> frozenset[str]:
    """The names in an axis, in several, or in a dict from names to lengths."""
    several = axes if isinstance(axes, Iterable) and not isinstance(axes, str) else (axes,)
    return frozenset(axis if isinstance(axis, str) else axis.name for axis in several)
