"""The report of a run: numbers from `metrics.jsonl`, as a table, a Markdown file and a picture.

The question is the paper's: after what fraction of AdamW's training does Muon reach AdamW's final
loss (arXiv 2502.16982, section 3.2: about 52% of the FLOPs on the scaling law)? The first trial is
the baseline. All runs have schedules of the same length. The baseline reaches its final loss at the
end of its schedule, where the decayed learning rate has just lowered it once more; another run is
credited with the first point of its own held-out curve at or below it, still in mid-schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from matplotlib.axes import Axes
from rich.console import Console

from optax_muon.cli.reports import pictures, routing
from optax_muon.cli.reports.tables import markdown_table, terminal_table
from optax_muon.models.spec import Model, model
from optax_muon.training.config import TrainConfig
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.flops import run_flops
from optax_muon.training.initialize import initial_state
from optax_muon.training.loop import StepMetrics
from optax_muon.training.optimizers import Trial, transformation
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.state import State, shapes, stats_shapes
from optax_muon.training.step import update

COLUMNS = ("optimizer", "lr", "decay", "loss", "reached", "steps", "FLOPs", "step", "share")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one trial."""

    trial: Trial
    """The optimizer and its numbers."""
    metrics: Sequence[StepMetrics]
    """Metrics of its steps."""
    flops: Callable[[float], float]
    """Operations of the first `n` steps, the model's and the optimizer's."""
    update_seconds: float
    """Median wall time of the optimizer's update alone."""

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Steps and held-out losses."""
        return [(r.step, r.val_loss) for r in self.metrics if r.val_loss is not None]

    @property
    def val_loss(self) -> float:
        """Held-out loss after the last step, nats per token."""
        return self.curve[-1][1]

    @property
    def step_seconds(self) -> float:
        """Median wall time of a step; the median excludes compilation."""
        return statistics.median(each.seconds for each in self.metrics)

    @property
    def share(self) -> float:
        """Fraction of a step's time that the optimizer takes."""
        return self.update_seconds / self.step_seconds


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A trial compared with the baseline."""

    outcome: Outcome
    """Result of the trial."""
    baseline: Outcome | None
    """Result of the first trial; None in a run of one trial."""

    @property
    def reached(self) -> float | None:
        """Step at which it reached the baseline's final held-out loss; None if it never did."""
        return (
            None if self.baseline is None else crossing(self.outcome.curve, self.baseline.val_loss)
        )

    @property
    def steps(self) -> float | None:
        """That step as a fraction of the baseline's steps."""
        if self.baseline is None or self.reached is None:
            return None
        return self.reached / self.baseline.metrics[-1].step

    @property
    def flops(self) -> float | None:
        """The operations up to that step as a fraction of all of the baseline's."""
        if self.baseline is None or self.reached is None:
            return None
        return self.outcome.flops(self.reached) / self.baseline.flops(
            self.baseline.metrics[-1].step
        )

    @property
    def cells(self) -> list[str]:
        """A row under `COLUMNS`."""
        one, numbers = self.outcome, self.outcome.trial.hyper_params
        never = "-" if self.baseline is None else "never"
        reached = never if self.reached is None else f"{self.reached:.0f}"
        return [
            one.trial.title,
            f"{numbers.lr:g}",
            f"{numbers.weight_decay:g}",
            f"{one.val_loss:.4f}",
            reached,
            _percent(self.steps),
            _percent(self.flops),
            f"{one.step_seconds * 1e3:.0f} ms",
            f"{one.share:.1%}",
        ]


def crossing(curve: Sequence[tuple[int, float]], level: float) -> float | None:
    """First step at which a curve is at or below `level`, linear between its points.

    >>> crossing([(10, 4.0), (20, 2.0), (30, 1.0)], level=3.0)
    15.0
    >>> crossing([(10, 4.0), (20, 2.0)], level=1.0) is None
    True
    """
    if curve[0][1] <= level:
        return float(curve[0][0])
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= level:
            return before + (after - before) * (high - level) / (high - low)
    return None


