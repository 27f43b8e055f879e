"""`optax.contrib.muon` on this engine: same arguments, state and numbers, one batch per shape.

Momentum is an average, and Nesterov momentum combines bias-corrected terms (Dozat, 2016):

    M_t = beta M_{t-1} + (1 - beta) g_t
    U_t = beta M_t / (1 - beta^{t+1}) + (1 - beta) g_t / (1 - beta^t)

then each matrix of `U` is orthogonalized (`preconditioning.py`), scaled by its shape, decayed and
multiplied by the learning rate; leaves without dimension numbers go to AdamW. Against the paper's
`optax_muon.muon` the early steps differ by the bias correction, and the defaults are optax's:
every 2-D leaf is a matrix, no weight decay, Keller Jordan's scale.

The numbers are those of optax 0.2.8, up to the order of floating-point sums. Optax's arithmetic
relies on standard dtype promotion, so these links run under it, whatever
`jax_numpy_dtype_promotion` is.
"""

# Annotations stay objects here: optax's own tests read that of `learning_rate` to see that it may
# be a schedule.
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from optax.contrib import MuonDimensionNumbers, MuonState

from optax_muon.compat.preconditioning import PRECONDITIONERS, newton_schulz
from optax_muon.matrices.dimension_numbers import given_shardings
from optax_muon.matrices.entries import is_function
from optax_muon.matrices.paths import map_named
from optax_muon.matrices.views import View, Views
from optax_muon.polar.coefficients import KELLER, YOU, Row
from optax_muon.sharding.mesh import Shardings
from optax_muon.transforms.arguments import is_zero, static_args
from optax_muon.transforms.orthogonalize import orthogonalize
from optax_muon.transforms.scale import keller_scale, match_rms, scale_by_shape
from optax_muon.transforms.wrappers import (
    under_standard_promotion,
    with_settled_views,
)

Coefficients = Sequence[ArrayLike] | Sequence[Sequence[ArrayLike]] | ArrayLike
"""One row `(a, b, c)` for every step, or `[steps, 3]`."""

Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]

_STANDARD: Row = KELLER.rows[0]
_ITERATIONS = {
    name: functools.partial(newton_schulz, precondition=precondition)
    for name, precondition in PRECONDITIONERS.items()
}
"""Made once, because compiled programs are found by them."""

_PRESETS: dict[str, Coefficients] = {"standard": _STANDARD, "dion": YOU.rows}


