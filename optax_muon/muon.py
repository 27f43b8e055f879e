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

import functools
from typing import Any

import jax
import optax

from optax_muon.matrices import paths
from optax_muon.matrices.dimension_numbers import given_shardings
from optax_muon.matrices.views import View, Views
from optax_muon.polar import newton_schulz
from optax_muon.sharding.execute import Orthogonalizer
from optax_muon.sharding.mesh import Shardings, check_names
from optax_muon.sharding.plan import Plan
from optax_muon.transforms.arguments import (
    check_link,
    check_number,
    check_orthogonalizer,
    static_args,
)
from optax_muon.transforms.decay import Mask, decoupled_decay, settle_mask
from optax_muon.transforms.momentum import scale_by_momentum
from optax_muon.transforms.orthogonalize import orthogonalize
from optax_muon.transforms.scale import ScaleRule, scale_by_shape
from optax_muon.transforms.wrappers import (
    in_float32,
    under_standard_promotion,
    with_mu_dtype,
    with_settled_views,
    with_state_sharding,
)

MUON, FALLBACK = "muon", "fallback"
"""The two groups of parameters, as keys of the optimizer state."""


@static_args("orthogonalizer", "scale", "views", "weight_decay_mask", "shardings", "mu_dtype")
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
        beta: Momentum, in [0, 1]; a number or a schedule.
        nesterov: Whether to use Nesterov momentum, as the paper does.
        weight_decay: Decoupled decay per unit of learning rate: a number, a schedule, or a link
            such as `cautious_decay(0.1)`. The default fallback uses it too.
        weight_decay_mask: True where decay applies: a tree of booleans or a prefix of one, or a
            callable of the parameters. Every parameter must have an entry, and every entry a
            parameter. None decays everything, as the paper does.
        orthogonalizer: A function `[..., m, n] -> [..., m, n]`; None is `newton_schulz` with five
            steps of `KELLER`.
        post: A link between orthogonalization and scale, such as `normuon()`, or an `optax.chain`
            of several. It reads matrices by these `views`, unless it is given its own.
        scale: `(fan_in, fan_out) -> factor`, or a link such as `scale_by_update_norm(0.2)`; None is
            `match_rms(0.2)`.
        views: Which parameters are matrices, and how. None decides from the tree; otherwise a
            `{path or glob: entry}` dict, a tree of entries or a prefix of one, a list of `Rule`s,
            `"matrices"`, or a callable of the parameters; see `Views`. An entry is a `View`, None
            for the fallback, `Stacked`, dimension numbers, or logical axis names.
            `print(optax_muon.label(params, views))` shows the result.
        fallback: The optimizer of the other parameters, with its own learning rate; None is AdamW
            with this learning rate and decay, betas 0.9 and 0.95, eps 1e-8.
        mu_dtype: The dtype of the stored momenta; None is float32, whatever the parameters are.
            Complex momenta stay complex, in the complex dtype of that precision.
        shardings: How the parameters are sharded, needed on Auto mesh axes only: a tree or prefix
            of `NamedSharding` or `PartitionSpec`, a `{path: ...}` dict, or a callable of the
            leaves. None takes those that dimension numbers in `views` carry; without any, `update`
            warns there and the compiler chooses the communication.
        plan: Where each matrix is processed, made by `optax_muon.plan`; None makes a plan.

    Returns:
        A transformation whose updates, like all of optax's, are to be added to the parameters. They
        have the dtype that gradient and parameter promote to. `update` needs `params` unless
        `weight_decay` is the number 0. Leaves that are not floating point have no state and do not
        change: functions and settings of an Equinox module, random keys, counters.

    Raises:
        ValueError: A number is out of its range, or `weight_decay_mask` comes with a link. (In
            `init`:) No rule decides a parameter, a view does not fit, or an entry of a tree belongs
            to no parameter. The message names the path, and the line to add.
        TypeError: An argument is of another type.

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((16, 4)), "dense": {"kernel": jnp.ones((4, 8))}}
    >>> tx = muon(3e-4)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> jax.tree.map(jnp.shape, optax.apply_updates(params, updates))
    {'dense': {'kernel': (4, 8)}, 'embed': (16, 4)}
    """
    shardings = given_shardings(shardings, views)
    orthogonalized = functools.partial(
        scale_by_muon,
        beta=beta,
        nesterov=nesterov,
        orthogonalizer=orthogonalizer,
        post=post,
        scale=scale,
        mu_dtype=mu_dtype,
        shardings=shardings,
        plan=plan,
    )
    orthogonalized()  # wrong arguments fail here, not in `init`
    check_number("learning_rate", learning_rate)
    if fallback is not None:
        check_link("fallback", fallback, "an optimizer")
    if not isinstance(weight_decay, optax.GradientTransformation):
        check_number("weight_decay", weight_decay, at_least=0)
    elif weight_decay_mask is not None:
        raise ValueError(
            "weight_decay is a link, which weight_decay_mask does not reach; give the link its own,"
            " as in cautious_decay(0.1, mask=...)."
        )
    adam = with_mu_dtype(optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8), mu_dtype)

    def build(tree: Any, settled: dict[str, View | None]) -> optax.GradientTransformation:
        check_names(tree, shardings)
        decay = weight_decay
        if not isinstance(decay, optax.GradientTransformation):
            mask = None if weight_decay_mask is None else settle_mask(weight_decay_mask, tree)
            decay = decoupled_decay(decay, mask)
        matrices = optax.chain(
            orthogonalized(views={path: v for path, v in settled.items() if v is not None}),
            decay,
            optax.scale_by_learning_rate(learning_rate),
        )
        adamw = optax.chain(
            with_state_sharding(lambda state: state.mu, under_standard_promotion(adam)),
            decay,
            optax.scale_by_learning_rate(learning_rate),
        )

        def group(path: str, _: Any) -> str:
            return FALLBACK if settled[path] is None else MUON

        return optax.partition(
            {MUON: in_float32(matrices), FALLBACK: fallback or in_float32(adamw)},
            lambda params: paths.map_named(group, params),
        )

    return with_settled_views(build, views)


@static_args("orthogonalizer", "scale", "views", "shardings", "mu_dtype")
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

    Returns:
        A transformation whose updates are not negated: `optax.scale_by_learning_rate` does that.
        They keep shapes and shardings, and have the dtype that gradient and parameter promote to.

    Raises:
        ValueError: As in `muon`.
        TypeError: As in `muon`.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(scale_by_muon(beta=0.9), optax.scale_by_learning_rate(1e-3))
    >>> params = {"kernel": jnp.ones((4, 8))}
    >>> updates, _ = tx.update(params, tx.init(params))
    """
    shardings = given_shardings(shardings, views)
    if post is not None:
        check_link("post", post, "a link such as normuon()")
    orthogonalizer = newton_schulz if orthogonalizer is None else orthogonalizer
    check_orthogonalizer(orthogonalizer)
    momentum = scale_by_momentum(beta, nesterov, mu_dtype)
    rescale = scale
    if not isinstance(rescale, optax.GradientTransformation):
        rescale = scale_by_shape(rescale)

    def build(_: Any, settled: dict[str, View | None]) -> optax.GradientTransformation:
        link = orthogonalize(orthogonalizer, views=settled, shardings=shardings, plan=plan)
        links = [momentum, link, *([] if post is None else [post]), rescale]
        return in_float32(with_state_sharding(lambda state: state[0].mu, optax.chain(*links)))

    return with_settled_views(build, views)
