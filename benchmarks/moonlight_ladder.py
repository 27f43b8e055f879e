"""A mixture of experts in place of the dense model: AdamW and Muon over the size.

Small Moonlights learn the Python sources listed in benchmarks/corpus, byte by byte: 8 experts, of
which a token goes to 2 and to a shared one, after a dense first block. They get 20 bytes for each
parameter that is activated, that is all but the embedding and the experts that a token is not sent
to; a run goes to the end of its own schedule. Routers keep their balance by biases, without an
auxiliary loss, as Moonlight's do. Batch and weight decay are those that the scaling law of the
dense models has; the learning rate is searched for each optimizer and size by the mean of three
seeds, in factors of two until the best is inside, from the best of the size below. The best is
repeated with three other seeds, the same for all. `Muon` has routers and whole matrices; the two
others differ from it in one thing each.

Differences have the seeds paired, and a 95 % interval by Student's t. `in the search` is the loss
that the rate was chosen for. `fullest expert` is the largest number of tokens of an expert over
an even share, in the layer where it is largest, and `largest logit` that of all attention heads;
both on held-out text at the end, means of the seeds. 6ND counts activated parameters. The FLOPs of
the compiled step, beside it, count the rows with which the CPU's program pads each expert as well.
The ratio is the FLOPs of an optimizer over those that AdamW's fit L = a C^-b needs for the same
loss; its interval is of 1000 draws of the mean losses: their errors have Student's t
distribution, and the variance between seeds is pooled over the sizes.

    python benchmarks/moonlight_ladder.py
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence

import _curves
import _experiment
import _models
import _runs
import _table
import matplotlib.axes
import matplotlib.figure
import tyro
from _curves import Points
from _experiment import Experiment, Results
from _routing import Routed, routed
from _runs import Finished, Run
from _variants import SPECS
from matplotlib.ticker import LogLocator, NullLocator

from optax_muon.models import spec
from optax_muon.models.moonlight import MoonlightConfig, count
from optax_muon.models.spec import Config
from optax_muon.training import power_law

OPTIMIZERS = ("adamw", "muon", "muon-adamw-router", "muon-per-head")
"""Those that are compared; differences are to `muon`."""
START = Run("", "", 20.0, batch=4, lr=4.8e-2, weight_decay=0.1)
"""Where the searches at the smallest size begin."""
SEARCH_SEEDS = (0, 4, 5)
"""Seeds of the searches; the losses of mixtures differ by up to 0.15 nats between seeds."""
OTHERS = "Others report 5 to 20 % for mixtures of experts where dense models gain 50 %."


@dataclasses.dataclass(frozen=True)
class Options(_experiment.Options):
    """Options of the experiment."""

    sizes: int = 3
    """Sizes of the ladder to train, from the smallest."""

    @property
    def models(self) -> Mapping[str, Config]:
        """The models of the ladder."""
        models = _models.TOY_MIXTURES if self.quick else _models.MIXTURES
        return dict([*models.items()][: self.sizes])


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which runs the experiment needs, and which of them it reports."""

    models: Sequence[str]
    """Names of the models, the smallest first."""
    start: Run
    """Where the searches at the smallest size begin."""

    def needed(self, finished: Sequence[Finished]) -> Iterator[Run]:
        """The searches, each from where the one below it ended, and the seeds of their best."""
        for name in OPTIMIZERS:
            yield from self._searched(finished, name)[0]

    def points(self, finished: Sequence[Routed]) -> dict[str, list[list[Routed]]]:
        """The best runs of each size, by optimizer."""
        return {name: self._searched(finished, name)[1] for name in OPTIMIZERS}

    def _searched(
        self, finished: Sequence[_runs.Row], name: str
    ) -> tuple[list[Run], list[list[_runs.Row]]]:
        """The runs of an optimizer to do next, and the best ones of the sizes that are done."""
        start, sizes = self.start, []
        for model in self.models:
            start = dataclasses.replace(start, model=model, optimizer=name, seed=0)
            missing, best = _runs.tuned(finished, start, search_seeds=SEARCH_SEEDS)
            if not best:
                return missing, sizes
            start = best[0].run
            sizes.append(best)
        return [], sizes


def experiment(options: Options) -> Experiment:
    """The experiment."""
    ratio = 1.0 if options.quick else START.tokens_per_parameter
    start = dataclasses.replace(START, tokens_per_parameter=ratio)
    protocol = Protocol([*options.models], start)

    def points(results: Results) -> dict[str, list[list[Routed]]]:
        return protocol.points(routed(results))

    return Experiment(
        "moonlight_ladder",
        "A mixture of experts: AdamW and Muon over the size",
        __doc__,
        options.models,
        protocol.needed,
        lambda results: report(points(results), results, options.models),
        lambda results: picture(points(results), results),
        lambda results: summary(points(results), results),
        lambda results: (rows[0] for sizes in points(results).values() for rows in sizes),
        kind=Routed,
    )


def report(points: Points[Routed], results: Results, models: Mapping[str, Config]) -> Iterator[str]:
    """The lines of the page: the sizes, the optimizers at each, the fits, the ratios."""
    heads = ("model", "activated parameters", "all but the embedding", "heads", "bytes")
    yield from _table.markdown(heads, (_size(name, model) for name, model in models.items()))
    yield ""
    yield from _table.markdown(
        (
            *("model", "optimizer", "lr", "FLOPs", "in the search", "held-out loss"),
            *("difference to Muon", "fullest expert", "largest logit", "seconds"),
        ),
        (
            _row(rows, points["muon"][place], results)
            for place in range(len(points["muon"]))
            for sizes in points.values()
            for rows in sizes[place : place + 1]
        ),
    )
    yield ""
    yield from _fit_lines(points, results)


