"""Parameters in one safetensors file, written and read in pieces.

A leaf of a scanned model stacks what a checkpoint keeps in hundreds of tensors, up to ten gigabytes
of them. So the file is laid out first, from shapes alone, and each piece is written to its place; a
reader takes only the slices that its devices hold. The format is that of the `safetensors` library:
eight bytes for the length of a JSON header, the header, the arrays.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""The dtypes that parameters may have, by their names in the format."""


class Entry(NamedTuple):
    """An array as the header describes it."""

    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """Name of its dtype in the format: a key of `DTYPES`, or one that no parameter may have."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Writer:
    """A safetensors file of these entries, its arrays written in any order and in parts."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        header, end = {}, 0
        for name, entry in entries.items():
            start, end = end, end + entry.nbytes
            header[name] = {**entry._asdict(), "data_offsets": [start, end]}
        text = json.dumps(header)
        text += " " * (-len(text) % 8)  # aligns the arrays, as the format asks
        self._entries = dict(entries)
        self._starts = {
            name: 8 + len(text) + row["data_offsets"][0] for name, row in header.items()
        }
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text.encode())
        self._file.truncate(8 + len(text) + end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, name: str, index: tuple[int, ...], array: np.ndarray) -> None:
        """Write the part of an array at `index` along its leading axes."""
        entry, axes = self._entries[name], len(index)
        assert (array.shape, array.dtype) == (entry.shape[axes:], DTYPES[entry.dtype]), name
        place = int(np.ravel_multi_index(index, entry.shape[:axes])) if index else 0
        self._file.seek(self._starts[name] + place * array.nbytes)
        self._file.write(array.tobytes())


def entries(path: Path) -> dict[str, Entry]:
    """The arrays of a safetensors file, from its header alone."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {
            name: Entry(tuple(array.get_shape()), array.get_dtype())
            for name, array in slices.items()
        }


def load(path: Path, shardings: Any = None) -> dict[str, Any]:
    """Read a file as a tree; its names are paths, such as `layers/attn/kernel`.

    Args:
        path: The file.
        shardings: A tree of shardings of the same structure; only the slices of this process's
            devices are read. None puts everything on the first device.

    Raises:
        ValueError: The file is missing or not a safetensors file.
    """
    tree: dict[str, Any] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            *modules, leaf = name.split("/")
            node, sharding = tree, shardings
            for module in modules:
                node = node.setdefault(module, {})
                sharding = sharding and sharding[module]
            node[leaf] = _array(file.get_slice(name), sharding and sharding[leaf])
    return tree


@contextlib.contextmanager
def folder_at_once(target: Path) -> Iterator[Path]:
    """A temporary folder to write into: renamed to `target` at the end, deleted on an error.

    Raises:
        ValueError: `target` exists, or cannot be made.
    """
    if target.exists():
        raise ValueError(f"{target} exists; give a folder that does not")
    missing = [folder for folder in target.parents if not folder.exists()]
    with contextlib.ExitStack() as undo:
        for folder in reversed(missing):  # undone from the innermost outwards
            undo.callback(_delete_empty, folder)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise ValueError(f"cannot make {target}: {error.strerror}") from error
        undo.callback(shutil.rmtree, draft, ignore_errors=True)
        yield draft
        draft.chmod(0o755)  # mkdtemp allows the owner only
        draft.rename(target)


def _delete_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty, or was never made
        folder.rmdir()


def _opened(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _array(array: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array[:])
    return jax.make_array_from_callback(
        tuple(array.get_shape()), sharding, lambda index: array[index]
    )
