"""The folder of a checkpoint: which tensors it holds, and in which file each of them is."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from optax_muon.errors import shortened
from optax_muon.models import safetensors_io
from optax_muon.models.huggingface.config import CONFIG, EXTRA_LAYERS
from optax_muon.models.huggingface.names import DERIVED, MULTI_TOKEN, Tensor, layer_of
from optax_muon.models.moonlight import MoonlightConfig
from optax_muon.models.safetensors_io import Entry

INDEX = "model.safetensors.index.json"
"""Names the file of every tensor, in a checkpoint of several files."""


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    """The file."""
    entry: Entry
    """Its shape and dtype."""


class Place(NamedTuple):
    """Where the array of a `Tensor` is."""

    file: Path
    """The file."""
    name: str
    """The tensor in it."""
    part: tuple[int | slice, ...]
    """The part of that tensor; empty for all of it."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        ValueError: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must be a JSON object")
    return content


def stored_tensors(source: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, by name; those that are computed from the config left out.

    With an index, a tensor is in the file that its `weight_map` names, whatever other files hold.

    Raises:
        ValueError: There are no files, one is missing or damaged, the index is none, a tensor is
            not in the file that the index names, or without an index two files hold it.
    """
    index = source / INDEX
    found = _mapped(source, index) if index.exists() else _unmapped(source)
    return {name: stored for name, stored in found.items() if not name.endswith(DERIVED)}


def without_extra_layers(
    stored: Mapping[str, Stored], config: MoonlightConfig, theirs: Mapping[str, Any]
) -> tuple[dict[str, Stored], list[int]]:
    """The tensors without the layers of multi-token prediction, and the numbers of those layers.

    They follow the last block, as many as the config says, and serve to train or to draft tokens;
    the model itself does not use them.

    Args:
        stored: By name.
        config: The sizes of the model.
        theirs: The config of the checkpoint.

    Raises:
        ValueError: There are more of them than the config counts.
    """
    last = config.num_hidden_layers
    counted = next((theirs[key] for key in EXTRA_LAYERS if theirs.get(key)), 0)
    layers = {layer_of(name) for name in stored if name.endswith(f".{MULTI_TOKEN}")}
    extra = sorted(number for number in layers if number is not None and number >= last)
    if extra and extra[-1] >= last + counted:
        raise ValueError(
            f"the checkpoint has model.layers.{extra[-1]}, a layer of multi-token prediction after"
            f" the {last} of num_hidden_layers, and {EXTRA_LAYERS[0]} of {CONFIG} is {counted}; set"
            f" it to {extra[-1] - last + 1}, and the layer is left out"
        )
    return {name: each for name, each in stored.items() if layer_of(name) not in extra}, extra


def places(expected: Iterable[Tensor], stored: Mapping[str, Stored]) -> dict[str, Place]:
    """Where the array of every tensor is, by its name; a missing one is left out.

    An expert's matrix may be a tensor of its own, as in published checkpoints, or a part of the
    tensor that transformers 5 stacks the experts of a layer in.
    """
    found = {}
    for tensor in expected:
        if tensor.fused and tensor.fused.name in stored:
            place = Place(stored[tensor.fused.name].file, tensor.fused.name, tensor.fused.part)
        elif tensor.name in stored:
            place = Place(stored[tensor.name].file, tensor.name, ())
        else:
            continue
        found[tensor.name] = place
    return found


def _unmapped(source: Path) -> dict[str, Stored]:
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} holds no safetensors files")
    holders: dict[str, list[Stored]] = collections.defaultdict(list)
    for file in files:
        for name, entry in safetensors_io.entries(file).items():
            holders[name].append(Stored(file, entry))
    twice = {name: each for name, each in sorted(holders.items()) if len(each) > 1}
    if twice:
        lines = shortened(
            [f"{name} in {' and '.join(s.file.name for s in each)}" for name, each in twice.items()]
        )
        raise ValueError(
            f"{source} holds tensors in several files; delete the files that do not belong to it,"
            f" or add {INDEX}, whose weight_map names the right ones:\n  " + "\n  ".join(lines)
        )
    return {name: each[0] for name, each in holders.items()}


def _mapped(source: Path, index: Path) -> dict[str, Stored]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(file, str) for file in mapped.values()):
        raise ValueError(
            f"{index} has no weight_map from the names of tensors to files; give the index that"
            " came with the checkpoint, or delete it, so that all safetensors files are read"
        )
    files = {name: source / name for name in sorted(set(mapped.values()))}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(shortened(missing))}, which its index names")
    entries = {name: safetensors_io.entries(file) for name, file in files.items()}
    absent = [f"{name} in {file}" for name, file in mapped.items() if name not in entries[file]]
    if absent:
        lines = "\n  ".join(shortened(sorted(absent)))
        raise ValueError(f"{index} names files that do not hold the tensors:\n  {lines}")
    return {name: Stored(files[file], entries[file][name]) for name, file in mapped.items()}
