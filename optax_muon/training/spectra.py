"""The spectra of a run's matrices: how evenly each spreads its energy over its directions.

The paper reads off them why Muon helps: an orthogonal update moves all directions of a matrix
alike, so that its weights come to use more of them. It compares the SVD entropy of matrices trained
with Muon and with AdamW, in groups (arXiv 2502.16982, section 3.4, Figure 4), and their singular
values over the largest one (appendix F, Figures 9 and 10).

Matrices are those of the routing, so scanned layers and experts count one by one; the router is
AdamW's, but it is looked at as well. `commands/spectra.py` writes and draws what is found here.
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

from optax_muon import View, measures
from optax_muon.errors import UsageError
from optax_muon.matrices.assign import assign
from optax_muon.matrices.paths import named_leaves
from optax_muon.models import huggingface
from optax_muon.polar.normalize import normalize
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.run_folder import RunFolder

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
"""Matrices that are decomposed at once, in float32; a stack of all experts may be ten gigabytes."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The matrices of one parameter at one step.

    Attributes:
        trial: whose they are.
        step: of the checkpoint.
        group: a key of `GROUPS`.
        path: of the parameter.
        values: singular values over the largest of their matrix, descending, `[matrices, k]`
            float32.
        entropy: `measures.svd_entropy` of each, `[matrices]` float32.
        stable_rank: `measures.stable_rank` of each, `[matrices]` float32.
    """

    trial: str
    step: int
    group: str
    path: str
    values: np.ndarray
    entropy: np.ndarray
    stable_rank: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """Parameters that a run has kept.

    Attributes:
        trial: whose they are.
        step: after how many.
        read: reads them.
    """

    trial: str
    step: int
    read: Callable[[], optax.Params]


@dataclasses.dataclass(frozen=True)
class SpectraTrial:
    """A trial as `config.json` tells of it.

    Attributes:
        name: of the folder of its checkpoints.
        title: in tables and pictures.
        optimizer: `adamw` or `muon`; empty where nobody knows.
    """

    name: str
    title: str
    optimizer: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A group of a trial's matrices at one step: a line of spectra.csv.

    Attributes:
        trial: whose they are.
        step: of the checkpoint.
        group: a key of `GROUPS`.
        matrices: how many.
        entropy: their mean SVD entropy.
        entropy_lower: lower quartile of the entropies.
        entropy_median: their median.
        entropy_upper: their upper quartile.
        stable_rank: mean stable rank.
        higher: matrices of a higher entropy than AdamW's same matrix at the same step has; None
            where there is no such step, and of AdamW itself.
    """

    trial: str
    step: int
    group: str
    matrices: int
    entropy: float
    entropy_lower: float
    entropy_median: float
    entropy_upper: float
    stable_rank: float
    higher: int | None


def group_of(path: str) -> str | None:
    """The group of a parameter; None of a norm, an embedding or an output layer.

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
    """How every parameter that has a spectrum here is read: Muon's matrices and the router.

    Raises:
        UsageError: when a matrix of Muon's is of no group.

    >>> views({"router": {"kernel": jnp.ones([3, 16, 8])}, "norm": {"scale": jnp.ones(16)}})
    {'router/kernel': View(rows=(-2,), cols=(-1,), split=None)}
    """
    routed = {
        path: View(-2, -1) if group_of(path) == ROUTER else view
        for path, view in assign(params).items()
    }
    lost = [path for path, view in routed.items() if view is not None and group_of(path) is None]
    if lost:
        raise UsageError(f"{lost[0]} is of no group; there are {', '.join(GROUPS)}")
    return {path: view for path, view in routed.items() if view is not None}


def spectra(params: optax.Params, trial: str = "", step: int = 0) -> Iterator[Spectrum]:
    """Decompose every matrix, in float32.

    Args:
        params: a Llama's or a Moonlight's, of any floating dtype.
        trial: whose they are.
        step: after how many.

    Raises:
        UsageError: when a matrix of Muon's is of no group.

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
    """The trials of a run, and every checkpoint that it has kept.

    Args:
        run: a folder of `optax-muon train` or `finetune`, or one of `import-hf`, whose single
            trial has no optimizer and whose single checkpoint is of step 0.

    Raises:
        UsageError: when there is no run, or it has no checkpoint.
    """
    folder = RunFolder(run)
    config = folder.read_config()
    if "trials" not in config:
        name = run.resolve().name
        return [SpectraTrial(name, name, "")], [Source(name, 0, functools.partial(_imported, run))]
    trials = [SpectraTrial(c["name"], c["title"], c["optimizer"]) for c in config["trials"]]
    kept = [source for trial in trials for source in _kept(folder, trial.name)]
    if not kept:
        names = " or ".join(trial.name for trial in trials)
        raise UsageError(f"{run} has no checkpoint of {names}")
    return trials, kept


def rows(trials: Sequence[SpectraTrial], found: Sequence[Spectrum]) -> list[Row]:
    """The spectra by group: the lines of spectra.csv, by trial, step and group."""
    places: dict[tuple[str, int, str], list[Spectrum]] = {}
    for spectrum in found:
        place = (spectrum.trial, spectrum.step, spectrum.group)
        places.setdefault(place, []).append(spectrum)
    adamw = next((trial.name for trial in trials if trial.optimizer == "adamw"), "")
    order = itertools.product(
        [trial.name for trial in trials], sorted({s.step for s in found}), GROUPS
    )
    return [
        _row(places[place], places.get((adamw, *place[1:])) if place[0] != adamw else None)
        for place in order
        if place in places
    ]


def _row(mine: Sequence[Spectrum], theirs: Sequence[Spectrum] | None) -> Row:
    entropy = _joined(mine)
    lower, median, upper = np.quantile(entropy, [0.25, 0.5, 0.75]).tolist()
    first = mine[0]
    return Row(
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
    _, params, _ = huggingface.load(run)
    return params


def _measure(stack: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, entropies and stable ranks of `[b, m, n]`, a chunk after the other."""
    at_once = max(1, CHUNK_BYTES // (4 * math.prod(stack.shape[1:])))
    chunks = [
        jax.device_get(_decompose(stack[start : start + at_once]))
        for start in range(0, len(stack), at_once)
    ]
    values, entropy, stable_rank = map(np.concatenate, zip(*chunks, strict=True))
    return values, entropy, stable_rank


@jax.jit
def _decompose(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One decomposition: XLA finds that the measures ask for the same one."""
    x = x.astype(jnp.float32)
    values = jnp.linalg.svd(normalize(x), compute_uv=False)
    largest = jnp.maximum(values[..., :1], jnp.finfo(jnp.float32).tiny)  # a zero matrix has none
    return values / largest, measures.svd_entropy(x), measures.stable_rank(x)
