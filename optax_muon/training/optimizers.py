"""The optimizers that can be trained and compared: one row of `REGISTRY` each.

All of them see the same batches, the same schedule (`config.py`) and the same clipping of the
gradient's global norm; only the transformation and its hyperparameters differ. A `Trial` is an
optimizer at given hyperparameters. `presets.py` holds tuned ones, `sweep.py` finds them.

Any optax chain can be a row:

    register(OptimizerSpec("lion", "Lion", STYLES[3], lambda schedule, hyper_params, views:
        optax.lion(schedule, weight_decay=hyper_params.weight_decay), lr_ratio=0.3))

The default comparison is the paper's ("Muon is Scalable for LLM Training", arXiv 2502.16982,
section 2.2): AdamW, Muon at the learning rate and weight decay that were tuned for AdamW
(`muon-carried`), and Muon at its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import optax_muon
from optax_muon.errors import UsageError
from optax_muon.models import spec
from optax_muon.training.config import TrainConfig
from optax_muon.training.styles import STYLES, Style

CLIP_NORM = 1.0
NEWTON_SCHULZ_STEPS = 5

Views = optax_muon.Views
"""Which parameters are matrices, as `optax_muon.muon` takes it; None decides by role."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lr", "weight_decay", "adamw_lr"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class HyperParams:
    """The numbers that are tuned. A pytree, because they are arguments of a compiled step."""

    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Decoupled weight decay, per unit of learning rate."""
    adamw_lr: float | None = None
    """Peak learning rate of the parameters that Muon leaves to AdamW; None is `lr`."""

    def __post_init__(self) -> None:
        """Refuse numbers that no optimizer can run at; the arrays of an ensemble were numbers."""
        for name, value in self.to_json().items():
            zero = name == "weight_decay"
            if isinstance(value, float | int) and not (
                0 < value < math.inf or (zero and value == 0)
            ):
                accepted = "at least 0" if zero else "positive"
                raise UsageError(f"{name} is {value:g}; it must be {accepted} and finite")

    def to_json(self) -> dict[str, float]:
        """The numbers that are given, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


Build = Callable[[optax.Schedule, HyperParams, Views], optax.GradientTransformation]
"""Makes the transformation from the learning rate, the hyperparameters and the views."""

StepFlops = Callable[[optax.Params, Views], int]
"""Floating-point operations of one update of parameters (arrays or `ShapeDtypeStruct`s)."""


def elementwise(params: optax.Params, views: Views = None) -> int:
    """Zero: an optimizer without matrix products has too few operations to count."""
    del params, views
    return 0


def newton_schulz_flops(params: optax.Params, views: Views = None) -> int:
    """Operations of Muon's polynomial over all matrices that `optax_muon.label` gives it.

    On an `m x n` matrix, `m <= n`, it is 5 steps of `X X^T`, `A A` and `B X`, that is of
    `4 m^2 n + 2 m^3` operations (arXiv 2502.16982, section 2.1).

    >>> import jax.numpy as jnp
    >>> newton_schulz_flops({"dense": {"kernel": jnp.ones([8, 16])}})  # 5 (4 * 64 * 16 + 2 * 512)
    25600
    """
    blocks = (block for row in optax_muon.label(params, views).rows for block in row.blocks)
    return sum(
        NEWTON_SCHULZ_STEPS * block.batch * (4 * m * m * n + 2 * m**3)
        for block in blocks
        for m, n in [sorted((block.rows, block.cols))]
    )


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """Everything that training and reports know about an optimizer.

    >>> lion = OptimizerSpec("lion", "Lion", STYLES[3], lambda *_: optax.lion(1e-3), lr_ratio=0.5)
    >>> lion.derive(HyperParams(lr=2e-3, weight_decay=0.1))
    HyperParams(lr=0.001, weight_decay=0.2, adamw_lr=None)
    """

    name: str
    """Its name on the command line, in `metrics.jsonl`, and of its folder of checkpoints."""
    title: str
    """Its name in tables and pictures."""
    style: Style
    """How its curves are drawn."""
    build: Build
    """Makes the transformation."""
    step_flops: StepFlops = elementwise
    """Operations of one update; the default counts none, as AdamW's dozen per parameter."""
    like: str = "adamw"
    """The optimizer whose hyperparameters it takes where a preset has none of its own."""
    lr_ratio: float = 1.0
    """Ratio of its learning rate to that of `like`. Weight decay is divided by it, so that the
    decay in a step stays the same."""
    has_fallback: bool = False
    """Whether it leaves parameters to AdamW, whose learning rate is `adamw_lr`."""

    @property
    def accepts(self) -> tuple[str, ...]:
        """Names of the hyperparameters that it has.

        >>> REGISTRY["adamw"].accepts, REGISTRY["muon"].accepts
        (('lr', 'weight_decay'), ('lr', 'weight_decay', 'adamw_lr'))
        """
        names = (field.name for field in dataclasses.fields(HyperParams))
        return tuple(name for name in names if self.has_fallback or name != "adamw_lr")

    def derive(self, other: HyperParams) -> HyperParams:
        """Its hyperparameters, from those of `like`."""
        return dataclasses.replace(
            other,
            lr=other.lr * self.lr_ratio,
            weight_decay=other.weight_decay / self.lr_ratio,
            adamw_lr=None if other.adamw_lr is None else other.adamw_lr * self.lr_ratio,
        )


