"""Tables of text, in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def terminal_table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal; the first row is the heading, and numbers are on the right."""
    table = Table(title=title, box=box.SIMPLE, collapse_padding=True)
    for column, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if column else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the heading.

    >>> print(markdown_table([["optimizer", "loss"], ["Muon", "1.44"]]))
    | optimizer | loss |
    | --- | --- |
    | Muon | 1.44 |
    """
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
