"""The spectra of a run's matrices: how evenly each spreads its energy over its directions.

The paper uses them to explain why Muon helps: an orthogonal update moves all directions of a matrix
alike, so its weights come to use more of them. It compares the SVD entropy of matrices trained
with Muon and with AdamW, in groups (arXiv 2502.16982, section 3.4, Figure 4), and their singular
values over the largest one (appendix F, Figures 9 and 10).

The matrices are those that Muon gets, so scanned layers and experts count one by one, and the
routers. `cli/spectra.py` writes the result, `cli/reports/spectra.py` draws it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_muon
from optax_muon import View, measures, named_leaves
from optax_muon.errors import UsageError
from optax_muon.models import huggingface
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.run_folder import RunFolder, usage_errors

ROUTER = "Router"

GROUPS: dict[str, tuple[str, ...]] = {
    "AttnQO": ("q_proj/kernel", "q_a_proj/kernel", "q_b_proj/kernel", "o_proj/kernel"),
    "AttnKV": ("k_proj/kernel", "v_proj/kernel", "kv_a_proj/kernel", "kv_b_proj/kernel"),
    "Experts": ("experts/gate_proj", "experts/up_proj", "experts/down_proj"),
    "SharedExperts": (
        "shared_experts/gate_proj/kernel",
        "shared_experts/up_proj/kernel",
        "shared_experts/down_proj/kernel",
    ),
    ROUTER: ("router/kernel",),
    "Dense": ("mlp/gate_proj/kernel", "mlp/up_proj/kernel", "mlp/down_proj/kernel"),
}
"""The paper's groups, by the ends of the paths of Llama's and Moonlight's parameters."""

CHUNK_BYTES = 64 * 2**20
"""Size in float32 of the matrices decomposed at once; a stack of all experts may be 10 GB."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The matrices of one parameter at one step."""

    trial: str
    """Trial that trained the parameter."""
    step: int
    """Step of the checkpoint."""
    group: str
    """A key of `GROUPS`."""
    path: str
    """Path of the parameter."""
    values: np.ndarray
    """Singular values over the largest of their matrix, descending, `[matrices, k]` float32."""
    entropy: np.ndarray
    """`measures.svd_entropy` of each, `[matrices]` float32."""
    stable_rank: np.ndarray
    """`measures.stable_rank` of each, `[matrices]` float32."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Parameters that a run has kept."""

    trial: str
    """Trial that trained them."""
    step: int
    """Step of the checkpoint."""
    read: Callable[[], optax.Params]
    """Reads them."""


@dataclasses.dataclass(frozen=True)
class SpectraTrial:
    """A trial as `config.json` records it."""

    name: str
    """Name of its folder of checkpoints."""
    title: str
    """Its name in tables and pictures."""


@dataclasses.dataclass(frozen=True)
class SpectraRow:
    """A group of a trial's matrices at one step: a line of spectra.csv."""

    trial: str
    """Trial that trained the matrices."""
    step: int
    """Step of the checkpoint."""
    group: str
    """A key of `GROUPS`."""
    matrices: int
    """Number of matrices."""
    entropy: float
    """Their mean SVD entropy."""
    entropy_lower: float
    """Lower quartile of the entropies."""
    entropy_median: float
    """Their median."""
    entropy_upper: float
    """Their upper quartile."""
    stable_rank: float
    """Mean stable rank."""
    higher: int | None
    """Number of matrices with a higher entropy than the same matrix of the baseline at the same
    step; None for the baseline itself, and if it has no checkpoint of that step."""


def group_of(path: str) -> str | None:
    """The group of a parameter; None for a norm, an embedding or an output layer.

    >>> group_of("moe_layers/shared_experts/up_proj/kernel"), group_of("moe_layers/experts/up_proj")
    ('SharedExperts', 'Experts')
    >>> group_of("embed/embedding") is None
    True
    """
    for group, ends in GROUPS.items():
        if any(f"/{path}".endswith(f"/{end}") for end in ends):
            return group
    return None


def views(params: optax.Params) -> dict[str, View]:
    """The views of the parameters whose spectra are taken: Muon's matrices and the routers.

    Raises:
        UsageError: When one of Muon's matrices is in no group.

    >>> views({"layers": {"router": {"kernel": jnp.ones([3, 16, 8])}}, "norm": jnp.ones(16)})
    {'layers/router/kernel': View(rows=(-2,), cols=(-1,), split=None)}
    """
    routed = {
        path: View(-2, -1) if group_of(path) == ROUTER else view
        for path, view in optax_muon.label(params).views.items()
    }
    lost = [path for path, view in routed.items() if view is not None and group_of(path) is None]
    if lost:
        raise UsageError(f"{lost[0]} is in no group; there are {', '.join(GROUPS)}")
    return {path: view for path, view in routed.items() if view is not None}


