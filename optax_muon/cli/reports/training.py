"""The outcome of a run: numbers from `metrics.jsonl`, as a table, a Markdown file and a picture.

The question is the paper's: after which part of AdamW's training has Muon reached AdamW's final
loss (arXiv 2502.16982, section 3.2: about 52% of the FLOPs on the scaling law)? Here both runs have
schedules of the same length. AdamW's final loss comes at the end of its cosine, where a decayed
learning rate has just bought it a last gain; Muon is credited with the first point of its own
held-out curve at or below it, still in the middle of its schedule.
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

import jax
import jax.numpy as jnp
import matplotlib.figure
import optax
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from optax_muon.cli.reports import routing
from optax_muon.models.moonlight import MoonlightConfig
from optax_muon.models.spec import Config, model
from optax_muon.training.config import TrainConfig
from optax_muon.training.devices import SINGLE_DEVICE, Devices
from optax_muon.training.flops import run_flops
from optax_muon.training.loop import State, StepMetrics, init, shapes, update
from optax_muon.training.optimizers import Trial, transformation
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.trainer import RunConfig

COLUMNS = ("optimizer", "lr", "decay", "loss", "reached", "steps", "FLOPs", "step", "share")
COLORS = {"adamw": "#6b7280", "muon-carried": "#2b8cbe", "muon-tuned": "#d95f0e"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one trial came to.

    Attributes:
        trial: the optimizer and its numbers.
        records: its steps.
        flops: operations of so many first steps, the optimizer's with the model's.
        update_seconds: median wall time of the optimizer's update alone.
    """

    trial: Trial
    records: Sequence[StepMetrics]
    flops: Callable[[float], float]
    update_seconds: float

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Steps and held-out losses."""
        return [(r.step, r.val_loss) for r in self.records if r.val_loss is not None]

    @property
    def val_loss(self) -> float:
        """Held-out loss after the last step, nats per token."""
        return self.curve[-1][1]

    @property
    def step_seconds(self) -> float:
        """Median wall time of a step; the median leaves compilation out."""
        return statistics.median(record.seconds for record in self.records)

    @property
    def share(self) -> float:
        """Part of a step's time that the optimizer takes."""
        return self.update_seconds / self.step_seconds


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A trial beside AdamW, or alone."""

    outcome: Outcome
    adamw: Outcome | None

    @property
    def reached(self) -> float | None:
        """Step at which it reached AdamW's final held-out loss; None if it never did."""
        return None if self.adamw is None else crossing(self.outcome.curve, self.adamw.val_loss)

    @property
    def steps(self) -> float | None:
        """That step as a fraction of AdamW's steps."""
        if self.adamw is None or self.reached is None:
            return None
        return self.reached / self.adamw.records[-1].step

    @property
    def flops(self) -> float | None:
        """The operations up to that step as a fraction of all of AdamW's."""
        if self.adamw is None or self.reached is None:
            return None
        return self.outcome.flops(self.reached) / self.adamw.flops(self.adamw.records[-1].step)

    @property
    def cells(self) -> list[str]:
        """A row under `COLUMNS`."""
        one, tuning = self.outcome, self.outcome.trial.tuning
        never = "-" if self.adamw is None else "never"
        reached = never if self.reached is None else f"{self.reached:.0f}"
        return [
            one.trial.title,
            f"{tuning.lr:g}",
            f"{tuning.weight_decay:g}",
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
    """Every trial beside AdamW, which is the first of several."""
    outcomes = [_outcome(run, each, folder, seconds[each]) for each in run.trials]
    adamw = outcomes[0] if len(outcomes) > 1 else None
    return [Comparison(outcome, adamw) for outcome in outcomes]


def update_times(run: RunConfig, placement: Devices = SINGLE_DEVICE) -> Seconds:
    """Time every trial's update; the placement's mesh is ambient."""
    return {each: _update_seconds(run.setup, each, placement.mesh) for each in run.trials}


def _update_seconds(
    setup: TrainConfig, trial: Trial, mesh: Mesh | None, repeats: int = 11
) -> float:
    """Median wall time of the compiled update alone; what gradients hold does not matter to it."""
    tx = transformation(trial, setup)
    state = init(setup, tx, mesh)
    grads, max_logits = _gradients(setup.model, state)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state = _update(tx, state, grads, max_logits)
        jax.tree.map(lambda leaf: leaf.block_until_ready(), state)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one compiles


def publish(run: RunConfig, origin: str, folder: RunFolder, seconds: Seconds) -> None:
    """Write `summary.md` and the pictures, and print the tables."""
    comparisons = compare(run, folder, seconds)
    heading = describe(run.preset, run.setup)
    (folder.path / "summary.md").write_text(markdown(run, origin, comparisons))
    plot(comparisons, heading, run.setup.unit, folder.path / "loss.png")
    console = Console()
    _print(console, heading, [COLUMNS, *(each.cells for each in comparisons)])
    console.print(f"\n{explain(run.setup)}\n", highlight=False, markup=False)
    if routed := _routed(run, comparisons):
        routing.plot(routed, COLORS, folder.path / "experts.png")
        _print(console, "attention and experts", routing.table(routed))
        console.print(f"\n{routing.explain()}\n", highlight=False, markup=False)
    console.out(f"All of it is in {folder.path}", highlight=False)


def markdown(run: RunConfig, origin: str, comparisons: Sequence[Comparison]) -> str:
    """The table, what it means, and where it was measured."""
    parts = [
        f"# {describe(run.preset, run.setup)}",
        f"{origin}.",
        _markdown_table([COLUMNS, *(each.cells for each in comparisons)]),
        explain(run.setup),
        "![loss](loss.png)",
    ]
    if routed := _routed(run, comparisons):
        table = _markdown_table(routing.table(routed))
        parts += [table, routing.explain(), "![experts](experts.png)"]
    return "\n\n".join([*parts, machine()]) + "\n"


def describe(preset: str, setup: TrainConfig) -> str:
    """An experiment in a line."""
    sizes = setup.model
    experts = f", {sizes.n_routed_experts} experts" if isinstance(sizes, MoonlightConfig) else ""
    growing = "" if setup.grows_at == setup.steps else f", twice that after {setup.grows_at}"
    return (
        f"{preset}: {model(sizes).kind} of width {sizes.hidden_size}, depth "
        f"{sizes.num_hidden_layers}{experts}; "
        f"{setup.steps} steps of {setup.batch} x {sizes.context} {setup.unit}s{growing}, "
        f"seed {setup.seed}"
    )


def explain(setup: TrainConfig) -> str:
    """How to read the table."""
    return (
        f"loss: final, on text held out of training, nats per {setup.unit}. reached: the step at "
        "which a run had AdamW's final loss, and that as a part of AdamW's steps and of its FLOPs "
        "(the model's and Newton-Schulz's). AdamW's final loss comes at the end of its schedule; a "
        "Muon run is taken in the middle of its own, of the same length, linearly between "
        f"evaluations {setup.eval_every} steps apart. step: median time. share: the "
        "optimizer's part of it, the median time of its update alone, on this machine."
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
    """Held-out curves, AdamW's final loss, and where each Muon run crosses it."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(
        title=textwrap.fill(title, 90),
        xlabel="step",
        ylabel=f"held-out loss, nats per {unit} (log scale)",
        yscale="log",
    )
    for each in comparisons:
        _draw_curve(axes, each)
    if adamw := comparisons[0].adamw:
        _draw_level(axes, adamw.val_loss)
        for row, each in enumerate(comparisons[1:], start=1):
            if each.reached is not None:
                place = (each.reached, adamw.val_loss)
                _mark_crossing(axes, each, place, drop=14 * row)
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="final held-out loss")
    figure.savefig(path)


def _draw_curve(axes: Axes, each: Comparison) -> None:
    trial, color = each.outcome.trial, COLORS[each.outcome.trial.name]
    label = f"{each.outcome.val_loss:.3f}  {trial.title} ({trial.tuning.lr:g})"
    axes.plot(*zip(*each.outcome.curve, strict=True), color=color, linewidth=2, label=label)


def _draw_level(axes: Axes, level: float) -> None:
    left = axes.get_yaxis_transform()
    axes.axhline(level, color=COLORS["adamw"], linestyle=":", linewidth=1)
    axes.text(0.01, level, "AdamW's final loss", color=COLORS["adamw"], va="bottom", transform=left)


def _mark_crossing(axes: Axes, each: Comparison, place: tuple[float, float], drop: float) -> None:
    """A dot where a curve meets AdamW's final loss, its share of the steps `drop` points below."""
    color = COLORS[each.outcome.trial.name]
    axes.plot(*place, "o", color=color)
    axes.annotate(
        f"{_percent(each.steps)} of AdamW's steps",
        place,
        xytext=(-2, -drop),
        textcoords="offset points",
        ha="right",
        va="center",
        color=color,
    )


_update = jax.jit(update, static_argnums=0, donate_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(config: Config, state: State) -> tuple[optax.Updates, jax.Array]:
    """Gradients and largest attention logits such as a step makes."""
    grads = jax.tree.map(jnp.ones_like, state.params)
    return grads, jnp.zeros([config.num_hidden_layers, config.num_attention_heads], jnp.float32)


def _outcome(run: RunConfig, trial: Trial, folder: RunFolder, seconds: float) -> Outcome:
    params = shapes(model(run.setup.model), optax.identity()).params
    flops = functools.partial(run_flops, run.setup, trial, params)
    return Outcome(trial, folder.journal.read(trial.name), flops, seconds)


def _routed(run: RunConfig, comparisons: Sequence[Comparison]) -> routing.Records:
    """The records of trials with a router; none of a Llama."""
    setup = run.setup.model
    if not (isinstance(setup, MoonlightConfig) and setup.num_moe_layers):
        return {}
    return {each.outcome.trial: each.outcome.records for each in comparisons}


def _print(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    table = Table(*rows[0], title=title, box=box.SIMPLE, collapse_padding=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"
