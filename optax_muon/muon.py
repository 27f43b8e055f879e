"""Muon (Moonshot AI, "Muon is Scalable for LLM Training", arXiv 2502.16982, Eq. 1-4).

For every matrix `W` with fan-in `m`, fan-out `n` and gradient `g`:

    M <- beta M + g                              momentum, the sum form
    U  = g + beta M                              Nesterov
    O  = NewtonSchulz(U)                         approximately the polar factor of U
    W <- W - lr (0.2 sqrt(max(m, n)) O + lambda W)

and AdamW for everything else: embeddings, head, norms, biases. The factor gives the update
the RMS of AdamW, so AdamW's learning rate and weight decay carry over.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from optax_muon.matrices import paths
from optax_muon.matrices.dimension_numbers import given_shardings
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

    Matrices go through, in this order: momentum, `orthogonalizer`, `post`, `scale`, weight decay,
    learning rate.

    Args:
        learning_rate: The learning rate that you would give AdamW: a number or a schedule of the
            step.
        beta: Momentum, in [0, 1); a number or a schedule.
        nesterov: Whether to use Nesterov momentum, as the paper does.
        weight_decay: Decoupled decay per unit of learning rate: a number, a schedule, or a link
            such as `cautious_decay(0.1)`. The default fallback uses it too.
        weight_decay_mask: True where decay applies: a tree of booleans or a prefix of one, or a
            callable of the parameters. None decays everything, as the paper does.
        orthogonalizer: A function `[..., m, n] -> [..., m, n]`; None is `newton_schulz` with five
            steps of `KELLER`. (The default is None because `optax.inject_hyperparams` would call a
            callable default as a schedule.)
        post: A link between orthogonalization and scale, such as `normuon()`, or an `optax.chain`
            of several. A link that takes `views` does not get these: give it the same ones.
        scale: `(fan_in, fan_out) -> factor`, or a link such as `scale_by_update_norm(0.2)`; None is
            `match_rms(0.2)`.
        views: Which parameters are matrices, and how. None decides by role; otherwise a tree of
            views or a prefix of one, a `{path: view}` dict, or a callable of the parameters, with
            None for the fallback. `print(optax_muon.label(params, views))` shows the result.
        fallback: The optimizer of the other parameters, with its own learning rate; None is AdamW
            with this learning rate and decay, betas 0.9 and 0.95, eps 1e-8.
        mu_dtype: The dtype of the stored momenta; None is float32, whatever the parameters are.
        shardings: How the parameters are sharded, needed on Auto mesh axes only: a tree or prefix
            of `NamedSharding` or `PartitionSpec`, a `{path: ...}` dict, or a callable of the
            leaves. None takes those that dimension numbers in `views` carry.
        plan: Where each matrix is processed, made by `optax_muon.plan`; None makes a plan.

    Returns:
        A transformation whose updates, like all of optax's, are to be added to the parameters.

    Raises:
        ValueError: (in `init`) No rule decides a parameter, or a view does not fit. The message
            names the path and the line to add.

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

    shardings = given_shardings(shardings, views)

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
    """Momentum, orthogonalization, `post`, scale, in this order; no decay, no learning rate.

    For leaves without a view the updates are their momentum. Use `muon` or `optax.partition` to
    give them an optimizer of their own.

    Args:
        beta: As in `muon`.
        nesterov: As in `muon`.
        orthogonalizer: As in `muon`.
        post: As in `muon`.
        scale: As in `muon`.
        views: As in `muon`.
        mu_dtype: As in `muon`.
        shardings: As in `muon`.
        plan: As in `muon`.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(scale_by_muon(beta=0.9), optax.scale_by_learning_rate(1e-3))
    >>> params = {"kernel": jnp.ones((4, 8))}
    >>> updates, _ = tx.update(params, tx.init(params))
    """
    shardings = given_shardings(shardings, views)

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
