"""The link in the middle: every matrix of the tree becomes its (approximate) polar factor.

Stateless. Leaves are read through their views, matrices of one shape are pooled over all leaves,
and the orthogonalizer sees nothing but batches `[B, m, n]` with `m <= n`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_muon.matrices import paths, rules
from optax_muon.polar import newton_schulz
from optax_muon.sharding.buckets import Stacks, buckets

Orthogonalizer = Callable[[jax.Array], jax.Array]
"""Any function `[..., m, n] -> [..., m, n]`."""


def orthogonalize(
    orthogonalizer: Orthogonalizer = newton_schulz, *, views: Any = None
) -> optax.GradientTransformation:
    """Replace every matrix `U = P S Q^T` of the updates by (nearly) `P Q^T`.

    Args:
      orthogonalizer: a function `[..., m, n] -> [..., m, n]`; set its options with
        `functools.partial(newton_schulz, coefficients=POLAR_EXPRESS)`.
      views: which leaves are matrices, and how; see `optax_muon.label`. Leaves without a view
        pass unchanged.

    Returns:
      A stateless transformation. Updates keep their dtype.

    Raises:
      ValueError: (in `update`) a leaf that the views leave undecided, or a view that does not fit.

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
        geometries = {
            path: view.on(leaves[path].shape)
            for path, view in rules.assign(updates, views).items()
            if view is not None
        }
        stacks: Stacks = {path: g.to_matrices(leaves[path]) for path, g in geometries.items()}
        done: dict[tuple[str, int], jax.Array] = {}
        for bucket in buckets(geometries, {path: leaf.dtype for path, leaf in leaves.items()}):
            done |= bucket.unpack(orthogonalizer(bucket.pack(stacks)))
        for path, geometry in geometries.items():
            blocks = range(len(geometry.blocks))
            leaves[path] = geometry.from_matrices([done[path, block] for block in blocks])
        return jax.tree.unflatten(jax.tree.structure(updates), leaves.values()), state

    return optax.GradientTransformation(optax.init_empty_state, update)