Seconds = Mapping[Trial, float]
"""Median wall time of the update alone."""


def compare(run: RunConfig, folder: RunFolder, seconds: Seconds) -> list[Comparison]:
    """Every trial compared with the first one, if there are several."""
    outcomes = [_outcome(run, each, folder, seconds[each]) for each in run.trials]
    baseline = outcomes[0] if len(outcomes) > 1 else None
    return [Comparison(outcome, baseline) for outcome in outcomes]


def update_times(run: RunConfig, devices: Devices = SINGLE_DEVICE) -> Seconds:
    """Time every trial's update; the devices' mesh is ambient."""
    return {each: _update_seconds(run.training, each, devices.mesh) for each in run.trials}


def _update_seconds(
    config: TrainConfig, trial: Trial, mesh: Mesh | None, repeats: int = 11
) -> float:
    """Median wall time of the compiled update alone; it does not depend on gradients' values."""
    tx = transformation(trial, config)
    state = initial_state(config, tx, mesh)
    grads, extra = _gradients(model(config.model), state)
    extra |= trial.numbers(lr=0.0)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state = _update(tx, state, grads, **extra)
        jax.tree.map(lambda leaf: leaf.block_until_ready(), state)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one includes compilation


def publish(run: RunConfig, origin: str, folder: RunFolder, seconds: Seconds) -> None:
    """Write `summary.md` and the pictures, and print the tables."""
    comparisons = compare(run, folder, seconds)
    heading = describe(run.preset, run.training)
    (folder.path / "summary.md").write_text(markdown(run, origin, comparisons), encoding="utf-8")
    plot(comparisons, heading, run.training.unit, folder.path / "loss.png")
    console = Console()
    console.print(terminal_table(heading, [COLUMNS, *(each.cells for each in comparisons)]))
    console.print(f"\n{explain(run)}\n", highlight=False, markup=False)
    if routed := _routed(comparisons):
        routing.plot(routed, folder.path / "experts.png")
        console.print(terminal_table("attention and experts", routing.table(routed)))
        console.print(f"\n{routing.explain()}\n", highlight=False, markup=False)
    console.out(f"Results are in {folder.path}", highlight=False)


def markdown(run: RunConfig, origin: str, comparisons: Sequence[Comparison]) -> str:
    """The table, what it means, and where it was measured."""
    ends = [(each.outcome.trial.title, each.outcome.val_loss) for each in comparisons]
    parts = [
        f"# {describe(run.preset, run.training)}",
        f"{origin}.",
        markdown_table([COLUMNS, *(each.cells for each in comparisons)]),
        explain(run),
        f"![{pictures.loss_alt(ends)}](loss.png)",
    ]
    if routed := _routed(comparisons):
        table = markdown_table(routing.table(routed))
        parts += [table, routing.explain(), f"![{routing.ALT}](experts.png)"]
    return "\n\n".join([*parts, machine()]) + "\n"


def describe(preset: str | None, config: TrainConfig) -> str:
    """An experiment in a line."""
    sizes = config.model
    bias = shapes(model(sizes), optax.identity()).bias
    experts = "" if bias is None else f", {bias.shape[-1]} experts"
    doubles_at = config.batch_doubles_at
    growing = "" if doubles_at == config.steps else f", twice that after {doubles_at}"
    return (
        f"{preset}: {model(sizes).kind} of width {sizes.hidden_size}, depth "
        f"{sizes.num_hidden_layers}{experts}; "
        f"{config.steps} steps of {config.batch} x {sizes.context} {config.unit}s{growing}, "
        f"seed {config.seed}"
    )