def _size(name: str, model: Config) -> tuple[object, ...]:
    if not isinstance(model, MoonlightConfig):
        raise TypeError(f"{name} is a {type(model).__name__}; the ladder is of mixtures of experts")
    active = spec.model(model).active
    unused = count(model).total - count(model).active
    tokens = round(START.tokens_per_parameter * active)
    return name, f"{active:,}", f"{active + unused:,}", model.num_attention_heads, f"{tokens:,}"


def _row(rows: list[Routed], muon: list[Routed], results: Results) -> tuple[object, ...]:
    one = rows[0]
    return (
        *(one.model, SPECS[one.optimizer].title, f"{one.lr:g}", f"{one.flops:.3g}"),
        f"{_in_the_search(one, results):.4f}",
        f"{statistics.fmean(_runs.losses(rows)):.4f}",
        "" if rows == muon else _runs.paired(rows, muon),
        f"{_mean(rows, 'largest_share'):.2f}",
        f"{_mean(rows, 'max_logit'):.1f}",
        _experiment.measured(results.seconds(one), ".0f"),
    )


def _in_the_search(row: Routed, results: Results) -> float:
    """The mean loss with the seeds of the searches."""
    searched = [dataclasses.replace(row.run, seed=seed) for seed in SEARCH_SEEDS]
    return statistics.fmean(_runs.losses(_runs.found(results.finished, searched)))


def _mean(rows: list[Routed], field: str) -> float:
    return statistics.fmean([getattr(row, field) for row in rows])


def _fit_lines(points: Points[Routed], results: Results) -> Iterator[str]:
    """The fits and the ratios, once there are enough sizes."""
    curves = _curves.fitted(points, results)
    if set(curves) != set(OPTIMIZERS):
        yield f"Fits and ratios need {power_law.FITTED} sizes; some are still to come."
        return
    laws = ((SPECS[name].title, each.power_law("model_flops")) for name, each in curves.items())
    yield from _table.markdown(("optimizer", "L = a C^-b, C = 6ND in PFLOP/s-days"), laws)
    yield ""
    yield from _curves.ratios(points, results)
    yield ""
    yield f"{_curves.RATIOS} {OTHERS}"


def summary(points: Points[Routed], results: Results) -> str:
    """Muon's ratio at the largest size, and what routers and heads apart change there."""
    if not all(points.values()):
        return ""
    done = min(map(len, points.values()))
    last = {name: sizes[done - 1] for name, sizes in points.items()}
    one = last["muon"][0]
    changes = "; ".join(
        f"{SPECS[name].title} {_runs.paired(rows, last['muon'])}"
        for name, rows in last.items()
        if name != "muon"
    )
    curves = _curves.fitted(points, results)
    ratio = ""
    if {"adamw", "muon"} <= curves.keys():
        place = len(points["muon"]) - 1
        model_flops, flops = (
            power_law.ratio(curves["adamw"], curves["muon"], place, of)
            for of in ("model_flops", "flops")
        )
        ratio = f"Muon needs {model_flops} of AdamW's 6ND, {flops} of all FLOPs; "
    chosen = ", ".join(f"{_in_the_search(rows[0], results):.3f}" for rows in points["adamw"])
    reached = ", ".join(f"{_mean(rows, 'val_loss'):.3f}" for rows in points["adamw"])
    return (
        f"{ratio}loss over that of Muon at {one.parameters:,} activated parameters: {changes}; "
        f"AdamW's rates were chosen for losses of {chosen}, which are {reached} with other seeds; "
        f"{done} sizes, {one.tokens_per_parameter:g} tokens per activated parameter, 3 seeds"
    )


FIELDS = {"largest_share": "fullest expert over an even share", "max_logit": "largest logit"}


def picture(points: Points[Routed], results: Results) -> matplotlib.figure.Figure:
    """Over activated 6ND: the loss, how full the fullest expert is, the largest logit."""
    del results
    figure = matplotlib.figure.Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    loss, *panels = figure.subplots(1, 3)
    loss.set(yscale="log", ylabel="held-out loss, nats per byte")
    _draw(loss, points, "val_loss")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}")
    if loss.lines:
        loss.legend(frameon=False, fontsize=7)
    for axes, (field, label) in zip(panels, FIELDS.items(), strict=True):
        axes.set(ylabel=label)
        _draw(axes, points, field)
    return figure


def _draw(axes: matplotlib.axes.Axes, points: Points[Routed], field: str) -> None:
    """A dot for each seed, and a line through the means."""
    axes.set(xscale="log", xlabel="6ND, activated parameters")
    for name, sizes in points.items():
        style = SPECS[name].style
        dots = [(row.model_flops, getattr(row, field)) for rows in sizes for row in rows]
        means = [(rows[0].model_flops, _mean(rows, field)) for rows in sizes]
        if dots:
            axes.plot(*zip(*dots, strict=True), **style.dots, alpha=0.6)
            line = style.curve() | {"marker": "", "linewidth": 1}
            axes.plot(*zip(*means, strict=True), **line, label=SPECS[name].title)
    # Less than a power of ten wide: the labels of all minor ticks would overlap.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    _experiment.run(chosen, experiment(chosen))
