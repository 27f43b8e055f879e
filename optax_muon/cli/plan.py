"""`optax-muon plan`: which devices of a mesh would work on a model's matrices. Needs no device.

The models are those of `optax-muon train` and of `models.spec.named_configs`, with trees derived
from their modules. The table is `print(plan)`, the picture that of `reports/plan.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path

from jax.sharding import AbstractMesh
from rich.console import Console

import optax_muon
from optax_muon.cli.reports.plan import png
from optax_muon.errors import UsageError
from optax_muon.models import abstract, spec
from optax_muon.platforms import KINDS, PLATFORMS, is_known
from optax_muon.training.presets import PRESETS

REPLICAS = "data"
"""Name of the mesh axis over which parameters are replicated."""
MAX_DEVICES = 2**16

CONFIGS = {name: preset.model for name, preset in PRESETS.items()} | spec.named_configs()
UNROLLED = {f"{name}-unrolled": name for name in ("llama3-8b",)}
MODELS = (*CONFIGS, *UNROLLED)
"""The models by name; unrolled ones have a parameter per layer instead of a stack."""


def tree(name: str) -> abstract.Tree:
    """The parameters that `optax-muon train --model NAME` trains, as shapes and mesh axes."""
    params = spec.model(CONFIGS[UNROLLED.get(name, name)]).abstract_params
    return abstract.unstacked(params, "layers") if name in UNROLLED else params


@dataclasses.dataclass(frozen=True)
class PlanModel:
    """Print which devices of a mesh work on a model's matrices, what moves, and what it costs.

    The models are those of train, such as tiny, small and moonlight-16b-a3b, and llama3-1b,
    llama3-8b and llama3-8b-unrolled, with a parameter per layer. Nothing is allocated, and no
    accelerator is needed.
    """

    model: str = "llama3-8b"
    """Name of the model."""
    mesh: str = "fsdp=16,tensor=4"
    """Axes and sizes of the mesh, major first: data, fsdp, expert, tensor."""
    layout: str | None = None
    """home or gather, for all matrices; by default the cheapest layout for each shape."""
    platform: str = "tpu"
    """tpu (with the rates of a v5p), gpu (of an H100), cpu, or a kind of device as JAX names it,
    such as 'TPU v5 lite'."""
    png: Path | None = None
    """Write a picture of the plan to this file."""
    json: Path | None = None
    """Write all numbers of the plan to this file."""

    def __call__(self) -> None:
        """Write the files, print the table."""
        self._check()
        plan = self._plan()
        files = {}
        if self.json is not None:
            files[self.json] = (json.dumps(plan.to_dict(), indent=2) + "\n").encode()
        if self.png is not None:
            files[self.png] = png(plan, title=self.model)
        for path, content in files.items():
            _write(path, content)
        Console().out(plan, highlight=False)

    def _check(self) -> None:
        """Check the options before any file is written."""
        _one_of("model", self.model, MODELS)
        if not is_known(self.platform):
            _one_of("platform", self.platform, (*PLATFORMS, *KINDS))
        if self.layout is not None:
            _one_of("layout", self.layout, tuple(optax_muon.LAYOUTS))
        for option, path in (("png", self.png), ("json", self.json)):
            if path is not None:
                _check_file(option, path)

    def _plan(self) -> optax_muon.Plan:
        params = tree(self.model)
        sizes = _sizes(self.mesh)
        known = (*abstract.mesh_axes(params), REPLICAS)
        for axis in sizes:
            if axis not in known:
                raise UsageError(
                    f"--mesh {self.mesh} has the axis {axis!r}; {self.model} has {', '.join(known)}"
                )
        _check_divides(params, sizes)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        on_mesh = abstract.on_mesh(params, mesh)
        return optax_muon.plan(on_mesh, layout=self.layout, platform=self.platform)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {option} {value!r}; there are {', '.join(known)}")


def _sizes(text: str) -> dict[str, int]:
    """Axes and sizes of `fsdp=16,tensor=4`.

    >>> _sizes("fsdp=16,tensor=4")
    {'fsdp': 16, 'tensor': 4}
    """
    found = [re.fullmatch(r"\s*([A-Za-z_]\w*)=([1-9][0-9]{0,6})\s*", p) for p in text.split(",")]
    sizes = {match[1]: int(match[2]) for match in found if match}
    if len(sizes) < len(found):
        raise UsageError(
            f"--mesh is {text!r}; write different axes and sizes, as in fsdp=16,tensor=4"
        )
    if math.prod(sizes.values()) > MAX_DEVICES:
        raise UsageError(f"--mesh {text} has more than {MAX_DEVICES} devices")
    return sizes


def _check_divides(tree: abstract.Tree, sizes: dict[str, int]) -> None:
    """Check that every sharded length divides over its mesh axes, as JAX requires."""
    params: dict[str, abstract.AbstractParam] = optax_muon.named_leaves(tree)
    for path, param in params.items():
        for length, over in zip(param.shape, param.mesh_axes, strict=False):
            ways = math.prod(sizes.get(axis, 1) for axis in over)
            if length % ways:
                raise UsageError(
                    f"{path} has {length} entries along {' and '.join(over)}, which do not divide "
                    f"over {ways} devices; choose sizes that do"
                )


def _check_file(option: str, path: Path) -> None:
    suffix = f".{option}"
    if path.suffix != suffix:
        raise UsageError(f"--{option} is {path}; its name must end in {suffix}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"--{option} is {path}; give a file in a folder that exists")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"--{option} is {path}, which cannot be written")


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