@static_args("weight_decay_mask", "muon_weight_dimension_numbers", "mu_dtype")
def muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Coefficients | str = _STANDARD,
    ns_steps: int = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.999,
    adam_eps_root: ArrayLike = 0.0,
    adam_weight_decay: ArrayLike = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon with the signature of `optax.contrib.muon`: change the import, keep the run.

    A state of either continues under the other.

    Args:
        learning_rate: A number or a schedule, in units of the scaled update.
        ns_coeffs: One row `(a, b, c)` for all steps, an array `[steps, 3]`, or the name of a
            preset: `"standard"` (Keller Jordan's row) or `"dion"` (five rows).
        ns_steps: Number of Newton-Schulz steps if `ns_coeffs` is one row. An array has one step per
            row, and may not have more than `ns_steps` rows.
        beta: Decay of the momentum, in [0, 1).
        eps: Added to the norm of each matrix; also Adam's epsilon.
        weight_decay: Decoupled decay of the matrices, multiplied by the learning rate.
        weight_decay_mask: A tree of booleans, a prefix of it, or a function of the parameters that
            gives one.
        mu_dtype: Dtype of the momentum, and of Adam's first moment; None keeps the parameters'.
        nesterov: Use Nesterov momentum, in Adam as well, which makes it NAdam.
        adaptive: Multiply each update by its inner product with the momentum, over the whole leaf.
        preconditioning: How matrices are scaled before the iteration, see
            `optax_muon.compat.preconditioning`.
        adam_b1: Decay of Adam's first moment.
        adam_b2: Decay of Adam's second moment.
        adam_eps_root: Epsilon under Adam's square root.
        adam_weight_decay: Decoupled decay of the leaves that Adam updates.
        adam_learning_rate: Adam's own learning rate; None takes `learning_rate`.
        muon_weight_dimension_numbers: An `optax.contrib.MuonDimensionNumbers` for each matrix and
            None for each leaf of Adam's: a tree, a prefix of it, or a function of the parameters
            that gives one. Views of this package are accepted too. None: every 2-D leaf is a
            matrix.
        consistent_rms: Scale by `consistent_rms sqrt(max(fan_in, fan_out))`, the paper's rule with
            0.2; None scales by `sqrt(max(1, fan_out / fan_in))`.

    Returns:
        The transformation; its state has optax's own types.

    Raises:
        ValueError: an unknown preset or preconditioning, or coefficients that do not fit.

    >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}
    >>> state = optax.contrib.muon(0.1).init(params)
    >>> updates, state = muon(0.1).update(params, state, params)
    >>> jax.tree.map(jnp.shape, updates)
    {'bias': (8,), 'kernel': (4, 8)}

    Source: optax 0.2.8, `optax.contrib.muon`.
    """
    adam = optax.chain(
        optax.scale_by_adam(
            adam_b1, adam_b2, eps, adam_eps_root, mu_dtype=mu_dtype, nesterov=nesterov
        ),
        _decayed_weights(adam_weight_decay),
        optax.scale_by_learning_rate(
            learning_rate if adam_learning_rate is None else adam_learning_rate
        ),
    )
    scale_by_views = functools.partial(
        _scale_by_views,
        _preset(ns_coeffs) if isinstance(ns_coeffs, str) else ns_coeffs,
        ns_steps,
        beta,
        eps,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
    )
    rule = keller_scale() if consistent_rms is None else match_rms(consistent_rms)
    dimensions = muon_weight_dimension_numbers
    if dimensions is None:
        dimensions = _every_matrix

    def build(tree: Any, settled: dict[str, View | None]) -> optax.GradientTransformation:
        views = {path: view for path, view in settled.items() if view is not None}
        # Without parameters, `optax.tree.map_params` asks for the structure of a state.
        given = dimensions(tree) if settled and is_function(dimensions) else dimensions
        chain = optax.chain(
            scale_by_views(views=views, shardings=given_shardings(None, given)),
            scale_by_shape(rule, views=views),
            _decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

        def group(path: str, _: Any) -> str:
            return "muon" if path in views else "adam"

        return optax.partition(
            {"muon": chain, "adam": adam}, lambda params: map_named(group, params)
        )

    return under_standard_promotion(with_settled_views(build, dimensions))


@static_args("weight_dimension_numbers", "mu_dtype")
def scale_by_muon(
    ns_coeffs: Coefficients = _STANDARD,
    ns_steps: int = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace gradients by their orthogonalized momentum: the first link of `compat.muon`.

    Args:
        ns_coeffs: One row `(a, b, c)` for all steps, or an array `[steps, 3]`.
        ns_steps: Number of steps if `ns_coeffs` is one row; the most rows an array may have.
        beta: Decay of the momentum, in [0, 1).
        eps: Added to the norm of each matrix.
        mu_dtype: Dtype of the momentum; None keeps the parameters'.
        nesterov: Use Nesterov momentum.
        adaptive: Multiply each update by its inner product with the momentum, over the whole leaf.
        preconditioning: How matrices are scaled before the iteration.
        weight_dimension_numbers: As `muon_weight_dimension_numbers` of `muon`; None if every leaf
            is a 2-D matrix.

    Returns:
        The transformation; its state is an `optax.contrib.MuonState`.

    Raises:
        ValueError: an unknown preconditioning, or (in `init`) coefficients or steps that do not
            fit.

    >>> tx = scale_by_muon(ns_steps=8)
    >>> grads = {"kernel": jnp.ones((1, 4))}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["kernel"].shape, int(state.count))
    (1, 4) 1

    Source: optax 0.2.8, `optax.contrib.scale_by_muon`.
    """
    views = View(0, 1) if weight_dimension_numbers is None else weight_dimension_numbers
    return _scale_by_views(
        ns_coeffs,
        ns_steps,
        beta,
        eps,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
        views=views,
        shardings=None,
    )


