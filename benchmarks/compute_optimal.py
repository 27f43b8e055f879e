"""How large a model, how many tokens, which rate and batch? The paper's Table 9 in small.

Llamas learn the Python sources listed in benchmarks/corpus with AdamW, byte by byte. A budget is
C = 6ND operations, N the parameters that multiply a token and D the bytes. At each of three budgets
models of several sizes are trained with as many bytes as it allows, further sizes until there are
two on each side of the best; every run goes to the end of its own schedule, with three seeds. The
optimum is the vertex of the parabola through the best size and those two on each side, over log N
(approach 2 of Hoffmann et al., arXiv 2203.15556). N(C) and D(C) are power laws through the optima;
a budget whose best size is the smallest or the largest of all has none. The paper (arXiv
2502.16982, appendix B) finds its optima on grids.

lr(C) and B(C) are from the searches of scaling_law.py, at 20 bytes for each parameter: the vertex
of the parabola through the best rate, or batch, and its two neighbours. Batches were searched at
the two smallest sizes there, and are at a third one here. The rates of the budgets here, which lie
between those of the searches, are those of lr(C) through the four smallest sizes; batch and decay
are those of the scaling law.

Intervals hold 90 % of 1000 draws of the losses. For N and D the errors of the means have Student's
t distribution, and the variance between seeds is pooled over the sizes of a budget. For rate and
batch, whose searches have one seed, errors are normal and as large as those between the seeds of
the best runs.

    python benchmarks/compute_optimal.py
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import _experiment
import _models
import _runs
import _table
import matplotlib.axes
import matplotlib.figure
import numpy as np
import scaling_law
import tyro
from _experiment import Experiment, Options, Results
from _runs import Finished, Run
from matplotlib.ticker import NullLocator

from optax_muon.models import spec
from optax_muon.models.spec import Config
from optax_muon.training import power_law, search, styles
from optax_muon.training.power_law import Growth, Interval

MODELS: Mapping[str, Config] = {
    f"{width} x {layers}": _models.llama(width, layers)
    for width, layers in (
        *((16, 1), (16, 2), (24, 2), (32, 2), (40, 2), (48, 2), (64, 2), (64, 3), (80, 3)),
    )
}
"""The sizes, the smallest first."""
RATES = {1.4e10: 0.033, 5.2e10: 0.0205, 2e11: 0.0126}
"""Budgets, 6ND, and what lr(C) has for them."""
TOY_RATES = {1e8: 0.05, 2e8: 0.05, 4e8: 0.05}
"""The same for a check in toy sizes."""
AROUND = 2
"""Sizes on each side of the best one."""
BASE = Run("", "adamw", 20.0, batch=4, lr=6e-3, weight_decay=0.1)
"""AdamW at the numbers of the scaling law for 48 x 2."""
BATCHES = [dataclasses.replace(BASE, model="48 x 2", batch=batch) for batch in (2, 8)]
"""The batch at a third size; the scaling law has the run between them."""
PAPER = {
    "N": Growth(0.0483359, 0.5112684),
    "D": Growth(3.4480927, 0.4887316),
    "lr": Growth(0.0127339, -0.0574752),
    "B": Growth(0.0065202, 0.4137915),
}
"""Table 9 of arXiv 2502.16982, C in operations, B in sequences of 8192 tokens."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which runs the experiment needs, and which of them belong to a budget."""

    models: Mapping[str, Config]
    """Models by name, the smallest first."""
    rates: Mapping[float, float]
    """Learning rates by budget."""
    batches: Sequence[Run]
    """Runs that search the batch."""

    def needed(self, finished: Sequence[Finished]) -> Iterator[Run]:
        """The sizes of each budget, and the batches."""
        for budget in self.rates:
            for model in self._sizes(finished, budget):
                yield from self._run(budget, model).repeats
        yield from self.batches

    def curves(self, finished: Sequence[Finished]) -> list[IsoFlop]:
        """The budgets whose runs are all finished."""
        return [
            curve
            for budget in self.rates
            if all((curve := self._curve(finished, budget, self._sizes(finished, budget))).sizes)
        ]

    def _sizes(self, finished: Sequence[Finished], budget: float) -> list[str]:
        """The models of a budget: around 20 tokens for each parameter, and around the best."""
        names = [*self.models]
        usual = BASE.tokens_per_parameter
        middle = min(names, key=lambda name: abs(math.log(self._ratio(budget, name) / usual)))
        sizes: list[str] = []
        while True:
            place = names.index(middle)
            around = names[max(0, place - AROUND) : place + AROUND + 1]
            if set(around) <= set(sizes):
                return sizes
            sizes = [name for name in names if name in {*sizes, *around}]
            curve = self._curve(finished, budget, sizes)
            if not all(curve.sizes):
                return sizes
            middle = sizes[curve.best]

    def _curve(self, finished: Sequence[Finished], budget: float, sizes: list[str]) -> IsoFlop:
        runs = (self._run(budget, model).repeats for model in sizes)
        return IsoFlop(budget, tuple(_runs.found(finished, repeats) for repeats in runs))

    def _run(self, budget: float, model: str) -> Run:
        """A run that takes the budget."""
        ratio = float(f"{self._ratio(budget, model):.4g}")
        return dataclasses.replace(
            BASE, model=model, tokens_per_parameter=ratio, lr=self.rates[budget]
        )

    def _ratio(self, budget: float, model: str) -> float:
        return budget / (6 * _active(self.models[model]) ** 2)


