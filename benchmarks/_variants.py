"""Optimizers that only experiments compare, beside those of the package's registry.

The rows differ from `muon` or `adamw` in one thing, which their title says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import _jax
import _soap
import jax
import jax.numpy as jnp
import optax

import optax_muon
from optax_muon.matrices import assign, paths
from optax_muon.training import optimizers, styles
from optax_muon.training.optimizers import Build, HyperParams, OptimizerSpec, Views
from optax_muon.transforms import scale

TWO_SCALES = (0.9, 0.98)
"""Decays of the two averages of `muon-two-momenta`."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """Muon with other arguments."""

    arguments: Callable[[Views, HyperParams], Mapping[str, Any]]
    """Arguments of `optax_muon.muon`, given the views and the tuned numbers."""

    def __call__(
        self, schedule: optax.Schedule, hyper_params: HyperParams, views: Views
    ) -> optax.GradientTransformation:
        """The transformation."""
        common = {
            "weight_decay": hyper_params.weight_decay,
            "views": views,
            "fallback": optimizers.adamw_fallback(schedule, hyper_params),
        }
        return optax_muon.muon(schedule, **{**common, **self.arguments(views, hyper_params)})


def muon(**arguments: Any) -> Build:
    """Muon with these arguments instead of its own."""
    return Variant(lambda views, hyper_params: arguments)


def steps(count: int) -> Build:
    """Muon with so many Newton-Schulz steps."""
    return muon(orthogonalizer=optax_muon.NewtonSchulz(steps=count))


def fixed_scale(fan_in: int, fan_out: int) -> float:
    """The paper's Eq. 5, `0.2 sqrt(H)`; the short side of every matrix of `_models.py` is H."""
    return scale.fixed_scale(min(fan_in, fan_out))(fan_in, fan_out)


class Momenta(NamedTuple):
    """The averages of two time scales."""

    slow: optax.Updates
    fast: optax.Updates


def two_momenta() -> optax.GradientTransformation:
    """The sum of two averages of the gradient, each with Nesterov's look-ahead."""

    def init(params: optax.Params) -> Momenta:
        return Momenta(*(jax.tree.map(jnp.zeros_like, params) for _ in TWO_SCALES))

    def update(
        gradients: optax.Updates, state: Momenta, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Momenta]:
        del params

        def average(beta: float, before: optax.Updates) -> optax.Updates:
            return jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, before, gradients)

        after = Momenta(*map(average, TWO_SCALES, state))
        ahead = map(average, TWO_SCALES, after)
        return jax.tree.map(jnp.add, *ahead), after

    return optax.GradientTransformation(init, update)


def _two_momenta(
    schedule: optax.Schedule, hyper_params: HyperParams, views: Views
) -> optax.GradientTransformation:
    orthogonalized = muon(beta=0.0, nesterov=False)(schedule, hyper_params, views)
    return optax.chain(optax.masked(two_momenta(), _matrices), orthogonalized)


def _matrices(params: optax.Params) -> Any:
    """True where Muon has a matrix."""
    views = assign.assign(params)
    return paths.map_named(lambda path, _: views[path] is not None, params)


def _contrib(
    schedule: optax.Schedule, hyper_params: HyperParams, views: Views
) -> optax.GradientTransformation:
    """optax.contrib.muon with its own scale and betas, told which axes are stacks of layers."""
    del views

    rate = hyper_params.adamw_lr or hyper_params.lr
    ratio = rate / hyper_params.lr
    return optax.contrib.muon(
        schedule,
        weight_decay=hyper_params.weight_decay,
        adam_weight_decay=hyper_params.weight_decay,
        adam_learning_rate=lambda count: ratio * schedule(count),
        muon_weight_dimension_numbers=_jax.dimension_numbers,
    )


def _soap_build(
    schedule: optax.Schedule, hyper_params: HyperParams, views: Views
) -> optax.GradientTransformation:
    del views
    decay = hyper_params.weight_decay
    soap = optax.chain(
        _soap.scale_by_soap(),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(schedule),
    )
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=decay)
    return optax.partition({True: soap, False: adamw}, _matrices)


ROWS: Mapping[str, tuple[str, Build]] = {
    # Update scales: the paper's Table 1 and section 2.2.
    "muon-keller-scale": ("Muon, Keller's scale", muon(scale=optax_muon.keller_scale())),
    "muon-spectral-scale": ("Muon, spectral scale", muon(scale=optax_muon.spectral_scale())),
    "muon-fixed-scale": ("Muon, 0.2 sqrt(H)", muon(scale=fixed_scale)),
    "muon-update-norm": (
        "Muon, update norm",
        Variant(lambda views, _: {"scale": optax_muon.scale_by_update_norm(0.2, views=views)}),
    ),
    # Update RMS: the paper's Table 8.
    **{
        f"muon-rms-{rms}": (f"Muon, RMS {rms}", muon(scale=optax_muon.match_rms(rms)))
        for rms in (0.05, 0.1, 0.4, 0.8)
    },
    # Orthogonalization.
    "muon-1-step": ("Muon, 1 step", steps(1)),
    **{f"muon-{count}-steps": (f"Muon, {count} steps", steps(count)) for count in (2, 3, 7, 10)},
    **{
        f"muon-{name.replace('_', '-')}": (
            f"Muon, {name.upper()}",
            muon(orthogonalizer=optax_muon.NewtonSchulz(optax_muon.COEFFICIENTS[name])),
        )
        for name in ("you", "polar_express", "deepseek_v4")
    },
    "muon-exact": ("Muon, exact polar factor", muon(orthogonalizer=optax_muon.polar_svd)),
    "muon-per-head": ("Muon, a matrix per head", muon()),
    # Momentum.
    "muon-plain-momentum": ("Muon, no Nesterov", muon(nesterov=False)),
    "muon-beta-0.9": ("Muon, beta 0.9", muon(beta=0.9)),
    "muon-two-momenta": ("Muon, momenta of 0.9 and 0.98", _two_momenta),
    # Decay.
    "muon-no-decay": ("Muon, no decay", muon(weight_decay=0.0)),
    "muon-cautious-decay": (
        "Muon, cautious decay",
        Variant(
            lambda _, numbers: {"weight_decay": optax_muon.cautious_decay(numbers.weight_decay)}
        ),
    ),
    # Other packages.
    "contrib-muon": ("optax.contrib.muon, defaults", _contrib),
    "soap": ("SOAP, AdamW for the rest", _soap_build),
}
"""Title and transformation by name."""

PER_HEAD = frozenset({"muon-per-head"})
"""Those that are given the views of a matrix per head (`TrainConfig.per_head`)."""

SPECS: Mapping[str, OptimizerSpec] = {
    **optimizers.REGISTRY,
    **{
        name: OptimizerSpec(name, title, styles.nth(place), build, like="muon")
        for place, (name, (title, build)) in enumerate(ROWS.items(), len(optimizers.REGISTRY))
    },
}
"""All optimizers by name: the package's, and those of `ROWS`."""