def _scale_by_views(
    ns_coeffs: Coefficients,
    ns_steps: int,
    beta: ArrayLike,
    eps: ArrayLike,
    mu_dtype: DTypeLike | None,
    *,
    nesterov: bool,
    adaptive: bool,
    preconditioning: Preconditioning,
    views: Views,
    shardings: Shardings,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_muon` for views that may have lost the shardings of their dimension numbers."""
    if preconditioning not in PRECONDITIONERS:
        raise ValueError(
            f"preconditioning is {preconditioning!r}; it must be one of {list(PRECONDITIONERS)}."
        )
    link = functools.partial(orthogonalize, views=views, shardings=shardings)

    def init(params: optax.Params) -> MuonState:
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        return MuonState(jnp.zeros([], jnp.int32), mu, _checked(ns_coeffs, ns_steps))

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        average = _unbiased(updates, mu, beta, count, nesterov)
        polar = jax.tree_util.Partial(
            _ITERATIONS[preconditioning], eps=eps, **_rows(state.ns_coeffs, ns_steps)
        )
        updates, _ = link(polar).update(average, optax.EmptyState())
        if adaptive:
            updates = jax.tree.map(_scaled_by_dual_norm, average, updates)
        return updates, MuonState(count, optax.tree.cast(mu, mu_dtype), state.ns_coeffs)

    return under_standard_promotion(optax.GradientTransformation(init, update))


def _decayed_weights(rate: ArrayLike, mask: Any = None) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, which needs no parameters where the rate is the number 0."""
    link = optax.add_decayed_weights(rate, mask)
    if not is_zero(rate):
        return link
    return optax.GradientTransformation(link.init, lambda updates, state, _=None: (updates, state))


def _every_matrix(params: optax.Params) -> Any:
    """Optax's default: every leaf of rank two, embeddings included."""
    return jax.tree.map(lambda p: MuonDimensionNumbers() if p.ndim == 2 else None, params)


def _preset(name: str) -> Coefficients:
    if name not in _PRESETS:
        raise ValueError(f"ns_coeffs is {name!r}; the presets are {list(_PRESETS)}.")
    return _PRESETS[name]


def _checked(ns_coeffs: Coefficients, ns_steps: int) -> jax.Array:
    """The coefficients as the state keeps them: `[3]` or `[steps, 3]`."""
    traced = isinstance(ns_steps, jax.core.Tracer)  # by `optax.inject_hyperparams`
    if not traced and ns_steps < 1:
        raise ValueError(f"ns_steps is {ns_steps}; it must be 1 or more.")
    # A copy, because the state may be donated, and a result: on Explicit axes its sharding has an
    # entry per axis, as `update` returns it. With a constant's `P()`, `update` is compiled twice.
    coeffs = jnp.asarray(ns_coeffs) * 1
    if coeffs.ndim not in (1, 2) or coeffs.shape[-1] != 3:
        raise ValueError(f"ns_coeffs has the shape {coeffs.shape}; it must be (3,) or (steps, 3).")
    if not traced and coeffs.ndim == 2 and coeffs.shape[0] > ns_steps:
        raise ValueError(
            f"ns_coeffs has {coeffs.shape[0]} rows and ns_steps is {ns_steps};"
            f" all rows are used, so ns_steps must be {coeffs.shape[0]} or more."
        )
    return coeffs


def _rows(ns_coeffs: jax.Array, ns_steps: ArrayLike) -> dict[str, Any]:
    """The options of `newton_schulz`; `optax.inject_hyperparams` traces the steps."""
    if ns_coeffs.ndim == 2:
        return {"rows": ns_coeffs}
    if isinstance(ns_steps, jax.core.Tracer):
        return {"rows": ns_coeffs, "steps": ns_steps}
    return {"rows": jnp.broadcast_to(ns_coeffs, (np.asarray(ns_steps).item(), 3))}


def _unbiased(
    updates: optax.Updates, mu: optax.Updates, beta: ArrayLike, count: jax.Array, nesterov: bool
) -> optax.Updates:
    """The bias-corrected average of the gradients, one step ahead if `nesterov`."""
    if not nesterov:
        return optax.tree.bias_correction(mu, beta, count)
    ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
    fresh = optax.tree.bias_correction(updates, beta, count)
    return jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, fresh)


def _scaled_by_dual_norm(average: jax.Array, polar: jax.Array) -> jax.Array:
    """`<U, O> O`: steepest descent in the spectral norm, with its length (arXiv 2409.20325)."""
    return jnp.sum(average.conj() * polar) * polar