REGISTRY: dict[str, OptimizerSpec] = {}
"""The optimizers by name."""


def register(spec: OptimizerSpec) -> OptimizerSpec:
    """Add an optimizer to `REGISTRY`.

    Raises:
        ValueError: When the name is taken.
    """
    if spec.name in REGISTRY:
        raise ValueError(f"{spec.name!r} is registered already; give the optimizer another name")
    REGISTRY[spec.name] = spec
    return spec


def _adamw(
    schedule: optax.Schedule, hyper_params: HyperParams, views: Views
) -> optax.GradientTransformation:
    del views
    decay = hyper_params.weight_decay
    return optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=decay)


def _muon(
    schedule: optax.Schedule, hyper_params: HyperParams, views: Views
) -> optax.GradientTransformation:
    return optax_muon.muon(
        schedule,
        weight_decay=hyper_params.weight_decay,
        views=views,
        fallback=adamw_fallback(schedule, hyper_params),
    )


def adamw_fallback(
    schedule: optax.Schedule, hyper_params: HyperParams
) -> optax.GradientTransformation | None:
    """AdamW at its own learning rate, for what Muon leaves to it; None is AdamW at Muon's."""
    if hyper_params.adamw_lr is None:
        return None
    ratio = hyper_params.adamw_lr / hyper_params.lr
    return _adamw(lambda count: ratio * schedule(count), hyper_params, None)


def _muon_adamw_router(
    schedule: optax.Schedule, hyper_params: HyperParams, views: Views
) -> optax.GradientTransformation:
    """Muon with the routers on AdamW; the paper leaves only norms, head and embedding to AdamW."""

    def without_routers(params: optax.Params) -> dict[str, optax_muon.View | None]:
        routers = [path for path in optax_muon.named_leaves(params) if "router" in path]
        return {**(views or {}), **dict.fromkeys(routers)}

    return _muon(schedule, hyper_params, without_routers)


def _normuon(
    schedule: optax.Schedule, hyper_params: HyperParams, views: Views
) -> optax.GradientTransformation:
    return optax_muon.muon(
        schedule,
        weight_decay=hyper_params.weight_decay,
        views=views,
        fallback=adamw_fallback(schedule, hyper_params),
        post=optax_muon.normuon(views=views),
    )


def _lion(
    schedule: optax.Schedule, hyper_params: HyperParams, views: Views
) -> optax.GradientTransformation:
    del views
    return optax.lion(schedule, b1=0.95, b2=0.98, weight_decay=hyper_params.weight_decay)


for _row in (
    OptimizerSpec("adamw", "AdamW", STYLES[0], _adamw),
    OptimizerSpec(
        "muon-carried", "Muon, AdamW lr", STYLES[2], _muon, newton_schulz_flops, has_fallback=True
    ),
    OptimizerSpec("muon", "Muon", STYLES[1], _muon, newton_schulz_flops, has_fallback=True),
    OptimizerSpec(
        "muon-adamw-router",
        "Muon, routers on AdamW",
        STYLES[5],
        _muon_adamw_router,
        newton_schulz_flops,
        like="muon",
        has_fallback=True,
    ),
    OptimizerSpec(
        "normuon",
        "NorMuon",
        STYLES[4],
        _normuon,
        newton_schulz_flops,
        like="muon",
        has_fallback=True,
    ),
    # Betas of language models and a learning rate of 1/3 to 1/10 of AdamW's: Chen et al.,
    # arXiv 2302.06675, section 5.
    OptimizerSpec("lion", "Lion", STYLES[3], _lion, lr_ratio=1 / 3),
):
    register(_row)

DEFAULT = ("adamw", "muon-carried", "muon")
"""The paper's comparison; the first one is the baseline."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One optimizer at the hyperparameters that it runs at.

    >>> Trial(REGISTRY["adamw"], HyperParams(1e-3, 0.1)).to_json()
    {'name': 'adamw', 'title': 'AdamW', 'hyper_params': {'lr': 0.001, 'weight_decay': 0.1}}
    """

    spec: OptimizerSpec
    """The optimizer."""
    hyper_params: HyperParams
    """Its peak learning rate and weight decay."""

    @property
    def name(self) -> str:
        """Its name in `metrics.jsonl`, and of its folder of checkpoints."""
        return self.spec.name

    @property
    def title(self) -> str:
        """Its name in tables and pictures."""
        return self.spec.title

    def numbers(self, lr: float) -> dict[str, Any]:
        """What `transformation(self, config).update` takes in a step of this learning rate."""
        return {"lr": np.float32(lr), "hyper_params": jax.tree.map(np.float32, self.hyper_params)}

    def to_json(self) -> dict[str, object]:
        """As `config.json` holds it."""
        numbers = self.hyper_params.to_json()
        return {"name": self.name, "title": self.title, "hyper_params": numbers}


