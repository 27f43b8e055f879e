"""In which order an error offers the readings of an ambiguous parameter: the likeliest first.

Nothing is decided here. What the tree shows is not enough to decide, but often enough to put the
right line first, where a user finds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from optax_muon.matrices.evidence import Tree
from optax_muon.matrices.rules import Interpretation, is_stacked_name
from optax_muon.matrices.views import View

# Experts, groups and layers are fewer than the rows of their matrices, heads are thinner than the
# model, and hidden layers seldom are: factors that tell `[E, d, f]` from `[n, d, h]`.
_FEWER, _HALF = 4, 2
_ATTENTION = re.compile(r"att(n|ention)")


def by_likelihood(
    readings: Sequence[Interpretation], path: str, tree: Tree
) -> tuple[Interpretation, ...]:
    """Sort the readings of a parameter, the likeliest first; equals keep their order."""
    return tuple(sorted(readings, key=lambda reading: _rank(reading.view, path, tree)))


def _rank(view: View | None, path: str, tree: Tree) -> tuple[int, int]:
    """How unlikely a reading is: by the layers that it counts, and by its sides."""
    shape, widths = tree.shapes[path], _widths(path, tree)
    if view is None:
        return (0, 0) if _is_no_matrix(path, tree) else (9, 0)
    bound = view.bind(shape)
    batch = [shape[a] for a in bound.batch_axes if shape[a] > 1]
    rows, cols = ([shape[a] for a in side] for side in (bound.row_axes, bound.col_axes))
    layers = tree.norm_lengths(path) - widths
    misses = int(bool(layers & set(shape)) and not layers & set(batch))
    apart = [n for n in batch if n not in layers]
    attention = _ATTENTION.search(tree.plain[path].role) is not None
    return misses, _rank_of_sides(rows, cols, apart, widths, heads=attention)


def _rank_of_sides(
    rows: list[int], cols: list[int], batch: list[int], widths: frozenset[int], *, heads: bool
) -> int:
    single = [side[0] for side in (rows, cols) if len(side) == 1]
    wide = [n for n in single if n in widths]
    apart = len(single) == 2 and len(batch) == 1 and _FEWER * batch[0] <= min(single)
    # One head of an attention is no matrix of its own.
    if apart and not heads and (not wide or _HALF * min(single) >= max(wide)):
        return 0
    return (1 if not batch else 2) if wide else (3 if not batch else 4)


def _widths(path: str, tree: Tree) -> frozenset[int]:
    """The widths around; of those that norms may show, the embedding's, if it has any."""
    widths = tree.widths(path)
    return widths & tree.embedding_widths or widths or tree.embedding_widths


def _is_no_matrix(path: str, tree: Tree) -> bool:
    """Whether two axes look like those of a head, or of vectors of stacked layers."""
    shape = [n for n in tree.shapes[path] if n > 1]
    if len(shape) != 2:
        return False
    if set(shape) & set(tree.vocabularies):
        return True
    stacked = any(map(is_stacked_name, path.split("/")[:-1])) and not tree.plain[path].indexed
    wide = set(shape) & _widths(path, tree)
    return stacked and bool(wide) and _FEWER * min(shape) <= max(wide)