def explain(run: RunConfig) -> str:
    """How to read the table."""
    config, baseline = run.training, run.trials[0].title
    return (
        f"loss: final, on held-out text, nats per {config.unit}. reached: the step at which a run "
        f"had the final loss of {baseline}, and that step as a fraction of the steps and of the "
        f"FLOPs of {baseline} (the model's and the optimizer's matrix products). {baseline} has "
        "its final loss at the end of its schedule; another run reaches it in the middle of its "
        "own, of the same length, by linear interpolation between evaluations "
        f"{config.eval_every} steps apart. step: median time. share: the optimizer's fraction of "
        "it, the median time of its update alone, on this machine."
    )


def machine() -> str:
    """Device, cores and versions that the numbers were measured with."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax")
    )
    device = jax.devices()[0].device_kind
    return (
        f"Measured on {device} ({platform.machine()}, {os.cpu_count()} cores) with "
        f"Python {platform.python_version()}, {versions}."
    )


def plot(comparisons: Sequence[Comparison], title: str, unit: str, path: Path) -> None:
    """Held-out curves, the baseline's final loss, and where each other run crosses it."""
    figure, axes = pictures.loss_axes(
        title=textwrap.fill(title, 90), ylabel=f"held-out loss, nats per {unit} (log scale)"
    )
    for each in comparisons:
        _draw_curve(axes, each)
    if baseline := comparisons[0].baseline:
        _draw_level(axes, baseline)
        for row, each in enumerate(comparisons[1:], start=1):
            if each.reached is not None:
                place = (each.reached, baseline.val_loss)
                _mark_crossing(axes, each, place, drop=14 * row)
    axes.legend(frameon=False, title="final held-out loss", handlelength=4)
    pictures.save(figure, path)


def _draw_curve(axes: Axes, each: Comparison) -> None:
    trial, curve = each.outcome.trial, each.outcome.curve
    label = f"{each.outcome.val_loss:.3f}  {trial.title} ({trial.hyper_params.lr:g})"
    style = trial.spec.style.curve(len(curve))
    axes.plot(*zip(*curve, strict=True), **style, linewidth=2, label=label)


def _draw_level(axes: Axes, baseline: Outcome) -> None:
    left, spec = axes.get_yaxis_transform(), baseline.trial.spec
    axes.axhline(baseline.val_loss, color=spec.style.color, linestyle=":", linewidth=1)
    text = f"final loss of {spec.title}"
    axes.text(0.01, baseline.val_loss, text, color=spec.style.color, va="bottom", transform=left)


def _mark_crossing(axes: Axes, each: Comparison, place: tuple[float, float], drop: float) -> None:
    """A ring where a curve meets the final loss; `drop` points below it, the fraction of steps."""
    color = each.outcome.trial.spec.style.color
    axes.plot(*place, "o", color=color, fillstyle="none", markersize=10)
    axes.annotate(
        f"{_percent(each.steps)} of the steps",
        place,
        xytext=(-2, -drop),
        textcoords="offset points",
        ha="right",
        va="center",
        color=color,
    )


_update = jax.jit(update, static_argnums=0, donate_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(model: Model, state: State) -> tuple[optax.Updates, dict[str, Any]]:
    """Gradients, and largest attention logits if the model reports them, shaped as a step's."""
    grads, stats = jax.tree.map(jnp.ones_like, state.params), stats_shapes(model)
    if stats is None:
        return grads, {}
    return grads, {"max_logits": jnp.zeros(stats.max_logits.shape, jnp.float32)}


def _outcome(run: RunConfig, trial: Trial, folder: RunFolder, seconds: float) -> Outcome:
    params = shapes(model(run.training.model), optax.identity()).params
    flops = functools.partial(run_flops, run.training, trial, params)
    return Outcome(trial, folder.journal.read(trial.name), flops, seconds)


def _routed(comparisons: Sequence[Comparison]) -> routing.MetricsByTrial:
    """The metrics of trials whose model has a router; none of other models."""
    outcomes = [each.outcome for each in comparisons]
    return {one.trial: one.metrics for one in outcomes if "imbalance" in one.metrics[-1].model}


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"
