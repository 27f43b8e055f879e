"""Shardings of an optimizer's state: those of the parameters, or cut further (ZeRO-1).

A momentum has the shape of its parameter and takes its sharding; step counts are replicated. The
plan never enters the state, so a checkpoint restores on any mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_muon.errors import shortened
from optax_muon.matrices import paths
from optax_muon.sharding.mesh import axis_sizes, manual_axes


def state_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    shardings: Any,
    *,
    zero1: str | Sequence[str] = (),
) -> Any:
    """Return the shardings of `tx.init(params)`, for `jit(out_shardings=...)` and for orbax.

    On Auto mesh axes, pass them to the training step as `out_shardings` too: otherwise the compiler
    is free to lay out its results.

    `optax.tree.map_params(tx, f, state, specs, is_leaf=...)` maps a state with a tree like the
    parameters. As with every `optax.partition`, the moments of either optimizer lack the leaves of
    the other: pass `is_leaf=lambda node: isinstance(node, optax.MaskedNode)`.

    Args:
        tx: The optimizer, with all its wrappers.
        params: Arrays or `ShapeDtypeStruct`s.
        shardings: Those of the parameters: a tree, or prefix of one, of `NamedSharding`.
        zero1: Mesh axes that replicate parameters, over which the momenta are to be cut: ZeRO-1 as
            in arXiv 2502.16982, section 2.3. On Auto axes the optimizer needs them too:
            `muon(shardings=zero1_shardings(...))`.

    Returns:
        A tree of `NamedSharding` with the structure of the state.

    Raises:
        ValueError: A parameter without a sharding, a sharding without a parameter, or an axis that
            the mesh lacks.
        TypeError: A parameter that is neither an array nor a number.

    >>> import jax.numpy as jnp, optax_muon
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    >>> tx = optax_muon.scale_by_muon()
    >>> shardings = NamedSharding(mesh, PartitionSpec("data"))
    >>> tuple(optax.tree.get(state_shardings(tx, params, shardings), "mu")["kernel"].spec)
    ('data',)
    """
    shapes = {path: _shape(path, leaf) for path, leaf in paths.named_leaves(params).items()}
    by_path = zero1_shardings(params, shardings, axes=zero1)
    given = next(iter(_entries(shardings).values()), None)
    if given is None:
        raise ValueError("shardings has no NamedSharding; give every parameter one.")

    def sharding(path: str, leaf: Any) -> NamedSharding:
        owner = paths.longest_suffix(shapes, path)
        if owner is None or shapes[owner] != leaf.shape:
            # With an entry per axis, as programs return it: `P()` is another sharding to `jit`.
            return NamedSharding(given.mesh, PartitionSpec(*[None] * len(leaf.shape)))
        return by_path[owner]

    return paths.map_named(sharding, jax.eval_shape(tx.init, params))


def zero1_shardings(
    params: optax.Params, shardings: Any, *, axes: str | Sequence[str]
) -> dict[str, NamedSharding]:
    """Cut every parameter further, over mesh axes that replicate it (ZeRO-1).

    The first axis of a parameter that divides is cut. For stacked layers or experts that is the
    stack, so that matrices stay whole. A parameter that does not divide stays replicated.

    This is separate from `state_shardings` because on Auto mesh axes the optimizer itself takes the
    result, as `muon(shardings=...)`, and has to exist before its state has shardings.

    Args:
        params: Arrays or `ShapeDtypeStruct`s.
        shardings: A tree, or prefix of one, of `NamedSharding`.
        axes: One mesh axis, or several; none cuts nothing.

    Returns:
        Path to sharding, which `optax_muon.muon(shardings=...)` takes on Auto mesh axes.

    Raises:
        ValueError: A parameter without a sharding, a sharding without a parameter, or an axis that
            the mesh lacks.
        TypeError: A parameter that is neither an array nor a number.
    """
    entries = _entries(shardings)
    _check_entries(entries, params)
    names = (axes,) if isinstance(axes, str) else tuple(dict.fromkeys(axes or ()))
    found: dict[str, NamedSharding] = {}
    for path, leaf in paths.named_leaves(params).items():
        shape, entry = _shape(path, leaf), paths.longest_prefix(entries, path)
        if entry is None:
            raise ValueError(
                f"shardings has no NamedSharding for {path!r}; give every parameter one."
            )
        mesh = entries[entry].mesh
        # Along Manual axes, those of a `shard_map` around, a leaf is not a copy.
        usable = axis_sizes(mesh, manual_axes(mesh))
        for name in names:
            if name not in usable:
                raise ValueError(
                    f"there is no axis {name!r} to cut {path} over; its mesh has"
                    f" {', '.join(usable)}."
                )
        found[path] = _cut_further(shape, entries[entry], names)
    return found


def _entries(shardings: Any) -> dict[str, NamedSharding]:
    """The `NamedSharding`s of a tree by path; other leaves, such as a `PartitionSpec`, left out."""
    leaves = paths.named_leaves(shardings, is_leaf=lambda x: isinstance(x, NamedSharding))
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, NamedSharding)}


def _check_entries(entries: Mapping[str, NamedSharding], params: optax.Params) -> None:
    """Refuse shardings of parameters that are not there; one may be None or masked."""
    known = paths.named_leaves(params, is_leaf=lambda x: x is None or paths.is_masked(x))
    used = {paths.longest_prefix(entries, path) for path in known}
    if unused := [repr(path) for path in entries if path and path not in used]:
        raise ValueError(
            f"shardings names {', '.join(shortened(unused))}, which params does not have; spell the"
            " paths as the parameters do."
        )


def _shape(path: str, leaf: Any) -> tuple[int, ...]:
    if hasattr(leaf, "shape"):
        return tuple(leaf.shape)
    if isinstance(leaf, int | float | complex):
        return ()
    raise TypeError(
        f"{path} is {str(leaf)[:60]!r}, a {type(leaf).__name__}; parameters are arrays or numbers."
    )


def _cut_further(
    shape: Sequence[int], sharding: NamedSharding, axes: Sequence[str]
) -> NamedSharding:
    sizes: Mapping[str, int] = sharding.mesh.shape
    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    over = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    new = tuple(axis for axis in axes if all(axis not in entry for entry in over))
    ways = math.prod(sizes[axis] for axis in new)
    for axis, length in enumerate(shape):
        shard = length // math.prod(sizes[name] for name in over[axis])
        if new and shard % ways == 0:
            over[axis] = (*over[axis], *new)
            return NamedSharding(sharding.mesh, PartitionSpec(*(entry or None for entry in over)))
    return sharding
