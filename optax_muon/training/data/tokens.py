r"""Text to tokens, once and for all: the folder that `optax-muon tokenize` writes.

    TOKENS/train.npy         tokens of the smallest unsigned dtype, one document after the other
    TOKENS/held_out.npy      the same, of other documents
    TOKENS/tokens.json       what was read, and how many tokens there are
    TOKENS/tokenizer.json    the tokenizer (`tokenizer.py`)

Until it is complete, the folder is `.TOKENS.partial`. Documents are encoded in batches, and after
each one `progress.json` says how many bytes of the two files count: what a killed process has
written beyond is cut off, and the next process goes on with the next document.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from optax_muon.errors import UsageError
from optax_muon.training.data import tokenizer as tokenizers
from optax_muon.training.data.corpus import (
    DESCRIPTION,
    FEWEST_FILES,
    HELD_OUT,
    PARTS,
    how_held_out,
    is_held_out,
)
from optax_muon.training.data.documents import are_few, documents
from optax_muon.training.data.tokenizer import Subwords

PROGRESS = "progress.json"
BATCH = 2**22
"""Characters that are encoded before they are saved; a second or two."""
PIECE = 2**20
"""Characters that are encoded at once; a longer document is cut at the end of a line."""


class Encoded(NamedTuple):
    """How far it has come."""

    done: float
    """Fraction of all files that is read, by their sizes."""
    documents: int
    """Documents so far."""
    tokens: int
    """Tokens so far."""


@dataclasses.dataclass(frozen=True)
class TokenizeJob:
    """Files to encode, and where to."""

    files: Sequence[Path]
    """The files, in order."""
    field: str
    """The key of JSONL, or the column of parquet, that holds the text."""
    out: Path
    """The folder to make."""
    tokenizer: str
    """What the tokenizer is, so that a job is continued with the same one only."""
    make: Callable[[Iterator[str]], Subwords]
    """Makes the tokenizer, from the training texts if it needs them."""

    @property
    def draft(self) -> Path:
        """The folder until it is complete."""
        return self.out.parent / f".{self.out.name}.partial"

    def run(self) -> Iterator[Encoded]:
        """Encode all files, or what is left of them.

        Yields:
            How far it has come, after each batch.

        Raises:
            UsageError: The folder exists, was begun with something else, or a file is not what its
                name says.
        """
        if self.out.exists():
            raise UsageError(f"{self.out} exists; give --out a folder that does not")
        state = self._begin()
        encoder = tokenizers.load(self.draft)
        dtype = np.min_scalar_type(encoder.vocab_size - 1)
        with (
            _TokenFile(self.draft / "train.npy", dtype, state["train"]) as train,
            _TokenFile(self.draft / "held_out.npy", dtype, state["held_out"]) as held_out,
        ):
            parts = dict(zip(PARTS, (train, held_out), strict=True))
            for batch in self._batches(state):
                _append(encoder, batch, parts, state["few"])
                state["documents"] += len(batch)
                state |= {"file": batch[-1].file, "place": batch[-1].place}
                state |= {name: part.flush() for name, part in parts.items()}
                self._save(state)
                tokens = train.count + held_out.count
                yield Encoded(self._done(batch[-1]), state["documents"], tokens)
        self._finish(encoder, state)

    def _begin(self) -> dict[str, Any]:
        """The state to go on from."""
        asked = {
            "files": [[str(path), path.stat().st_size] for path in self.files],
            "field": self.field,
            "tokenizer": self.tokenizer,
        }
        if (self.draft / PROGRESS).exists():
            saved: dict[str, Any] = json.loads((self.draft / PROGRESS).read_text(encoding="utf-8"))
            if saved["asked"] != asked:
                raise UsageError(
                    f"{self.draft} was begun with other files or another tokenizer; delete it, or "
                    "give another --out"
                )
            return saved
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir(parents=True)
        few = are_few(self.files, self.field, FEWEST_FILES)
        self.make(self._training_texts(few)).save(self.draft)
        state: dict[str, Any] = {"asked": asked, "few": few, "documents": 0, "file": 0, "place": 0}
        state |= dict.fromkeys(PARTS, 0)
        self._save(state)
        return state

    def _training_texts(self, few: bool) -> Iterator[str]:
        for path in self.files:
            for document in documents(path, self.field):
                yield from (text for part, text in _split(document.text, few) if part == "train")

    def _batches(self, state: dict[str, Any]) -> Iterator[list[_Placed]]:
        """The documents that are left, `BATCH` characters at a time."""
        batch: list[_Placed] = []
        size = 0
        for file, path in enumerate(self.files[state["file"] :], state["file"]):
            skipped = state["place"] if file == state["file"] else 0
            left = itertools.islice(documents(path, self.field), skipped, None)
            for place, document in enumerate(left, skipped + 1):
                batch.append(_Placed(document.text, document.done, file, place))
                size += len(document.text)
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _done(self, last: _Placed) -> float:
        sizes = [path.stat().st_size for path in self.files]
        return (sum(sizes[: last.file]) + last.done * sizes[last.file]) / max(sum(sizes), 1)

    def _save(self, state: dict[str, Any]) -> None:
        fresh = self.draft / f"{PROGRESS}.draft"
        fresh.write_text(json.dumps(state), encoding="utf-8")
        fresh.replace(self.draft / PROGRESS)

    def _finish(self, encoder: Subwords, state: dict[str, Any]) -> None:
        description = {
            **state["asked"],
            "documents": state["documents"],
            "vocab_size": encoder.vocab_size,
            "how": how_held_out(state["few"]),
            **{part: state[part] for part in PARTS},
        }
        (self.draft / DESCRIPTION).write_text(
            json.dumps(description, indent=2) + "\n", encoding="utf-8"
        )
        self.draft.rename(self.out)
        (self.out / PROGRESS).unlink(missing_ok=True)


class _Placed(NamedTuple):
    """A document and where it is."""

    text: str
    done: float
    file: int
    place: int
    """Documents of its file up to this one."""


def _split(text: str, few: bool) -> list[tuple[str, str]]:
    """The parts that a document belongs to, and its text there."""
    if few:
        cut = round(len(text) * (1 - HELD_OUT))
        return [("train", text[:cut]), ("held_out", text[cut:])]
    return [("held_out" if is_held_out(text) else "train", text)]


def _pieces(text: str) -> list[str]:
    """A long document in pieces that end with a line."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1
        cut = cut if cut > start else start + PIECE
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _append(
    encoder: Subwords, batch: Sequence[_Placed], parts: dict[str, _TokenFile], few: bool
) -> None:
    """Encode documents and add them to their parts."""
    where = [(part, _pieces(text)) for each in batch for part, text in _split(each.text, few)]
    encoded = iter(encoder.encode_all([piece for _, pieces in where for piece in pieces]))
    end = encoder.end if encoder.end != encoder.begin else ()
    for part, pieces in where:
        tokens = itertools.chain.from_iterable(itertools.islice(encoded, len(pieces)))
        parts[part].append([*encoder.begin, *tokens, *end])


class _TokenFile:
    """A `.npy` file that grows; numpy leaves room for the length in its header.

    Args:
        path: The file.
        dtype: Of the tokens.
        count: Tokens that it has; what is beyond is cut off.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int):
        self._path, self._dtype, self.count = path, dtype, count

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._path.open("r+b" if self._path.exists() else "w+b")
        self._write_header()
        self._file.seek(self._file.tell() + self.count * self._dtype.itemsize)
        self._file.truncate()
        return self

    def __exit__(self, *error: object) -> None:
        self._write_header()
        self._file.close()

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens."""
        self._file.write(np.array(tokens, self._dtype).tobytes())
        self.count += len(tokens)

    def flush(self) -> int:
        """Write what is in memory; returns the tokens so far."""
        self._file.flush()
        return self.count

    def _write_header(self) -> None:
        self._file.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.count,),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
