"""The report of `label`, and the error that lists what is ambiguous."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from optax_muon.matrices.rules import Decision, Interpretation, Kind
from optax_muon.matrices.views import Block, View
from optax_muon.notebook import html_table

_HEADINGS = ("path", "shape", "matrices", "optimizer", "reason")
_TOTALS = ("optimizer", "leaves", "parameters", "share")


@dataclasses.dataclass(frozen=True)
class LabelRow:
    """One parameter."""

    path: str
    """Its path."""
    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """Name of its dtype."""
    blocks: tuple[Block, ...]
    """The stacks of matrices it is read as; none with AdamW."""
    reason: str
    """Why."""
    view: View | None = None
    """How it is read; None with AdamW."""
    interpretations: tuple[Interpretation, ...] = ()
    """If it is ambiguous, every way to read it."""
    kind: Kind = Kind.ORDINARY
    """What it is."""

    @property
    def optimizer(self) -> str:
        """`muon`, `adamw` (the fallback, whichever it is), `none`, or `open` if it is ambiguous.

        Integers, keys and functions have none: they have no state and do not change.
        """
        if self.interpretations:
            return "open"
        if self.kind is Kind.NOT_FLOATING:
            return "none"
        return "muon" if self.blocks else "adamw"

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as it is printed."""
        matrices = " + ".join(map(_spell, self.blocks)) or "-"
        if self.interpretations:
            matrices = f"{self.interpretations[0].words}?"
        return self.path, str(list(self.shape)), matrices, self.optimizer, self.reason


@dataclasses.dataclass(frozen=True)
class Labels:
    """How a tree of parameters is shared out; prints as a table. Made by `label`."""

    rows: tuple[LabelRow, ...]
    """One row per parameter, in the tree's order."""

    @property
    def views(self) -> dict[str, View | None]:
        """The decision as data, to be passed back as `views=`; open rows are left out."""
        return {row.path: row.view for row in self.rows if not row.interpretations}

    def total(self, optimizer: str) -> tuple[int, int]:
        """Leaves and parameters of `muon`, `adamw`, `none` or `open`."""
        sizes = [row.size for row in self.rows if row.optimizer == optimizer]
        return len(sizes), sum(sizes)

    def __str__(self) -> str:
        """The table and its totals."""
        table = _align([_HEADINGS, *(row.cells for row in self.rows)])
        totals = _align([_TOTALS, *map(self._summary, self._groups)])
        return "\n".join([*table, "", *totals])

    def _repr_html_(self) -> str:
        """The table and its totals, for notebooks."""
        return html_table([_HEADINGS, *(row.cells for row in self.rows)]) + html_table(
            [_TOTALS, *map(self._summary, self._groups)]
        )

    @property
    def _groups(self) -> tuple[str, ...]:
        return ("muon", "adamw", *(("open",) if self.total("open")[0] else ()))

    def _summary(self, optimizer: str) -> tuple[str, ...]:
        leaves, size = self.total(optimizer)
        share = size / max(1, sum(self.total(group)[1] for group in self._groups))
        return optimizer, f"{leaves:,}", f"{size:,}", f"{share:.1%}"


def ambiguity(decisions: Mapping[str, Decision], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The error for a tree: every ambiguous parameter by group, and lines that settle each group.

    Args:
        decisions: path to decision.
        shapes: path to shape.
    """
    open_paths = [path for path, decision in decisions.items() if decision.interpretations]
    groups: dict[tuple[str, int, tuple[str, ...]], list[str]] = {}
    for path in open_paths:
        codes = tuple(one.code for one in decisions[path].interpretations)
        groups.setdefault((_pattern(path), len(shapes[path]), codes), []).append(path)
    first = decisions[open_paths[0]].interpretations
    ways = " or ".join(
        f"{one.words}, {one.code}" if first[0].words == first[1].words else one.words
        for one in first[:2]
    )
    lines = [f"{open_paths[0]} of shape {shapes[open_paths[0]]} may be {ways}."]
    block: list[str] = []
    for paths in groups.values():
        decision = decisions[paths[0]]
        counted = (
            "1 ambiguous parameter" if len(paths) == 1 else f"{len(paths)} ambiguous parameters"
        )
        lines.append(f"{counted}: {decision.reason}")
        lines += [f"  {path!r} {shapes[path]}" for path in paths]
        keys = _keys(paths, decisions)
        for number, one in enumerate(decision.interpretations):
            mark = "# " if number else ""
            block += [f"    {mark}{key!r}: {one.code},  # {one.words}" for key in keys]
    settle = "Pass views with one line for each group, or write your own:"
    return "\n".join([*lines, settle, "views={", *block, "}"])


def _pattern(path: str) -> str:
    """The path with a star for every number."""
    return re.sub(r"\d+", "*", path)


def _keys(paths: Sequence[str], decisions: Mapping[str, Decision]) -> list[str]:
    """A glob that fits just these paths, or the paths themselves."""
    if len(paths) == 1:
        return [paths[0]]
    pattern = _pattern(paths[0])
    shape = re.compile(re.escape(pattern).replace(r"\*", ".*"))
    return (
        [pattern]
        if sum(bool(shape.fullmatch(path)) for path in decisions) == len(paths)
        else list(paths)
    )


def _spell(block: Block) -> str:
    matrix = f"{block.rows} x {block.cols}"
    return matrix if block.batch == 1 else f"{block.batch} x ({matrix})"


def _align(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (zip(line, widths, strict=True) for line in lines)
    return ["  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in padded]
