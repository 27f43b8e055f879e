"""Time a whole update of five parameter trees: ours, optax.contrib.muon, torch.optim.Muon, AdamW.

An update is the optimizer's step and its application to the parameters; parameters, gradients and
state are float32. Each JAX implementation is one program that donates parameters and state.
optax.contrib.muon is told which axes form matrices, so that it orthogonalizes the same matrices as
ours and gives the same leaves to Adam. torch.optim.Muon accepts matrices only, so every matrix is a
parameter of its own: stacks are split and convolutions flattened.
torch.optim.AdamW(foreach=True) updates the other leaves. torch's Newton-Schulz runs unmodified in
bfloat16, in float32 with its cast replaced by a copy, and in bfloat16 through torch.compile. Ours
runs in float32 and with bfloat16 operands. "The rest" is ours without the orthogonalization:
momentum, casts, stacking and unstacking, scale, decay and learning rate. optax.adamw on all leaves
is included for comparison.

    python benchmarks/update_speed.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import _bench
import _jax
import _table
import _torch
import _trees
import jax.numpy as jnp
import optax
import tyro

import optax_muon

OURS, OURS_SHORT = "ours float32", "ours bfloat16"
REST = "the rest"
OPTAX, ADAMW = "optax float32", "optax.adamw"
TORCH, TORCH_SHORT = "torch float32", "torch bfloat16"
TORCH_COMPILED = "torch compiled"
IMPLEMENTATIONS = (OURS, OURS_SHORT, OPTAX, TORCH, TORCH_SHORT, TORCH_COMPILED, REST, ADAMW)
COMPARISONS = ((OURS, OPTAX), (OURS, TORCH), (OURS_SHORT, OPTAX), (OURS_SHORT, TORCH_SHORT))
"""Pairs of ours and a peer, for the ratios."""


@dataclasses.dataclass(frozen=True)
class UpdateTime(_bench.TimedRow):
    """One implementation on one tree."""

    ours_over: float
    """Ours in float32 over this implementation."""
    ours_bfloat16_over: float
    """Ours with bfloat16 operands over this implementation."""


def main(options: _bench.Options) -> None:
    """Measure and write the results."""
    trees = _trees.TOYS if options.quick else _trees.TREES

    def measured(case: str) -> list[UpdateTime]:
        return measure(case, trees[case](), options)

    _bench.run(options, "update_speed", UpdateTime, list(trees), measured, page, picture)


def measure(case: str, tree: _trees.Tree, options: _bench.Options) -> list[UpdateTime]:
    """Time all implementations on a tree."""
    params, grads = _trees.normal(tree, 0), _trees.normal(tree, 1)
    made = implementations(params, grads, options.quick)
    times = _bench.measure_in_rounds(made, options.repeats, longest=60)
    return [
        UpdateTime(
            case,
            name,
            **each.milliseconds(),
            rounds=len(each.seconds),
            ours_over=round(times[OURS].over(each), 3),
            ours_bfloat16_over=round(times[OURS_SHORT].over(each), 3),
        )
        for name, each in times.items()
    ]


def implementations(params: Any, grads: Any, quick: bool) -> Mapping[str, _bench.Implementation]:
    """All optimizers on a tree; `quick` omits torch.compile."""
    short = functools.partial(optax_muon.newton_schulz, dtype=jnp.bfloat16)
    transformations = {
        OURS: optax_muon.muon(**_jax.MUON),
        OURS_SHORT: optax_muon.muon(**_jax.MUON, orthogonalizer=short),
        REST: optax_muon.muon(**_jax.MUON, orthogonalizer=lambda x: x),
        OPTAX: _jax.contrib_muon(params),
        ADAMW: optax.adamw(_jax.MUON["learning_rate"], b2=0.95),
    }
    settings = {TORCH: _torch.float32, TORCH_SHORT: contextlib.nullcontext}
    if _torch.can_compile() and not quick:
        settings[TORCH_COMPILED] = _torch.compiled
    made = {name: _jax.Update(tx, params, grads) for name, tx in transformations.items()}
    made |= {name: _torch.Update(params, grads, setting) for name, setting in settings.items()}
    return {name: made[name] for name in IMPLEMENTATIONS if name in made}


def page(rows: Sequence[UpdateTime]) -> list[str]:
    """The Markdown page."""
    cases = _bench.by_case(rows)
    present = [name for name in IMPLEMENTATIONS if any(name in case for case in cases.values())]
    spreads = [
        (case, *(_spread(found.get(name)) for name in present)) for case, found in cases.items()
    ]
    return [
        *_bench.page_head("A whole update", __doc__),
        "Milliseconds, median [quartiles]:",
        "",
        *_table.markdown(("tree", *present), spreads),
        "",
        "Ratios, medians over rounds:",
        "",
        *_table.markdown(
            ("tree", *(f"{ours} / {peer}" for ours, peer in COMPARISONS)), compared(rows)
        ),
    ]


def compared(rows: Sequence[UpdateTime]) -> list[Sequence[str]]:
    """A line for each tree, and one of geometric means."""
    series = {(ours, peer): ratio(rows, ours, peer) for ours, peer in COMPARISONS}
    cases = list(dict.fromkeys(row.case for row in rows))
    lines = [(case, *(f"{values[case]:.2f}" for values in series.values())) for case in cases]
    means = (f"**{_bench.geometric_mean(values.values()):.3f}**" for values in series.values())
    return [*lines, ("geometric mean", *means)]


def ratio(rows: Sequence[UpdateTime], ours: str, peer: str) -> dict[str, float]:
    """Time of ours over that of a peer, by tree."""
    return {
        row.case: row.ours_over if ours == OURS else row.ours_bfloat16_over
        for row in rows
        if row.implementation == peer
    }


def _spread(row: UpdateTime | None) -> str:
    return f"{row.median_ms:.4g} [{row.lower_ms:.4g}, {row.upper_ms:.4g}]" if row else ""


def picture(rows: Sequence[UpdateTime]) -> Any:
    """The ratios by tree."""
    series = {f"{ours} / {peer}": ratio(rows, ours, peer) for ours, peer in COMPARISONS}
    cases = list(dict.fromkeys(row.case for row in rows))
    return _bench.ratios(cases, series, "A whole update: time over theirs", "ratio, log scale")


if __name__ == "__main__":
    main(tyro.cli(_bench.Options))
