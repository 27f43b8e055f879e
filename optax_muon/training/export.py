"""A training run as a folder that can be exported to Hugging Face's layout.

`models/huggingface` exports a folder as `import-hf` makes it: one file of parameters by path. This
module writes such a folder from a checkpoint, with one stacked leaf in memory at a time.
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

from optax_muon.errors import UsageError
from optax_muon.models import huggingface, safetensors_io, spec
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.run_folder import RunFolder, usage_errors

_PARTS = {"params": "{}", "bias": huggingface.BIAS}
"""The parts of a saved state that are the model, and the paths of their arrays in the folder."""


@contextlib.contextmanager
def as_imported(
    run: Path, near: Path, trial: str | None = None, step: int | None = None
) -> Iterator[Path]:
    """Yield the run as a folder that `huggingface.export_checkpoint` takes.

    Args:
        run: A folder of `import-hf`, which is yielded as it is, or of a training run.
        near: Path beside which the temporary folder is made; it is as large as the parameters.
        trial: Trial to export; None is the last one that has a checkpoint.
        step: Step of the checkpoint; None is the newest.

    Raises:
        UsageError: When there is no such checkpoint, or it is not a Moonlight's.
    """
    folder = RunFolder(run)
    if not folder.is_training_run:
        if trial is not None or step is not None:
            raise UsageError(f"{run} is not a training run; it has neither trials nor steps")
        yield run
        return
    contents = {"model": _sizes(folder), "huggingface": origin(folder)}
    with Checkpoints(folder.trained_by(trial)) as checkpoints:
        shapes = checkpoints.shapes(step)  # before anything is written
        near.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{near.name}.", dir=near.parent) as draft:
            (Path(draft) / huggingface.CONFIG).write_text(json.dumps(contents), encoding="utf-8")
            _write(checkpoints, step, shapes, Path(draft) / huggingface.PARAMS)
            yield Path(draft)


def _sizes(folder: RunFolder) -> dict[str, Any]:
    with usage_errors():
        model = spec.model_of(folder.sizes())
    if model.huggingface_type is None:
        raise UsageError(
            f"{folder.path} trained a {model.kind}, which has no Hugging Face layout; a Moonlight"
            " has one"
        )
    return dataclasses.asdict(model.config)


def origin(folder: RunFolder) -> dict[str, Any] | None:
    """The config of the import that the run began with, through any number of runs.

    Its special tokens are the run's too. None if there is none, or its folder is gone.
    """
    seen: set[Path] = set()
    while folder.config.exists() and folder.path not in seen:
        seen.add(folder.path)
        config = folder.read_config()
        if not config.get("pretrained"):
            return config.get("huggingface")
        folder = RunFolder(Path(config["pretrained"]))
    return None


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
