"""Planning for an orthogonalizer: count what it does to each matrix, and deal out the work."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optax_muon.matrices import assign, paths
from optax_muon.polar import (
    KELLER,
    Form,
    Gram,
    Row,
    choose,
    gram_newton_schulz,
    newton_schulz,
)
from optax_muon.sharding import planner
from optax_muon.sharding.cost import CostModel, Share, Work
from optax_muon.sharding.execute import Orthogonalizer
from optax_muon.sharding.mesh import AnyMesh, check_names, read
from optax_muon.sharding.plan import Plan


def plan(
    params: Any,
    *,
    orthogonalizer: Orthogonalizer | None = None,
    views: Any = None,
    shardings: Any = None,
    mesh: AnyMesh | None = None,
    platform: str | None = None,
    layout: str | None = None,
    model: CostModel | None = None,
    memory: int = 2**28,
) -> Plan:
    """Plan the orthogonalization of a tree of parameters; nothing is traced.

    Args:
      params: a tree of arrays or `ShapeDtypeStruct`s.
      orthogonalizer: what the matrices go through; None is `newton_schulz`.
      views: which leaves are matrices, and how; see `optax_muon.label`.
      shardings: a tree (or prefix, or `{path: ...}` dict) of `NamedSharding` or `PartitionSpec`, or
        a callable that returns one. None reads the arrays' types.
      mesh: the mesh of bare `PartitionSpec`s; None is the ambient mesh.
      platform: `tpu`, `gpu` or `cpu`; None is the mesh's, or without a mesh this machine's. An
        `AbstractMesh` has none, and is taken for CPUs.
      layout: `home` or `gather` for all matrices; None takes the cheapest for each.
      model: rates that decide between layouts; None takes those of the platform.
      memory: bytes of temporary arrays above which matrices are worked on in turns.

    Raises:
      ValueError: shardings that do not fit the parameters or the mesh, an unknown layout or
        platform.
      TypeError: shardings of another kind.

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
    if platform not in (None, "tpu", "gpu", "cpu"):
        raise ValueError(f"platform {platform!r} is unknown; use 'tpu', 'gpu', 'cpu' or None.")
    leaves = paths.named_leaves(params)
    bounds = {
        p: view.bind(leaves[p].shape)
        for p, view in assign.assign(params, views).items()
        if view is not None
    }
    check_names(leaves, shardings)
    where = read({p: leaves[p] for p in bounds}, shardings, mesh)
    return planner.make(
        bounds,
        {p: np.dtype(leaves[p].dtype) for p in bounds},
        where,
        work_of(orthogonalizer or newton_schulz),
        on=platform or (jax.default_backend() if where.mesh is None else None),
        layout=layout,
        model=model,
        memory=memory,
    )


def work_of(orthogonalizer: Orthogonalizer) -> Work:
    """What the planner needs to know of an orthogonalizer, read from its options."""
    function, options = orthogonalizer, {}
    if isinstance(orthogonalizer, functools.partial):
        function, options = orthogonalizer.func, orthogonalizer.keywords
    dtype = options.get("dtype")
    rows = options.get("coefficients", KELLER).take(options.get("steps"))
    return Work(
        steps=len(rows),
        dtype=None if dtype is None else np.dtype(dtype),
        splits="column_shards" in inspect.signature(orthogonalizer).parameters,
        share=_share(function, rows, options),
    )


def _share(
    function: Orthogonalizer, rows: tuple[Row, ...], options: dict[str, Any]
) -> Callable[..., Share] | None:
    """Count the forms of this package; what another orthogonalizer does is not known."""
    if function is newton_schulz:
        return _Chosen(rows, options.get("form"))
    if function is gram_newton_schulz:
        restarts = options.get("restarts")
        return _OnGram(rows, None if restarts is None else tuple(restarts))
    return None


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Counts one matrix as `newton_schulz` works on it."""

    rows: tuple[Row, ...]
    form: Form | None

    def __call__(self, m: int, n: int, devices: int, dtype: np.dtype, platform: str) -> Share:
        form = self.form or choose(m, n, self.rows, dtype=dtype, platform=platform, devices=devices)
        return _counted(form, m, n, self.rows, devices)


@dataclasses.dataclass(frozen=True)
class _OnGram:
    """Counts one matrix as `gram_newton_schulz` works on it."""

    rows: tuple[Row, ...]
    restarts: tuple[int, ...] | None

    def __call__(self, m: int, n: int, devices: int, dtype: np.dtype, platform: str) -> Share:
        return _counted(Gram.of(len(self.rows), dtype, self.restarts), m, n, self.rows, devices)


def _counted(form: Form, m: int, n: int, rows: tuple[Row, ...], devices: int) -> Share:
    count = form.count(m, n, rows, devices)
    return Share(count.flops, count.sums, count.gathers, str(form))