def optimizer(name: str) -> OptimizerSpec:
    """The row of `REGISTRY` called `name`.

    Raises:
        UsageError: When there is none.

    >>> optimizer("muon").title
    'Muon'
    """
    if name not in REGISTRY:
        raise UsageError(f"unknown optimizer {name!r}; there are {', '.join(REGISTRY)}")
    return REGISTRY[name]


Overrides = Mapping[str, Mapping[str, float]]
"""Hyperparameters by the optimizer's name and their own: `{"muon": {"lr": 0.012}}`."""


def hyper_params(
    name: str, tuned: Mapping[str, HyperParams], overrides: Overrides | None = None
) -> HyperParams:
    """The hyperparameters of an optimizer: tuned ones, or derived from those of its `like`.

    Args:
        name: Name of the optimizer.
        tuned: Hyperparameters by optimizer, as a preset holds them.
        overrides: Numbers that replace them, before others are derived from them.

    Raises:
        UsageError: When an optimizer or a hyperparameter is unknown, or nothing is tuned.

    >>> tuned = {"adamw": HyperParams(1e-3, 0.1)}
    >>> hyper_params("muon-carried", tuned, {"adamw": {"lr": 2e-3}})
    HyperParams(lr=0.002, weight_decay=0.1, adamw_lr=None)
    """
    row = optimizer(name)
    if name in tuned:
        base = tuned[name]
    elif row.like != name:
        base = row.derive(hyper_params(row.like, tuned, overrides))
    else:
        raise UsageError(
            f"there are no tuned hyperparameters of {name}, only of {', '.join(tuned)}"
        )
    given = (overrides or {}).get(name, {})
    for key in given:
        if key not in row.accepts:
            accepted = ", ".join(row.accepts)
            raise UsageError(f"{name} has no hyperparameter {key!r}; it has {accepted}")
    return dataclasses.replace(base, **given)


def comparison(
    names: Sequence[str], tuned: Mapping[str, HyperParams], overrides: Overrides | None = None
) -> tuple[Trial, ...]:
    """The trials of these optimizers; one that would repeat an earlier one is left out.

    Args:
        names: Names of the optimizers; the first one is the baseline.
        tuned: As `hyper_params` takes it.
        overrides: As `hyper_params` takes it.

    Raises:
        UsageError: As `hyper_params`, or when nothing is named.

    >>> same = HyperParams(1e-3, 0.1)
    >>> [t.name for t in comparison(DEFAULT, {"adamw": same, "muon": HyperParams(2e-3, 0.1)})]
    ['adamw', 'muon-carried', 'muon']
    >>> [t.name for t in comparison(DEFAULT, {"adamw": same, "muon": same})]
    ['adamw', 'muon-carried']
    """
    if not names:
        raise UsageError(f"no optimizer is named; there are {', '.join(REGISTRY)}")
    for name in overrides or {}:
        optimizer(name)
    trials: dict[tuple[Build, HyperParams], Trial] = {}
    for name in names:
        trial = Trial(optimizer(name), hyper_params(name, tuned, overrides))
        trials.setdefault((trial.spec.build, trial.hyper_params), trial)
    return tuple(trials.values())


def transformation(trial: Trial, config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """The trial's optax chain, whose numbers are arguments of `update`.

    `update` takes them as `Trial.numbers` gives them. A step is compiled per transformation: trials
    of one optimizer share theirs, whatever their numbers and seeds, so a sweep compiles once.
    """
    apart = trial.hyper_params.adamw_lr is not None
    return _transformation(trial.spec.build, dataclasses.replace(config, seed=0), apart)


@functools.cache
def _transformation(
    build: Build, config: TrainConfig, apart: bool
) -> optax.GradientTransformationExtraArgs:
    """A chain by what its program depends on.

    Args:
        build: Makes the optimizer.
        config: What all trials share, with one seed for all.
        apart: Whether `adamw_lr` is given.
    """

    def init(params: optax.Params) -> optax.OptState:
        any_numbers = HyperParams(1.0, 1.0, 1.0 if apart else None)  # no state depends on them
        return _chain(build, 1.0, any_numbers, config).init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        lr: jax.typing.ArrayLike,
        hyper_params: HyperParams,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        tx = optax.with_extra_args_support(_chain(build, lr, hyper_params, config))
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _chain(
    build: Build, lr: jax.typing.ArrayLike, hyper_params: HyperParams, config: TrainConfig
) -> optax.GradientTransformation:
    """The optimizer behind clipping by the global norm, and before QK-Clip where a run has it."""
    links = [
        optax.clip_by_global_norm(CLIP_NORM),
        build(lambda count: lr, hyper_params, views(config)),
    ]
    if config.qk_clip is not None:
        attentions = spec.model(config.model).attentions
        links.append(optax_muon.qk_clip(attentions, config.qk_clip))
    return optax.chain(*links)


def views(config: TrainConfig) -> Views:
    """Which matrices Muon gets; None decides by role."""
    return spec.model(config.model).per_head_views if config.per_head else None
