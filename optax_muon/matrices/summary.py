"""The report of `label`: every parameter, its matrices, its optimizer and why, with totals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from optax_muon.matrices.views import Block

_HEADINGS = ("path", "shape", "matrices", "optimizer", "reason")
_TOTALS = ("optimizer", "leaves", "parameters", "share")


@dataclasses.dataclass(frozen=True)
class Row:
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

    @property
    def optimizer(self) -> str:
        """`muon` or `adamw` (the fallback, whichever it is)."""
        return "muon" if self.blocks else "adamw"

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as it is printed."""
        matrices = " + ".join(map(_spell, self.blocks)) or "-"
        return self.path, str(list(self.shape)), matrices, self.optimizer, self.reason


@dataclasses.dataclass(frozen=True)
class Labels:
    """How a tree of parameters is shared out; prints as a table. Made by `label`."""

    rows: tuple[Row, ...]
    """One row per parameter, in the tree's order."""

    def total(self, optimizer: str) -> tuple[int, int]:
        """Leaves and parameters of `muon` or `adamw`."""
        sizes = [row.size for row in self.rows if row.optimizer == optimizer]
        return len(sizes), sum(sizes)

    def __str__(self) -> str:
        """The table and its totals."""
        table = _align([_HEADINGS, *(row.cells for row in self.rows)])
        totals = _align([_TOTALS, *map(self._summary, ("muon", "adamw"))])
        return "\n".join([*table, "", *totals])

    def _summary(self, optimizer: str) -> tuple[str, ...]:
        leaves, size = self.total(optimizer)
        share = size / max(1, sum(row.size for row in self.rows))
        return optimizer, f"{leaves:,}", f"{size:,}", f"{share:.1%}"


def _spell(block: Block) -> str:
    matrix = f"{block.rows} x {block.cols}"
    return matrix if block.batch == 1 else f"{block.batch} x ({matrix})"


def _align(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (zip(line, widths, strict=True) for line in lines)
    return ["  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in padded]
