"""The link in the middle: every matrix of the tree becomes its (approximate) polar factor.

Stateless. Leaves are read through their views, matrices of one shape are pooled over all leaves,
and the orthogonalizer sees nothing but batches of whole matrices `[B, m, n]` with `m <= n`, on
whatever device the plan has chosen (`sharding/plan.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from optax_muon.matrices import assign, paths
from optax_muon.matrices.views import BoundView
from optax_muon.planning import work_of
from optax_muon.polar import newton_schulz
from optax_muon.sharding.execute import Orthogonalizer, execute
from optax_muon.sharding.mesh import LeafShardings, read
from optax_muon.sharding.plan import Plan
from optax_muon.sharding.planner import make


def orthogonalize(
    orthogonalizer: Orthogonalizer = newton_schulz,
    *,
    views: Any = None,
    shardings: Any = None,
    plan: Plan | None = None,
) -> optax.GradientTransformation:
    """Replace every matrix `U = P S Q^T` of the updates by (nearly) `P Q^T`.

    Args:
      orthogonalizer: a function `[..., m, n] -> [..., m, n]`; set its options with
        `functools.partial(newton_schulz, coefficients=POLAR_EXPRESS)`. If it takes a keyword
        `column_shards`, it may be given columns that lie on several devices; else it gets whole
        matrices only.
      views: which leaves are matrices, and how; see `optax_muon.label`. Leaves without a view
        pass unchanged.
      shardings: how the updates are sharded, where their types do not say (Auto mesh axes): a tree
        or prefix of `NamedSharding` or `PartitionSpec`, a `{path: ...}` dict, or a callable.
      plan: a plan made with `optax_muon.plan`; None makes one for these updates.

    Returns:
      A stateless transformation. Updates keep their dtype and their sharding.

    Raises:
      ValueError: (in `update`) a leaf that the views leave undecided, a view or a sharding that
        does not fit, a plan made for other parameters.

    >>> import jax.numpy as jnp
    >>> link = orthogonalize()
    >>> updates, _ = link.update({"kernel": 1e-20 * jnp.eye(4, 8)}, link.init(None))
    >>> bool(jnp.linalg.norm(updates["kernel"], 2) > 0.6)
    True
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        leaves = paths.named_leaves(updates)
        assigned = assign.assign(updates, views)
        bounds = {p: v.bind(leaves[p].shape) for p, v in assigned.items() if v is not None}
        if plan is not None:
            plan.check(bounds)
        chosen = plan or _plan(leaves, bounds, shardings, orthogonalizer)
        leaves |= execute(chosen, leaves, orthogonalizer)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves.values()), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _plan(
    leaves: Mapping[str, jax.Array],
    bounds: Mapping[str, BoundView],
    shardings: Any,
    orthogonalizer: Orthogonalizer,
) -> Plan:
    where = read({path: leaves[path] for path in bounds}, shardings)
    if where.unknown_shardings:
        warnings.warn(
            "Muon cannot see how its updates are sharded on the Auto axes of this mesh, and leaves"
            " the communication to the compiler; pass shardings= (or use Explicit axes).",
            stacklevel=2,
        )
        where = LeafShardings(None, {}, unknown_shardings=True)
    dtypes = {path: np.dtype(leaves[path].dtype) for path in bounds}
    return make(bounds, dtypes, where, work_of(orthogonalizer))