def spectra(params: optax.Params, trial: str = "", step: int = 0) -> Iterator[Spectrum]:
    """Decompose every matrix, in float32.

    Args:
        params: A Llama's or a Moonlight's, of any floating dtype.
        trial: Trial that trained them.
        step: Step of the checkpoint.

    Raises:
        UsageError: When one of Muon's matrices is in no group.

    >>> params = {"layers": {"mlp": {"up_proj": {"kernel": jnp.stack([jnp.eye(4, 8)] * 3)}}}}
    >>> [spectrum] = spectra(params)
    >>> spectrum.group, spectrum.values.shape, spectrum.entropy.tolist()
    ('Dense', (3, 4), [1.0, 1.0, 1.0])
    """
    leaves = named_leaves(params)
    for path, view in views(params).items():
        leaf = jnp.asarray(leaves[path])
        group = group_of(path)
        assert group is not None
        for stack in view.bind(leaf.shape).to_matrices(leaf):
            yield Spectrum(trial, step, group, path, *_measure(stack))


def sources(run: Path) -> tuple[list[SpectraTrial], list[Source]]:
    """The trials of a run, the baseline first, and every checkpoint that it has kept.

    Args:
        run: A folder of `optax-muon train` or `finetune`, or one of `import-hf`, which has a single
            trial, named after the folder, with a single checkpoint, of step 0.

    Raises:
        UsageError: When there is no run, or it has no checkpoint.
    """
    folder = RunFolder(run)
    if not folder.is_training_run:
        name = run.resolve().name
        return [SpectraTrial(name, name)], [Source(name, 0, functools.partial(_imported, run))]
    trials = [SpectraTrial(each["name"], each.get("title", each["name"])) for each in folder.trials]
    kept = [source for trial in trials for source in _kept(folder, trial.name)]
    if not kept:
        names = " or ".join(trial.name for trial in trials)
        raise UsageError(f"{run} has no checkpoint of {names}")
    return trials, kept


def rows(trials: Sequence[SpectraTrial], found: Sequence[Spectrum]) -> list[SpectraRow]:
    """The spectra by group: the lines of spectra.csv, by trial, step and group.

    The first trial is the baseline that the others are compared with.
    """
    places: dict[tuple[str, int, str], list[Spectrum]] = {}
    for spectrum in found:
        place = (spectrum.trial, spectrum.step, spectrum.group)
        places.setdefault(place, []).append(spectrum)
    baseline = trials[0].name
    order = itertools.product(
        [trial.name for trial in trials], sorted({s.step for s in found}), GROUPS
    )
    return [
        _row(places[place], places.get((baseline, *place[1:])) if place[0] != baseline else None)
        for place in order
        if place in places
    ]


def _row(mine: Sequence[Spectrum], theirs: Sequence[Spectrum] | None) -> SpectraRow:
    entropy = _joined(mine)
    lower, median, upper = np.quantile(entropy, [0.25, 0.5, 0.75]).tolist()
    first = mine[0]
    return SpectraRow(
        first.trial,
        first.step,
        first.group,
        len(entropy),
        float(entropy.mean()),
        lower,
        median,
        upper,
        float(np.concatenate([spectrum.stable_rank for spectrum in mine]).mean()),
        None if theirs is None else int((entropy > _joined(theirs)).sum()),
    )


def _joined(group: Sequence[Spectrum]) -> np.ndarray:
    """Entropies of all matrices of a group, in the order of the parameters' paths."""
    return np.concatenate([spectrum.entropy for spectrum in group]).astype(np.float64)


def _kept(folder: RunFolder, trial: str) -> Iterator[Source]:
    path = folder.checkpoints(trial)
    if path.exists():
        with Checkpoints(path) as checkpoints:
            steps = checkpoints.steps
        yield from (Source(trial, step, functools.partial(_saved, path, step)) for step in steps)


def _saved(path: Path, step: int) -> optax.Params:
    with Checkpoints(path) as checkpoints:
        return checkpoints.params(step)


def _imported(run: Path) -> optax.Params:
    with usage_errors():
        _, params, _ = huggingface.load(run)
    return params


def _measure(stack: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, entropies and stable ranks of `[b, m, n]`, chunk by chunk."""
    at_once = max(1, CHUNK_BYTES // (4 * math.prod(stack.shape[1:])))
    chunks = [
        jax.device_get(_decompose(stack[start : start + at_once]))
        for start in range(0, len(stack), at_once)
    ]
    values, entropy, stable_rank = map(np.concatenate, zip(*chunks, strict=True))
    return values, entropy, stable_rank


@jax.jit
def _decompose(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Measure a stack; XLA merges the three decompositions into one."""
    x = x.astype(jnp.float32)
    return measures.singular_values(x), measures.svd_entropy(x), measures.stable_rank(x)
