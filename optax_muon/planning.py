"""From parameters to a plan: bind the views, count the orthogonalizer, place the matrices.

`plan` is what a user prints; the link `orthogonalize` plans through the same functions, so what is
printed is what runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from optax_muon.matrices import assign, paths
from optax_muon.matrices.dimension_numbers import given_shardings
from optax_muon.matrices.views import BoundView, View, Views
from optax_muon.platforms import get_device
from optax_muon.polar import (
    GramNewtonSchulz,
    NewtonSchulz,
    Plain,
    gram_newton_schulz,
    newton_schulz,
)
from optax_muon.sharding import planner
from optax_muon.sharding.cost import CostModel, WorkModel
from optax_muon.sharding.execute import Orthogonalizer
from optax_muon.sharding.mesh import (
    AnyMesh,
    LeafShardings,
    Shardings,
    check_names,
    resolve_shardings,
)
from optax_muon.sharding.plan import Plan
from optax_muon.sharding.search import LayoutClass


def plan(
    params: Any,
    *,
    orthogonalizer: Orthogonalizer | None = None,
    views: Views = None,
    shardings: Shardings = None,
    mesh: AnyMesh | None = None,
    platform: str | None = None,
    layout: str | LayoutClass | None = None,
    model: CostModel | None = None,
    memory: int = 2**28,
) -> Plan:
    """Plan the orthogonalization of a tree of parameters; nothing is traced.

    Args:
        params: A tree of arrays or `ShapeDtypeStruct`s.
        orthogonalizer: The function that will process the matrices; None is `newton_schulz`.
        views: Which leaves are matrices, and how; see `optax_muon.label`.
        shardings: A tree (or prefix, or `{path: ...}` dict) of `NamedSharding` or `PartitionSpec`,
            or a callable that returns one. None takes those of dimension numbers in `views`, or
            reads the arrays' types.
        mesh: The mesh of bare `PartitionSpec`s; None is the ambient mesh.
        platform: `tpu`, `gpu`, `cpu`, or JAX's `device_kind`, such as `TPU v5 lite`, whose rates
            are taken. None is the mesh's, or without a mesh this machine's. An `AbstractMesh`
            without an `abstract_device` counts as CPUs.
        layout: `home` or `gather` for all matrices; None takes the cheapest for each
            bucket.
        model: The rates that decide between layouts; None takes those of the platform.
        memory: Bytes of temporary arrays above which matrices are processed in chunks.

    Raises:
        ValueError: The shardings do not fit the parameters or the mesh, or `layout` or `platform`
            is unknown.
        TypeError: `shardings` holds something else, or `orthogonalizer` is not hashable.

    >>> import jax, jax.numpy as jnp
    >>> from optax_muon import View
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
    >>> params = {"kernel": jax.ShapeDtypeStruct((9, 512, 2048), jnp.float32)}
    >>> views = {"kernel": View(rows=1, cols=2)}
    >>> [bucket_plan] = plan(params, views=views, shardings=P(None, "fsdp"), mesh=mesh).buckets
    >>> [(part.layout, part.count, part.form) for part in bucket_plan.assignments]
    [('home', 8, 'Gram 2, 2 panels'), ('split', 1, 'plain')]
    """
    if platform is not None:
        get_device(platform)
    leaves = paths.named_leaves(params)
    bounds = bind_views(params, views)
    shardings = given_shardings(shardings, views)
    check_names(leaves, shardings)
    where = resolve_shardings({path: leaves[path] for path in bounds}, shardings, mesh)
    return make_plan(
        leaves,
        bounds,
        where,
        orthogonalizer or newton_schulz,
        platform=platform or (jax.default_backend() if where.mesh is None else None),
        layout=layout,
        model=model,
        memory=memory,
    )


_SETTLED: contextvars.ContextVar[Mapping[str, View | None] | None] = contextvars.ContextVar(
    "settled views of the chain around a link", default=None
)


@contextlib.contextmanager
def settled_views(views: Mapping[str, View | None]) -> Iterator[None]:
    """While it lasts, links without views of their own read matrices as the chain around them.

    Without this, `muon(views=..., post=normuon())` would normalize by the default views, and where
    the two differ it would do so silently along another axis.

    Args:
        views: Path to view, None for the fallback, of the whole tree.
    """
    token = _SETTLED.set(views)
    try:
        yield
    finally:
        _SETTLED.reset(token)


def bind_views(tree: Any, views: Views) -> dict[str, BoundView]:
    """Return `{path: view}` of the leaves that have a view, bound to their shapes.

    With `views=None` they are those of the chain around, or without one decided by the evidence.
    Leaves without entries, such as a stack of no layers, have no matrices.
    """
    leaves = paths.named_leaves(tree)
    settled = _SETTLED.get()
    if views is None and settled is not None and leaves.keys() <= settled.keys():
        found = {path: settled[path] for path in leaves}
    else:
        found = assign.assign(tree, views)
    return {
        path: view.bind(leaves[path].shape)
        for path, view in found.items()
        if view is not None and math.prod(leaves[path].shape)
    }


def make_plan(
    leaves: Mapping[str, Any],
    bounds: Mapping[str, BoundView],
    where: LeafShardings,
    orthogonalizer: Orthogonalizer,
    **options: Any,
) -> Plan:
    """Plan for leaves whose shardings are known; `options` are those of `planner.make_plan`."""
    dtypes = {path: np.dtype(leaves[path].dtype) for path in bounds}
    return planner.make_plan(bounds, dtypes, where, work_model(orthogonalizer), **options)


def work_model(orthogonalizer: Orthogonalizer) -> WorkModel:
    """Return how the planner counts an orthogonalizer.

    An object with a method `count` that takes what that of `NewtonSchulz` takes counts its own
    work; its `rows` and `dtype` are read if it has them. Any other callable is counted as five
    steps of the plain form. Matrices are split by columns only if its attribute
    `supports_column_shards` is true.

    Raises:
        TypeError: `orthogonalizer` is not hashable.
    """
    if not isinstance(orthogonalizer, Hashable):
        raise TypeError(
            f"The orthogonalizer of type {type(orthogonalizer).__name__} is not hashable, and"
            " compiled programs are cached by it; use @dataclass(frozen=True), or define __hash__."
        )
    resolved = resolve_orthogonalizer(orthogonalizer)
    counted: Any = resolved if _counts(resolved) else NewtonSchulz(form=Plain())
    dtype = getattr(counted, "dtype", None)
    return WorkModel(
        counted,
        steps=len(getattr(counted, "rows", ())),
        dtype=None if dtype is None else np.dtype(dtype),
        supports_column_shards=getattr(resolved, "supports_column_shards", False),
    )


def _counts(orthogonalizer: Orthogonalizer) -> bool:
    """Whether it has the method by which the planner counts, and not another of that name.

    Every tuple has a `count`, and so has an orthogonalizer that is a named tuple.
    """
    count = getattr(orthogonalizer, "count", None)
    if not callable(count):
        return False
    try:
        inspect.signature(count).bind(1, 1, 1, platform="cpu")
    except (TypeError, ValueError):  # it takes other arguments, or does not say which
        return False
    return True


def resolve_orthogonalizer(orthogonalizer: Orthogonalizer) -> Orthogonalizer:
    """Replace our two functions, or a `partial` of one, by the object that counts."""
    function, options = orthogonalizer, {}
    if isinstance(orthogonalizer, functools.partial) and not orthogonalizer.args:
        function, options = orthogonalizer.func, orthogonalizer.keywords
    for ours, kind in ((newton_schulz, NewtonSchulz), (gram_newton_schulz, GramNewtonSchulz)):
        if function is ours:
            return kind(**options)
    return orthogonalizer
