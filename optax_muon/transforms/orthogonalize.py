"""The central link: it replaces every matrix by its (approximate) polar factor.

It is stateless. Leaves are read through their views, and matrices of one shape are batched across
leaves: the orthogonalizer gets batches `[B, m, n]` with `m <= n` on the devices that the plan has
chosen (`sharding/plan.py`).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping

import jax
import optax

from optax_muon.matrices import paths
from optax_muon.matrices.dimension_numbers import given_shardings
from optax_muon.matrices.views import BoundView, Views
from optax_muon.planning import bind_views, make_plan, resolve_orthogonalizer
from optax_muon.polar import newton_schulz
from optax_muon.sharding.execute import Orthogonalizer, execute
from optax_muon.sharding.mesh import Shardings, resolve_shardings
from optax_muon.sharding.plan import Plan
from optax_muon.transforms.arguments import check_orthogonalizer, static_args


@static_args("orthogonalizer", "views", "shardings")
def orthogonalize(
    orthogonalizer: Orthogonalizer = newton_schulz,
    *,
    views: Views = None,
    shardings: Shardings = None,
    plan: Plan | None = None,
) -> optax.GradientTransformation:
    """Replace every matrix `U = P S Q^T` of the updates by (approximately) `P Q^T`.

    Args:
        orthogonalizer: A function `[..., m, n] -> [..., m, n]`; set its options with
            `functools.partial(newton_schulz, coefficients=POLAR_EXPRESS)`. An object with a method
            `count` like that of `NewtonSchulz` counts its own work for the plan; where its
            attribute `supports_column_shards` is true, it may be called on columns that lie on
            several devices, with the keyword `column_shards`; where `supports_platform` is, it is
            told by the keyword `platform` what it is traced for. Any other callable gets whole
            matrices and is counted as five plain steps. It must be hashable, because compiled
            programs are cached by it.
        views: Which leaves are matrices, and how; see `optax_muon.label`. Leaves without a view
            pass unchanged.
        shardings: How the updates are sharded, needed on Auto mesh axes only: a
            tree or prefix of `NamedSharding` or `PartitionSpec`, a `{path: ...}` dict, or a
            callable. None takes those that dimension numbers in `views` carry.
        plan: A plan made with `optax_muon.plan`; None makes one for these updates.

    Returns:
        A stateless transformation. Updates keep their dtype and their sharding.

    Raises:
        ValueError: (in `update`) The views leave a leaf undecided, a view or a sharding does not
            fit, or the plan was made for other parameters.
        TypeError: `orthogonalizer` cannot be called, or is not hashable.

    >>> import jax.numpy as jnp
    >>> link = orthogonalize()
    >>> updates, _ = link.update({"kernel": 1e-20 * jnp.eye(4, 8)}, link.init(None))
    >>> bool(jnp.linalg.norm(updates["kernel"], 2) > 0.6)
    True
    """
    shardings = given_shardings(shardings, views)
    check_orthogonalizer(orthogonalizer)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        leaves = paths.named_leaves(updates)
        bounds = bind_views(updates, views)
        if plan is not None:
            plan.check(bounds)
            leaves |= _execute(plan, leaves, orthogonalizer)
        else:
            for group in _by_devices(leaves, bounds):
                chosen = _plan(leaves, group, shardings, orthogonalizer)
                leaves |= _execute(chosen, leaves, orthogonalizer)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves.values()), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _execute(
    plan: Plan, leaves: Mapping[str, jax.Array], orthogonalizer: Orthogonalizer
) -> dict[str, jax.Array]:
    if not isinstance(orthogonalizer, jax.tree_util.Partial):
        orthogonalizer = jax.tree_util.Partial(resolve_orthogonalizer(orthogonalizer))
    return execute(plan, {leaf.path: leaves[leaf.path] for leaf in plan.leaves}, orthogonalizer)


def _by_devices(
    leaves: Mapping[str, jax.Array], bounds: Mapping[str, BoundView]
) -> Iterable[dict[str, BoundView]]:
    """Group matrices whose arrays lie on the same devices, such as those of a pipeline stage.

    Under a trace all arrays are on the same devices.
    """
    groups: dict[frozenset[jax.Device], dict[str, BoundView]] = {}
    for path, bound in bounds.items():
        leaf = leaves[path]
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        devices = leaf.devices() if concrete and leaf.committed else ()
        groups.setdefault(frozenset(devices), {})[path] = bound
    # Arrays that are not committed to a device go wherever the others are.
    movable = groups.pop(frozenset(), {})
    first = next(iter(groups.values()), {})
    first.update(movable)
    return groups.values() if groups else [first]


def _plan(
    leaves: Mapping[str, jax.Array],
    bounds: Mapping[str, BoundView],
    shardings: Shardings,
    orthogonalizer: Orthogonalizer,
) -> Plan:
    where = resolve_shardings({path: leaves[path] for path in bounds}, shardings)
    if where.unknown_shardings:
        warnings.warn(
            "Muon cannot see how its updates are sharded on the Auto axes of this mesh, and leaves"
            " the communication along them to the compiler; pass shardings= (to compat.muon in the"
            " dimension numbers), or use Explicit axes.",
            stacklevel=_depth_below_user(),
        )
    return make_plan(leaves, bounds, where, orthogonalizer)


def _depth_below_user() -> int:
    """The `stacklevel`, for the caller, of the nearest frame outside of this package and of optax.

    Between a user's step and this link lie the chain, its wrappers and partitions.
    """
    ours = {"optax_muon", "optax", "jax"}
    frame, depth = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ours:
        frame, depth = frame.f_back, depth + 1
    return depth
