"""The size of an orthogonal update: a factor of the fan-in and fan-out of the logical matrix.

An orthogonal update of full rank has RMS `1 / sqrt(max(m, n))` (Moonlight, arXiv 2502.16982,
Lemma 1): without a factor, large matrices would move less than small ones. The factor is that of
the logical matrix, after fused axes are split, not that of the stored leaf.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from optax_muon.matrices import paths
from optax_muon.matrices.views import Axes, BoundView, Views
from optax_muon.planning import bind_views
from optax_muon.polar.normalize import safe_sqrt
from optax_muon.transforms.arguments import check_number, static_args

ScaleRule = Callable[[int, int], float]
"""`(fan_in, fan_out) -> factor` of one logical matrix."""


# Rules are dataclasses, so that the description of a checkpoint has their numbers.


@dataclasses.dataclass(frozen=True)
class MatchRms:
    """The rule of `match_rms`."""

    rms: float

    def __call__(self, fan_in: int, fan_out: int) -> float:
        """The factor of a matrix."""
        return self.rms * math.sqrt(max(fan_in, fan_out))


@dataclasses.dataclass(frozen=True)
class KellerScale:
    """The rule of `keller_scale`."""

    def __call__(self, fan_in: int, fan_out: int) -> float:
        """The factor of a matrix."""
        return math.sqrt(max(1.0, fan_out / fan_in))


@dataclasses.dataclass(frozen=True)
class SpectralScale:
    """The rule of `spectral_scale`."""

    def __call__(self, fan_in: int, fan_out: int) -> float:
        """The factor of a matrix."""
        return math.sqrt(fan_out / fan_in)


@dataclasses.dataclass(frozen=True)
class FixedScale:
    """The rule of `fixed_scale`."""

    hidden: int
    rms: float

    def __call__(self, fan_in: int, fan_out: int) -> float:
        """The factor of a matrix."""
        del fan_in, fan_out
        return self.rms * math.sqrt(self.hidden)


def match_rms(rms: float = 0.2) -> ScaleRule:
    """Give every update the RMS of an AdamW update: `rms sqrt(max(fan_in, fan_out))`.

    The choice of arXiv 2502.16982 ("Adjusted LR", Eq. 4): AdamW's learning rate and weight decay
    carry over. A matrix and its transpose get the same factor.

    Args:
        rms: RMS of the update per unit of learning rate, where all singular values are sent to 1;
            AdamW's own lies between 0.2 and 0.4. `KELLER` ends in a band around 1: updates of
            Gaussian matrices have an RMS of 0.17 to 0.21 for aspect ratios up to 4, and of 0.146 at
            64 x 2048. With `POLAR_EXPRESS` it is 0.20 to 0.21.

    Raises:
        ValueError: `rms` is not positive.
        TypeError: `rms` is not a number; schedules are not.

    >>> match_rms(0.2)(512, 2048) == 0.2 * 2048**0.5
    True
    """
    check_number("rms", rms, above=0, scheduled=False)
    return MatchRms(rms)


def keller_scale() -> ScaleRule:
    """`sqrt(max(1, fan_out / fan_in))`, as in the original Muon and in `optax.contrib.muon`.

    >>> keller_scale()(512, 2048)
    2.0
    """
    return KellerScale()


def spectral_scale() -> ScaleRule:
    """`sqrt(fan_out / fan_in)`: the spectral condition for feature learning (arXiv 2310.17813).

    >>> spectral_scale()(2048, 512)
    0.5
    """
    return SpectralScale()


def fixed_scale(hidden: int, rms: float = 0.2) -> ScaleRule:
    """`rms sqrt(hidden)` whatever the shape: "Baseline" in Table 1 of arXiv 2502.16982 (Eq. 5).

    Args:
        hidden: The model's hidden size.
        rms: RMS of the update of a matrix whose long side is the hidden size.

    Raises:
        ValueError: `rms` is not positive.
        TypeError: `rms` is not a number; schedules are not.
    """
    check_number("rms", rms, above=0, scheduled=False)
    return FixedScale(hidden, rms)


@static_args("rule", "views")
def scale_by_shape(
    rule: ScaleRule | None = None, *, views: Views = None
) -> optax.GradientTransformation:
    """Multiply every matrix by a factor that depends on its shape.

    Args:
        rule: `(fan_in, fan_out) -> factor`; None is `match_rms(0.2)`.
        views: Which leaves are matrices, and how; see `optax_muon.label`. Leaves without a view
            pass unchanged.

    Raises:
        TypeError: `rule` cannot be called.

    >>> link = scale_by_shape(keller_scale())
    >>> updates, _ = link.update({"kernel": jnp.ones((1, 4))}, link.init(None))
    >>> updates, _ = link.update({"kernel": jnp.ones((2, 8))}, link.init(None))
    >>> float(updates["kernel"][0, 0])
    2.0
    """
    rule = match_rms() if rule is None else rule
    if not callable(rule):
        raise TypeError(f"scale is {rule!r}; it must be a rule such as match_rms(0.2), or a link.")

    def scale(x: jax.Array, bound: BoundView) -> jax.Array:
        factors = [rule(block.rows, block.cols) for block in bound.blocks]
        return x * jnp.asarray(bound.spread(factors), x.dtype)

    return _on_matrices(scale, views)


@static_args("views")
def scale_by_update_norm(rms: float = 0.2, *, views: Views = None) -> optax.GradientTransformation:
    """Give every matrix exactly this RMS: `rms O / RMS(O)`.

    "Update Norm" in arXiv 2502.16982 (Eq. 6). It differs from `match_rms` where an update is not of
    full rank. A zero matrix stays zero.

    Args:
        rms: RMS of every matrix per unit of learning rate.
        views: Which leaves are matrices, and how; see `optax_muon.label`.

    Raises:
        ValueError: `rms` is not positive.
        TypeError: `rms` is not a number; schedules are not.

    >>> link = scale_by_update_norm(0.2)
    >>> updates, _ = link.update({"kernel": jnp.full((3, 4), 7.0)}, link.init(None))
    >>> print(updates["kernel"][0])
    [0.2 0.2 0.2 0.2]
    """
    check_number("rms", rms, above=0, scheduled=False)

    def scale(x: jax.Array, bound: BoundView) -> jax.Array:
        axes = (*bound.part_rows, *bound.part_cols)
        return bound.join([_to_rms(part, axes, rms) for part in bound.parts(x)])

    return _on_matrices(scale, views)


def _to_rms(x: jax.Array, axes: Axes, rms: float) -> jax.Array:
    found = safe_sqrt(jnp.mean(jnp.square(jnp.abs(x)), axes, keepdims=True))
    factor = jnp.asarray(rms, found.dtype) / jnp.where(found == 0, jnp.ones_like(found), found)
    return jnp.where(found == 0, jnp.zeros_like(x), x * factor.astype(x.dtype))


def _on_matrices(
    transform: Callable[[jax.Array, BoundView], jax.Array], views: Views
) -> optax.GradientTransformation:
    """Return a stateless link that changes the leaves that have a view."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        leaves = paths.named_leaves(updates)
        for path, bound in bind_views(updates, views).items():
            leaves[path] = transform(leaves[path], bound)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves.values()), state

    return optax.GradientTransformation(optax.init_empty_state, update)
