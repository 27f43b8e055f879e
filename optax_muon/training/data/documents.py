"""The documents of files: text, a document each; JSONL and parquet, a document a row."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from optax_muon.errors import UsageError
from optax_muon.extras import require_extra


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and how far into its file it ends."""

    text: str
    """The text."""
    done: float
    """Fraction of the file that has been read."""


def documents(path: Path, field: str) -> Iterator[Document]:
    """The documents of a file, in order.

    Args:
        path: `.jsonl` is a line of JSON per document, `.parquet` a row; anything else is one
            document of UTF-8. A text file must fit in memory, the others are read bit by bit.
        field: The key, or column, that holds the text.

    Raises:
        UsageError: The file is not what its name says, or a row has no such text.
        MissingExtraError: A parquet file is read without pyarrow.
    """
    readers = {".jsonl": _lines, ".parquet": _rows}
    if reader := readers.get(path.suffix):
        yield from reader(path, field)
        return
    try:
        yield Document(path.read_bytes().decode(), 1.0)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from error


def are_few(files: Sequence[Path], field: str, fewest: int) -> bool:
    """Whether files have less than so many documents; reads no more than it must."""
    found = (document for path in files for document in documents(path, field))
    return len(files) < fewest and len(list(itertools.islice(found, fewest))) < fewest


def whole_characters(text: str) -> str:
    r"""A text of JSON, which can spell half a character that has no UTF-8, with `?` in its place.

    >>> whole_characters(json.loads('"n\\u00e9 \\ud800"'))
    'né ?'
    """
    return text.encode(errors="replace").decode()


def _lines(path: Path, field: str) -> Iterator[Document]:
    size, read = max(path.stat().st_size, 1), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            read += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {error}") from error
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise UsageError(f'{path}, line {number} has no text "{field}"; --field names it')
            yield Document(whole_characters(text), read / size)


def _rows(path: Path, field: str) -> Iterator[Document]:
    require_extra("parquet", str(path))
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    with table:
        if field not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise UsageError(f"{path} has no column {field!r}; --field takes one of {names}")
        number, rows = 0, max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(columns=[field], batch_size=1024):
            for text in batch.column(0).to_pylist():
                number += 1
                if not isinstance(text, str):
                    raise UsageError(f"{path}, row {number} has no text in {field!r}")
                yield Document(text, number / rows)
