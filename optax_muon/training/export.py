"""A training run's parameters in the form that Hugging Face's layout is made of, array by array.

`models/huggingface.py` reads a folder as `import-hf` makes it: one file of parameters by path. This
writes such a folder of a checkpoint, in memory no more than one stacked leaf at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optax_muon.errors import UsageError, usage_errors
from optax_muon.models import huggingface, safetensors_io, spec
from optax_muon.models.moonlight import MoonlightConfig
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.run_folder import RunFolder

_PARTS = {"params": "{}", "bias": huggingface.BIAS}
"""Parts of a saved state that a model consists of, and the paths of their arrays in the folder."""


@contextlib.contextmanager
def as_imported(
    run: Path, near: Path, trial: str | None = None, step: int | None = None
) -> Iterator[Path]:
    """The run as a folder that `huggingface.export_checkpoint` takes.

    Args:
        run: a folder of `import-hf`, which is taken as it is, or of a training run.
        near: a temporary folder is made beside this path, of the size of the parameters.
        trial: whose parameters; None is the last one that has any.
        step: after how many steps; None is the newest checkpoint.

    Raises:
        UsageError: when there is no such checkpoint, or it is no Moonlight's.
    """
    folder = RunFolder(run)
    config = folder.read_config()
    if "trials" not in config:
        if trial is not None or step is not None:
            raise UsageError(f"{run} is no training run; it has neither trials nor steps")
        yield run
        return
    origin = {"model": _sizes(run, config), "huggingface": _origin(config)}
    with Checkpoints(folder.trained_by(trial)) as checkpoints:
        shapes = checkpoints.shapes(step)  # or nothing is written
        near.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{near.name}.", dir=near.parent) as draft:
            (Path(draft) / huggingface.CONFIG).write_text(json.dumps(origin))
            _write(checkpoints, step, shapes, Path(draft) / huggingface.PARAMS)
            yield Path(draft)


def _sizes(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    with usage_errors():
        sizes = spec.model_of(config).config
    if not isinstance(sizes, MoonlightConfig):
        raise UsageError(f"{run} trained a Llama; only a Moonlight has the layout of DeepSeek-V3")
    return dataclasses.asdict(sizes)


def _origin(config: dict[str, Any]) -> dict[str, Any] | None:
    """The config of the checkpoint that the run began with: its tokens are the run's."""
    start = config.get("start")
    path = Path(start) / huggingface.CONFIG if start else None
    return json.loads(path.read_text()).get("huggingface") if path and path.exists() else None


def _write(
    checkpoints: Checkpoints,
    step: int | None,
    shapes: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
    target: Path,
) -> None:
    names = {np.dtype(dtype): name for name, dtype in safetensors_io.DTYPES.items()}
    places = {
        name.format(path): (part, path) for part, name in _PARTS.items() for path in shapes[part]
    }
    layout = {
        name: safetensors_io.Entry(tuple(shapes[part][path].shape), names[shapes[part][path].dtype])
        for name, (part, path) in places.items()
    }
    with safetensors_io.Writer(target, layout) as writer:
        for name, (part, path) in places.items():
            writer.write(name, (), checkpoints.array(part, path, step))