@functools.cache
def _active(config: Config) -> int:
    """The parameters that multiply a token."""
    return spec.model(config).active


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Runs of several sizes with one budget."""

    budget: float
    """6ND."""
    sizes: tuple[list[Finished], ...]
    """The runs of each size, the smallest first; none before all seeds are finished."""

    @property
    def parameters(self) -> list[int]:
        """The sizes."""
        return [rows[0].parameters for rows in self.sizes]

    @property
    def losses(self) -> np.ndarray:
        """Their losses, `[sizes, seeds]`."""
        return np.asarray([_runs.losses(rows) for rows in self.sizes])

    @property
    def best(self) -> int:
        """Place of the size with the lowest mean loss."""
        return int(self.losses.mean(axis=1).argmin())

    @property
    def is_inside(self) -> bool:
        """Whether a smaller and a larger size are worse, so that there is an optimum."""
        return 0 < self.best < len(self.sizes) - 1

    @property
    def fitted(self) -> slice:
        """Places of the sizes that the parabola goes through."""
        return slice(max(0, self.best - AROUND), self.best + AROUND + 1)

    @property
    def optimum(self) -> float:
        """The best number of parameters."""
        return float(self._vertex(self.losses.mean(axis=1)))

    def resamples(self, random: np.random.Generator) -> np.ndarray:
        """The optimum of losses with errors, `[RESAMPLES]`; see `power_law.resampled_means`."""
        return self._vertex(power_law.resampled_means(self.losses.tolist(), random).T)

    def _vertex(self, means: np.ndarray) -> np.ndarray:
        return power_law.vertex(self.parameters[self.fitted], means[self.fitted])


@dataclasses.dataclass(frozen=True)
class Law:
    """A power law through optima, and how far its exponent can be trusted."""

    flops: tuple[float, ...]
    """The budgets."""
    optima: tuple[float, ...]
    """What is best at each."""
    resampled: np.ndarray
    """The same again and again, `[budgets, RESAMPLES]`."""

    @property
    def growth(self) -> Growth:
        """The fit."""
        return power_law.growth(self.flops, self.optima)

    @property
    def exponent(self) -> Interval:
        """The exponent of the resamples."""
        return power_law.interval(power_law.exponents(self.flops, self.resampled))


def sizes_law(curves: Sequence[IsoFlop]) -> Law:
    """N(C)."""
    random = np.random.default_rng(0)
    return Law(
        tuple(curve.budget for curve in curves),
        tuple(curve.optimum for curve in curves),
        np.reshape([curve.resamples(random) for curve in curves], (-1, power_law.RESAMPLES)),
    )


def tokens_law(sizes: Law) -> Law:
    """D(C), which is C / 6N."""
    each = np.asarray(sizes.flops) / 6
    optima = tuple((each / np.asarray(sizes.optima)).tolist())
    return Law(sizes.flops, optima, each[:, None] / sizes.resampled)


@functools.cache
def searched() -> tuple[list[list[Finished]], list[Finished]]:
    """AdamW's best runs of each size in the scaling law, and all runs of it."""
    options = scaling_law.Options()
    finished = [*_experiment.load(options, scaling_law.experiment(options)).finished]
    return scaling_law.Protocol.of(options).points(finished)["adamw"], finished


