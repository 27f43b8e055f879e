"""Muon (Moonshot AI, "Muon is Scalable for LLM Training", arXiv 2502.16982, Eq. 1-4).

For every matrix `W` of fan in `m` and fan out `n`, with gradient `g`:

    M <- beta M + g                              momentum, the sum form
    U  = g + beta M                              Nesterov
    O  = NewtonSchulz(U)                         nearly the polar factor of U
    W <- W - lr (0.2 sqrt(max(m, n)) O + lambda W)

and AdamW for everything else: embeddings, head, norms, biases, routers. The factor gives the update
AdamW's RMS, so that AdamW's learning rate and weight decay carry over.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from optax_muon.matrices import paths
from optax_muon.matrices.views import View, Views
from optax_muon.polar import newton_schulz
from optax_muon.sharding.execute import Orthogonalizer
from optax_muon.sharding.mesh import Shardings
from optax_muon.sharding.plan import Plan
from optax_muon.transforms.decay import Mask, decoupled_decay
from optax_muon.transforms.momentum import scale_by_momentum
from optax_muon.transforms.orthogonalize import orthogonalize
from optax_muon.transforms.scale import ScaleRule, scale_by_shape
from optax_muon.transforms.wrappers import (
    in_float32,
    under_standard_promotion,
    with_settled_views,
    with_state_sharding,
)

MUON, FALLBACK = "muon", "fallback"
"""The two groups of parameters, as keys of the optimizer state."""


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.1,
    weight_decay_mask: Mask = None,
    orthogonalizer: Orthogonalizer | None = None,
    post: optax.GradientTransformation | None = None,
    scale: ScaleRule | optax.GradientTransformation | None = None,
    views: Views = None,
    fallback: optax.GradientTransformation | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    shardings: Shardings = None,
    plan: Plan | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices of a model, AdamW for its other parameters.

    Args:
      learning_rate: the learning rate that you would give AdamW: a number or a schedule of the
        step.
      beta: momentum, in [0, 1); a number or a schedule.
      nesterov: whether momentum looks one step ahead; the paper's does.
      weight_decay: decoupled decay per unit of learning rate: a number, a schedule, or a link such
        as `cautious_decay(0.1)`. For the default fallback too.
      weight_decay_mask: True where decay applies: a tree of booleans or a prefix of one, or a
        callable of the parameters. None decays everything, as the paper does.
      orthogonalizer: a function `[..., m, n] -> [..., m, n]`; None is `newton_schulz` with five
        steps of KELLER. (None, because `optax.inject_hyperparams` calls a callable default as a
        schedule.)
      post: a link that the orthogonal matrices go through before they are scaled, such as
        `normuon()`; several are an `optax.chain`. None is none.
      scale: `(fan_in, fan_out) -> factor`, or a link such as `scale_by_update_norm(0.2)`; None is
        `match_rms(0.2)`.
      views: which parameters are matrices, and how. None decides by role; otherwise a tree of views
        or a prefix of one, a `{path: view}` dict, or a callable of the parameters, with None for
        the fallback. `print(optax_muon.label(params, views))` shows the outcome.
      fallback: the optimizer of the other parameters, with its own learning rate; None is AdamW
        with this learning rate and decay, betas 0.9 and 0.95, eps 1e-8.
      mu_dtype: dtype that momenta are stored in; None is float32, whatever the parameters are.
      shardings: how the parameters are sharded, needed on Auto mesh axes only: a tree or prefix of
        `NamedSharding` or `PartitionSpec`, a `{path: ...}` dict, or a callable of the leaves.
      plan: where each matrix is worked on, made with `optax_muon.plan`; None plans by itself.

    Returns:
      A transformation whose updates, like all of optax's, are to be added to the parameters.

    Raises:
      ValueError: (in `init`) a parameter that no rule decides, or a view that does not fit; the
        message names its path and what would settle it.

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((16, 4)), "dense": {"kernel": jnp.ones((4, 8))}}
    >>> tx = muon(3e-4)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> jax.tree.map(jnp.shape, optax.apply_updates(params, updates))
    {'dense': {'kernel': (4, 8)}, 'embed': (16, 4)}
    """
    decay = (
        weight_decay
        if isinstance(weight_decay, optax.GradientTransformation)
        else decoupled_decay(weight_decay, weight_decay_mask)
    )
    adam = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8, mu_dtype=mu_dtype)
    adamw = optax.chain(
        with_state_sharding(lambda state: state.mu, under_standard_promotion(adam)),
        decay,
        optax.scale_by_learning_rate(learning_rate),
    )
    others = fallback or in_float32(adamw)

    def build(settled: dict[str, View | None]) -> optax.GradientTransformation:
        matrices = optax.chain(
            scale_by_muon(
                beta=beta,
                nesterov=nesterov,
                orthogonalizer=orthogonalizer,
                post=post,
                scale=scale,
                views={path: view for path, view in settled.items() if view is not None},
                mu_dtype=mu_dtype,
                shardings=shardings,
                plan=plan,
            ),
            decay,
            optax.scale_by_learning_rate(learning_rate),
        )

        def group(path: Any, _: Any) -> str:
            return FALLBACK if settled[paths.path_name(path)] is None else MUON

        return optax.partition(
            {MUON: in_float32(matrices), FALLBACK: others},
            lambda params: jax.tree.map_with_path(group, params),
        )

    return with_settled_views(build, views)


def scale_by_muon(
    *,
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    orthogonalizer: Orthogonalizer | None = None,
    post: optax.GradientTransformation | None = None,
    scale: ScaleRule | optax.GradientTransformation | None = None,
    views: Views = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    shardings: Shardings = None,
    plan: Plan | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, orthogonalization, `post`, the factor of the shape; no decay, no learning rate.

    Leaves without a view come out as plain momentum: use `muon`, or `optax.partition`, to give them
    an optimizer of their own.

    Args:
      beta: as in `muon`.
      nesterov: as in `muon`.
      orthogonalizer: as in `muon`.
      post: as in `muon`.
      scale: as in `muon`.
      views: as in `muon`.
      mu_dtype: as in `muon`.
      shardings: as in `muon`.
      plan: as in `muon`.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(scale_by_muon(beta=0.9), optax.scale_by_learning_rate(1e-3))
    >>> params = {"kernel": jnp.ones((4, 8))}
    >>> updates, _ = tx.update(params, tx.init(params))
    """

    def build(settled: dict[str, View | None]) -> optax.GradientTransformation:
        links = [
            scale_by_momentum(beta, nesterov, mu_dtype),
            orthogonalize(
                orthogonalizer or newton_schulz, views=settled, shardings=shardings, plan=plan
            ),
            *([] if post is None else [post]),
            scale
            if isinstance(scale, optax.GradientTransformation)
            else scale_by_shape(scale, views=settled),
        ]
        return in_float32(with_state_sharding(lambda state: state[0].mu, optax.chain(*links)))

    return with_settled_views(build, views)
