"""Conversion of checkpoints in Hugging Face's DeepSeek-V3 layout, which Moonlight is published in.

A checkpoint is a folder of `config.json` and safetensors files. `tensors` (`names.py`) maps its
tensors to the parameters, and `import_checkpoint` and `export_checkpoint` copy them one by one, so
that memory stays near one tensor and one shard. Bits and dtypes are preserved. Nothing is written
until every tensor has been checked, and the result appears all at once.

    RUN/config.json            {"model": our sizes, "huggingface": the checkpoint's own config}
    RUN/params.safetensors     parameters by path, and `router_bias`
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import safetensors.numpy

from optax_muon.errors import shortened
from optax_muon.models import safetensors_io
from optax_muon.models.huggingface.config import (
    CONFIG,
    EXTRA_LAYERS,
    from_huggingface,
    to_huggingface,
)
from optax_muon.models.huggingface.names import (
    BIAS,
    EMBEDDING,
    Tensor,
    by_layer,
    leaf_shapes,
    tensors,
)
from optax_muon.models.huggingface.source import (
    INDEX,
    Place,
    places,
    read_json,
    stored_tensors,
    without_extra_layers,
)
from optax_muon.models.moonlight import MoonlightConfig
from optax_muon.models.safetensors_io import DTYPES, Entry

PARAMS = "params.safetensors"
"""The parameters of a run."""

SHARD_BYTES = 5_000_000_000
"""Largest file of an exported checkpoint, as in the published ones."""

Progress = Callable[[Iterable[Tensor]], Iterable[Tensor]]
"""Wraps an iteration, to show how far it has come."""


def import_checkpoint(
    source: Path,
    run: Path,
    progress: Progress = iter,
    note: Callable[[str], None] | None = None,
) -> MoonlightConfig:
    """Convert a checkpoint to a run's folder.

    Args:
        source: The checkpoint: `config.json` and safetensors files, with an index if several.
        run: The folder to make.
        progress: Wraps the iteration over tensors, to show how far it has come.
        note: Called with a sentence for what is left out: layers of multi-token prediction, which
            the config must count.

    Returns:
        The sizes.

    Raises:
        ValueError: The checkpoint is incomplete or of another architecture, or `run` exists. The
            message names the tensors that are missing, unknown, or of a wrong shape or dtype.
    """
    theirs = read_json(source / CONFIG)
    config = from_huggingface(theirs)
    stored, extra = without_extra_layers(stored_tensors(source), config, theirs)
    expected = list(tensors(config))
    where = places(expected, stored)
    entries = {name: each.entry for name, each in stored.items()}
    _check(source, _expected_shapes(expected, where, config), entries)
    dtypes = _one_dtype_each(source, expected, where, entries)
    layout = {path: Entry(shape, dtypes[path]) for path, shape in leaf_shapes(config).items()}
    by_file = sorted(expected, key=lambda tensor: where[tensor.name].file)
    if extra and note is not None:
        names = " and ".join(f"model.layers.{number}" for number in extra)
        note(f"{names}, of multi-token prediction, is left out; the model does not use it")
    with (
        safetensors_io.folder_at_once(run) as draft,
        safetensors_io.Writer(draft / PARAMS, layout) as writer,
    ):
        kept = {**theirs, **{key: 0 for key in EXTRA_LAYERS if extra and key in theirs}}
        both = {"model": dataclasses.asdict(config), "huggingface": kept}
        _write_json(draft / CONFIG, both)
        for file, group in itertools.groupby(progress(by_file), key=lambda t: where[t.name].file):
            with safetensors.safe_open(file, framework="np") as shard:
                for tensor in group:
                    array = _read(shard, where[tensor.name])
                    writer.write(tensor.path, tensor.index, tensor.transposed(array))
    return config


def export_checkpoint(
    run: Path, target: Path, progress: Progress = iter, shard_bytes: int = SHARD_BYTES
) -> None:
    """Convert a run's parameters to a checkpoint that `transformers` and others load.

    Args:
        run: A run's folder, as `import_checkpoint` makes it.
        target: The folder to make.
        progress: Wraps the iteration over tensors, to show how far it has come.
        shard_bytes: Largest size of a file, unless a single tensor is larger.

    Raises:
        ValueError: The run is incomplete, or `target` exists.
    """
    config, like = read_config(run)
    entries = safetensors_io.entries(run / PARAMS)
    _check(run, leaf_shapes(config), entries)
    ordered = sorted(tensors(config), key=by_layer)
    files = _files_to_write(ordered, entries, shard_bytes)
    most = DTYPES[entries[EMBEDDING].dtype].name
    with safetensors_io.folder_at_once(target) as draft:
        _write_json(draft / CONFIG, to_huggingface(config, most, like))
        with safetensors.safe_open(run / PARAMS, framework="np") as params:
            for file, group in itertools.groupby(progress(ordered), key=lambda t: files[t.name]):
                # Passed as an argument, so it is freed before the next file's tensors are read.
                _write_tensors(draft / file, {t.name: _theirs(params, t) for t in group})
        if len(set(files.values())) > 1:
            size = sum(entry.nbytes for entry in entries.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
            _write_json(draft / INDEX, index)


def read_config(run: Path) -> tuple[MoonlightConfig, dict[str, Any] | None]:
    """The sizes of a run and, if it started from a checkpoint, that checkpoint's own config.

    Raises:
        ValueError: `run` is not the folder of a Moonlight.
    """
    config = read_json(run / CONFIG)
    sizes = config.get("model")
    names = {field.name for field in dataclasses.fields(MoonlightConfig)}
    if not isinstance(sizes, dict) or not sizes.keys() <= names:
        raise ValueError(
            f"{run / CONFIG} has no sizes of a Moonlight; give a run made by import-hf"
        )
    try:
        return MoonlightConfig(**sizes), config.get("huggingface")
    except TypeError as error:  # a size is missing, or is no number
        raise ValueError(f"{run / CONFIG} has no sizes of a Moonlight: {error}") from error


def load(
    run: Path, shardings: optax.Params | None = None
) -> tuple[MoonlightConfig, optax.Params, jax.Array | None]:
    """Sizes, parameters and router biases of a run.

    Args:
        run: A run's folder, as `import_checkpoint` makes it.
        shardings: Of the parameters, from `Moonlight.shardings`; only the slices of this process's
            devices are read. None puts everything on the first device.

    Raises:
        ValueError: `run` is not the folder of a Moonlight.
    """
    config, _ = read_config(run)
    if shardings is not None:
        first = jax.tree.leaves(shardings)[0]
        copies = jax.sharding.NamedSharding(first.mesh, jax.sharding.PartitionSpec())
        shardings = {**shardings, BIAS: copies}
    params = safetensors_io.load(run / PARAMS, shardings)
    return config, params, params.pop(BIAS, None)


def _theirs(params: Any, tensor: Tensor) -> np.ndarray:
    """A tensor as a checkpoint stores it, read from a run's file."""
    ours = params.get_slice(tensor.path)[tensor.index or slice(None)]
    return np.ascontiguousarray(tensor.transposed(ours))