def searched_law(name: str, more: Sequence[Finished]) -> Law:
    """lr(C) or B(C), from the best runs of the scaling law and their neighbours."""
    best, finished = searched()
    rows = {row.run: row for row in (*finished, *more)}
    error = math.sqrt(statistics.fmean(statistics.variance(_runs.losses(each)) for each in best))
    random = np.random.default_rng(0)
    flops, optima, resampled = [], [], []
    for run in (dataclasses.replace(each[0].run, seed=0) for each in best):
        low, high = search.neighbours(run, run, name)
        around = [low, run, high]
        if not all(each in rows for each in around):
            continue
        values = [float(getattr(each, name)) for each in around]
        losses = np.asarray([rows[each].val_loss for each in around])
        errors = random.normal(scale=error, size=(len(around), power_law.RESAMPLES))
        flops.append(rows[around[0]].model_flops)
        optima.append(float(power_law.vertex(values, losses)))
        resampled.append(power_law.vertex(values, losses[:, None] + errors))
    return Law(tuple(flops), tuple(optima), np.asarray(resampled))


Laws = dict[str, Law]
"""The laws by their letter."""


def laws(curves: Sequence[IsoFlop], results: Results) -> Laws:
    """All laws that have enough optima."""
    sizes = sizes_law([curve for curve in curves if curve.is_inside])
    every = {
        "N": sizes,
        "D": tokens_law(sizes),
        "lr": searched_law("lr", results.finished),
        "B": searched_law("batch", results.finished),
    }
    return {name: law for name, law in every.items() if len(law.flops) >= power_law.FITTED}


def experiment(options: Options) -> Experiment:
    """The experiment."""
    protocol = Protocol(MODELS, RATES, BATCHES)
    if options.quick:
        toys = {**_models.TOY, "32 x 2": _models.llama(32, 2, context=32)}
        protocol = Protocol(toys, TOY_RATES, ())

    def curves(results: Results) -> list[IsoFlop]:
        return protocol.curves(results.finished)

    return Experiment(
        "compute_optimal",
        "The best size, tokens, rate and batch over the budget",
        __doc__,
        protocol.models,
        protocol.needed,
        lambda results: report(curves(results), laws(curves(results), results)),
        lambda results: picture(curves(results), laws(curves(results), results)),
        lambda results: summary(laws(curves(results), results)),
    )


TITLES = {
    "N": "N(C), parameters",
    "D": "D(C), tokens",
    "lr": "lr(C)",
    "B": "B(C), sequences",
}


def report(curves: Sequence[IsoFlop], found: Laws) -> Iterator[str]:
    """The laws beside the paper's, the optima, and the runs of each budget."""
    heads = ("law", "here", "exponent [5%, 95%]", "optima", "from C", "to C", "paper, Table 9")
    yield from _table.markdown(heads, (_law(name, law) for name, law in found.items()))
    missing = [TITLES[name] for name in TITLES if name not in found]
    if missing:
        yield ""
        yield f"Still to come: {', '.join(missing)}; a law needs {power_law.FITTED} optima."
    if not curves:
        return
    yield ""
    heads = ("C = 6ND", "best parameters", "bytes", "bytes per parameter", "sizes below and above")
    yield from _table.markdown(heads, (_optimum(curve) for curve in curves))
    yield ""
    heads = (
        *("C = 6ND", "model", "parameters", "bytes per parameter", "steps", "lr"),
        *("held-out loss", "range of seeds"),
    )
    yield from _table.markdown(
        heads, (_row(curve, rows) for curve in curves for rows in curve.sizes)
    )


