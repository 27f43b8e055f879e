"""Tables: dataclasses of strings and numbers in Python, CSV on disk, Markdown for readers."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")
_KINDS = {"str": str, "int": int, "float": float}


def read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a CSV file, none if there is no file; fields are strings or numbers."""
    if not path.exists():
        return []
    parsers = {field.name: _KINDS[str(field.type)] for field in dataclasses.fields(kind)}
    with path.open() as file:
        return [
            kind(**{name: parsers[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


def write(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Save all rows at once: a process that is killed meanwhile leaves the file as it was."""
    draft = path.with_suffix(".draft")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(kind)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))
    draft.replace(path)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table; all columns but the first are right-aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]