def _write_tensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # transformers refuses a file without this entry.
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(shard: Any, place: Place) -> np.ndarray:
    if not place.part:
        array: np.ndarray = shard.get_tensor(place.name)
        return array
    part: np.ndarray = shard.get_slice(place.name)[place.part]
    return part


def _expected_shapes(
    expected: Iterable[Tensor], where: Mapping[str, Place], config: MoonlightConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors by name, experts stacked where the files stack them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in expected:
        if tensor.name in where and where[tensor.name].part:
            assert tensor.fused is not None
            shapes[tensor.fused.name] = (config.n_routed_experts, *tensor.fused.shape)
        else:
            shapes[tensor.name] = tensor.shape
    return shapes


def _check(
    where: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Entry]
) -> None:
    """Refuse any difference from the expected tensors; one error lists and counts them."""
    wrong = [f"missing    {name} {list(expected[name])}" for name in expected if name not in found]
    wrong += [
        f"unknown    {name} {list(found[name].shape)}" for name in found if name not in expected
    ]
    for name in expected.keys() & found.keys():
        shape, dtype = found[name]
        if shape != expected[name]:
            wrong.append(f"misshapen  {name} {list(shape)}, but must be {list(expected[name])}")
        if dtype not in DTYPES:
            wrong.append(f"dtype      {name} {dtype}, but must be one of {', '.join(DTYPES)}")
    if wrong:
        lines = "\n  ".join(shortened(sorted(wrong)))
        raise ValueError(f"{where} does not hold the tensors of its config:\n  {lines}")


def _one_dtype_each(
    source: Path,
    expected: Iterable[Tensor],
    where: Mapping[str, Place],
    found: Mapping[str, Entry],
) -> dict[str, str]:
    """The dtype of every leaf; all tensors that it stacks must have the same dtype."""
    dtypes: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for tensor in expected:
        name = where[tensor.name].name
        dtypes[tensor.path].setdefault(found[name].dtype, name)
    wrong = [
        " and ".join(f"{name} {dtype}" for dtype, name in names.items())
        for names in dtypes.values()
        if len(names) > 1
    ]
    if wrong:
        lines = "\n  ".join(shortened(sorted(wrong)))
        raise ValueError(f"{source} has tensors of one stack in several dtypes:\n  {lines}")
    return {path: next(iter(names)) for path, names in dtypes.items()}


def _files_to_write(
    ordered: Iterable[Tensor], leaves: Mapping[str, Entry], most: int
) -> dict[str, str]:
    """The file of every tensor, in order, each file at most `most` bytes."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for tensor in ordered:
        size = Entry(tensor.shape, leaves[tensor.path].dtype).nbytes
        if filled and filled + size > most:
            number, filled = number + 1, 0
        numbers[tensor.name] = number
        filled += size
    if number == 1:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{i:05}-of-{number:05}.safetensors" for name, i in numbers.items()}