def _law(name: str, law: Law) -> tuple[object, ...]:
    fit, flops = law.growth, law.flops
    extent = (f"{min(flops):.2g}", f"{max(flops):.2g}")
    return TITLES[name], fit, law.exponent, len(flops), *extent, PAPER[name]


def _optimum(curve: IsoFlop) -> tuple[object, ...]:
    best, interval = curve.optimum, power_law.interval(curve.resamples(np.random.default_rng(0)))
    tokens = curve.budget / (6 * best)
    below, above = curve.best, len(curve.sizes) - 1 - curve.best
    return (
        *(
            f"{curve.budget:.2g}",
            f"{best:,.0f} [{interval.low:,.0f}, {interval.high:,.0f}]",
            f"{tokens:,.0f}",
        ),
        *(f"{tokens / best:.1f}", f"{below} and {above}"),
    )


def _row(curve: IsoFlop, rows: list[Finished]) -> tuple[object, ...]:
    one, losses = rows[0], _runs.losses(rows)
    return (
        *(f"{curve.budget:.2g}", one.model, f"{one.parameters:,}"),
        *(f"{one.tokens_per_parameter:.1f}", f"{one.steps:,}", f"{one.lr:g}"),
        *(f"{statistics.fmean(losses):.4f}", f"{max(losses) - min(losses):.4f}"),
    )


def summary(found: Laws) -> str:
    """The exponents."""
    parts = [f"{name} C^{law.exponent}" for name, law in found.items()]
    missing = [name for name in TITLES if name not in found]
    if missing:
        parts.append(f"{', '.join(missing)} still to come")
    extents = (
        f"{name} at {len(law.flops)} budgets, {min(law.flops):.1g} to {max(law.flops):.1g} FLOPs"
        for name, law in found.items()
        if name != "D"  # those of N
    )
    return f"AdamW: {', '.join(parts)}; {', '.join(extents)}" if found else ""


def picture(curves: Sequence[IsoFlop], found: Laws) -> matplotlib.figure.Figure:
    """The loss over the size at each budget, and the best size and tokens over the budget."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xscale="log", xlabel="parameters", ylabel="held-out loss, nats per byte")
    for place, curve in enumerate(curves):
        _draw_curve(left, curve, styles.nth(place))
    right.set(xscale="log", yscale="log", xlabel="C = 6ND")
    for place, name in enumerate(name for name in ("N", "D") if name in found):
        law, style = found[name], styles.nth(place)
        right.plot(law.flops, law.optima, **style.dots, label=TITLES[name])
        line = style.curve() | {"marker": "", "linewidth": 1}
        right.plot(law.flops, law.growth(law.flops), **line)
        right.set_xticks(law.flops, [f"{flops:.2g}" for flops in law.flops])
        right.xaxis.set_minor_locator(NullLocator())
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_curve(axes: matplotlib.axes.Axes, curve: IsoFlop, style: styles.Style) -> None:
    """A dot for each seed, and the parabola."""
    pairs = zip(curve.parameters, curve.losses.tolist(), strict=True)
    dots = [(size, loss) for size, losses in pairs for loss in losses]
    axes.plot(*zip(*dots, strict=True), **style.dots, label=f"C = {curve.budget:.2g}")
    x = np.log(curve.parameters[curve.fitted])
    parabola = np.polyfit(x, curve.losses.mean(axis=1)[curve.fitted], 2)
    every = np.linspace(x[0], x[-1], 50)
    line = style.curve() | {"marker": "", "linewidth": 1}
    axes.plot(np.exp(every), np.polyval(parabola, every), **line)


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    _experiment.run(chosen, experiment(chosen))
