"""Output heads that their names do not show: they write a vocabulary, or what nobody reads.

A kernel outside all blocks that maps the model's width onto the rows of an embedding is a head. So
is a last layer, `Dense_0` of a ResNet or `layers/8` of a sequence: nothing in the tree reads its
outputs, though something writes its inputs. Where that is not certain, the parameter is ambiguous.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping

from optax_muon.matrices.evidence import Tree, module_of
from optax_muon.matrices.rules import Decision, Interpretation, Kind, ParamInfo
from optax_muon.matrices.views import BoundView, View

# Names of a layer that may stand anywhere, so in the last place too.
_ANYWHERE = re.compile(
    r"\w*dense\w*|\w*linear\w*|fc\w*|layers?|\w*conv\w*|affine|proj\w*|lin\w*|kernel|w|weight|"
    r"out\w*|\w*_out(put)?|final\w*|last\w*|pred\w*|\w*class\w*|\w*logit\w*|to_\w+|decoder|net|mlp|seq\w*|"
    r"sequential|model|policy\w*|actor\w*|critic\w*|q\w*_values?"
)
_RECURRENT = r"\w*lstm\w*|\w*gru\w*|\w*rnn\w*|\w*cell\w*"
# A matrix inside a norm is that of its conditioning.
_INNER = re.compile(
    r"(.*/)?(\w*att(n|ention)\w*|\w*mlp\w*|\w*ffn?w?|\w*feed_?forward\w*|\w*modulation\w*"
    rf"|{_RECURRENT}|\w*ada_?ln\w*|\w*film\w*|\w*mixer\w*|\w*block\w*|\w*norm\w*)(/.*)?"
)
_CELL = re.compile(rf"(.*/)?({_RECURRENT})(/.*)?")
# A fused or conditioning layer writes a few times its own width.
_FUSED_AT_MOST = 9


def find_heads(decisions: dict[str, Decision], tree: Tree) -> dict[str, Decision]:
    """Decide again the matrices that may be output heads."""
    bound = {
        path: decision.view.bind(tree.shapes[path])
        for path, decision in decisions.items()
        if decision.view is not None
    }
    flow = _Flow(bound, decisions, tree)
    changed = (
        (path, _decide(tree.info(path), bound[path], decisions[path], tree, flow))
        for path in bound
        if not tree.inside(path) or tree.is_last(path)
    )
    return decisions | dict(changed)


def _decide(
    info: ParamInfo, bound: BoundView, decision: Decision, tree: Tree, flow: _Flow
) -> Decision:
    if len(info.long_axes) == 2 and not bound.batch_axes:
        vocabulary = _vocabulary(info, tree)
        if vocabulary is not None and (
            not flow.is_read(info.path, bound) or len(set(info.own)) == 1
        ):
            return vocabulary
    if not _may_be_last(info, tree, flow):
        return decision
    fan_in, fan_out = (_size(bound, axes) for axes in (bound.row_axes, bound.col_axes))
    if flow.is_fed_back(fan_in, fan_out):
        return _either(info, bound, "a layer that only recurrent cells read may be the output head")
    if flow.is_read(info.path, bound) or flow.is_alone or not flow.may_be_fed(info.path, bound):
        return decision
    doubt = _doubt(info, bound, tree, flow)
    if doubt:
        return _either(info, bound, doubt)
    return _head(f"nothing reads its {fan_out} outputs")


def _may_be_last(info: ParamInfo, tree: Tree, flow: _Flow) -> bool:
    """Whether its name and its place allow it to be the last layer of a model."""
    last = tree.is_last(info.path) and not tree.partial
    if _is_inner(info, tree):
        return last and not flow.has_head
    # Beside repeated blocks, a layer at the root may be the last, whatever its name.
    at_root = len(info.role.split("/")) - tree.common <= 2 and not tree.partial
    return _is_generic(info, tree) or last or (at_root and flow.has_blocks)


def _doubt(info: ParamInfo, bound: BoundView, tree: Tree, flow: _Flow) -> str:
    """Why a layer that nothing reads may not be the head; empty if nothing speaks against it."""
    fan_in, fan_out = (_size(bound, axes) for axes in (bound.row_axes, bound.col_axes))
    fused = fan_out % fan_in == 0 and fan_out // fan_in < _FUSED_AT_MOST
    fed = flow.is_fed(info.path, bound)
    placed = _is_generic(info, tree) and not _is_inner(info, tree) and not tree.inside(info.path)
    if tree.partial or fused or not fed or not placed:
        return "a layer that nothing reads may be the output head"
    if flow.has_other_writers(info.path, fan_out):
        return "layers apart write what nothing reads"
    return ""


def _is_generic(info: ParamInfo, tree: Tree) -> bool:
    """Whether its name says nothing, or it is one of layers in a row: `hidden0`, `hidden1`."""
    home = module_of(info.path).rpartition("/")[0]
    named = _ANYWHERE.fullmatch(info.name) is not None
    return named or tree.layers[home, info.series] > 1


def _vocabulary(info: ParamInfo, tree: Tree) -> Decision | None:
    """A head by its shape: the width of an embedding onto its rows."""
    for rows, tables in tree.vocabularies.items():
        widths = {tree.info(path).own[1] for path in tables}
        if sorted(info.own) not in ([sorted((rows, width)) for width in widths]):
            continue
        if rows not in widths:
            return _head(f"the rows of {tables[0]}")
        beside = {module_of(path).rpartition("/")[0] for path in tables}
        generic = _ANYWHERE.fullmatch(info.name) and not _is_inner(info, tree)
        if module_of(info.path).rpartition("/")[0] in beside and generic:
            return _head("beside an embedding of its shape")
    return None


def _is_inner(info: ParamInfo, tree: Tree) -> bool:
    """Whether its module stands inside a model, which the only module of a tree does not."""
    role = info.series.split("/")[tree.common :]
    if role[0] == "mlp" and len(role) > 2:
        # `mlp` with a norm and one layer, outside all others, is a model's last layer.
        top = "/".join(info.path.split("/")[: 1 + tree.common])
        kernels = (path for path in tree.below(top) if len(tree.info(path).long_axes) > 1)
        return len(list(itertools.islice(kernels, 2))) > 1
    return _INNER.fullmatch("/".join(role)) is not None


def _head(why: str) -> Decision:
    return Decision(None, f"output head: {why}", kind=Kind.HEAD)


def _either(info: ParamInfo, bound: BoundView, reason: str) -> Decision:
    view = View(bound.row_axes, bound.col_axes)
    offered = (
        Interpretation.of(view, info.shape),
        Interpretation.of(None, info.shape, "the output head"),
    )
    return Decision(None, reason, offered)


class _Flow:
    """Which lengths are read and written, and by how many parameters."""

    def __init__(
        self, bounds: Mapping[str, BoundView], decisions: Mapping[str, Decision], tree: Tree
    ) -> None:
        self.bounds = bounds
        self.readers: collections.Counter[int] = collections.Counter()
        self.writers: collections.Counter[int] = collections.Counter()
        for path, shape in tree.shapes.items():
            bound = bounds.get(path)
            if bound is not None:
                self.readers.update(_lengths(bound, bound.row_axes))
                self.writers.update(_lengths(bound, bound.col_axes))
            elif len(long := tree.info(path).long_axes) == 1 and len(shape) > 1:
                # A kernel onto a single output reads its width.
                self.readers[shape[long[0]]] += 1
            elif len(long) == 2 and decisions[path].kind is Kind.HEAD:
                self.readers[shape[long[1 if tree.plain[path].out_first else 0]]] += 1
            elif len(long) == 2:
                self.writers[shape[long[1]]] += 1
        for width in tree.all_widths():
            self.readers[width] += 1
            self.writers[width] += 1
        self.has_head = any(decision.kind is Kind.HEAD for decision in decisions.values())
        self.has_blocks = any(count > 1 for count in tree.repeats.values())
        self.channels = {
            size
            for b in bounds.values()
            if len(b.row_axes) > 2 and (size := _size(b, b.col_axes)) > 1
        }
        # Lengths of ambiguous parameters, which may read or write them.
        self.undecided = {
            length
            for path, decision in decisions.items()
            if decision.interpretations
            for length in tree.shapes[path]
        }
        self.homes: dict[int, set[str]] = collections.defaultdict(set)
        for path, bound in bounds.items():
            self.homes[_size(bound, bound.col_axes)].add(module_of(path).rpartition("/")[0])
        cells = [bound for path, bound in bounds.items() if _CELL.fullmatch(tree.plain[path].role)]
        self.cells_read = collections.Counter(n for b in cells for n in _lengths(b, b.row_axes))
        self.cells_write = {n for b in cells for n in _lengths(b, b.col_axes)}
        # Dense kernels of inputs that nothing writes: a flattened picture.
        self.orphans = {
            _size(b, b.row_axes)
            for b in bounds.values()
            if len(b.row_axes) == 1 and not self.writers[_size(b, b.row_axes)]
        }

    def is_read(self, path: str, bound: BoundView) -> bool:
        """Whether another parameter reads what this one writes."""
        own = set(_lengths(bound, bound.row_axes))
        lengths = set(_lengths(bound, bound.col_axes))
        if lengths & own or any(self.readers[length] - (length in own) > 0 for length in lengths):
            return True
        out = _size(bound, bound.col_axes)
        spatial = len(bound.shape) > 2
        return spatial and any(orphan > out and orphan % out == 0 for orphan in self.orphans)

    def has_other_writers(self, path: str, length: int) -> bool:
        """Whether a parameter of another module writes outputs of a length, to be combined."""
        home = module_of(path).rpartition("/")[0]
        return any(other != home for other in self.homes.get(length, ()))

    def is_fed_back(self, fan_in: int, fan_out: int) -> bool:
        """Whether only recurrent cells read what is made of their outputs, as of a prediction."""
        read, by_cells = self.readers[fan_out], self.cells_read[fan_out]
        return (
            fan_in != fan_out
            and fan_in in self.cells_write
            and fan_out not in self.cells_write
            and 0 < read == by_cells
        )

    @property
    def is_alone(self) -> bool:
        """Whether a tree has one matrix, of which nothing can be said."""
        return len(self.bounds) < 2 and not self.undecided

    def may_be_fed(self, path: str, bound: BoundView) -> bool:
        """Whether another parameter writes what this one reads, or an ambiguous one may."""
        lengths = set(_lengths(bound, bound.row_axes))
        return bool(self.undecided & lengths) or self.is_fed(path, bound)

    def is_fed(self, path: str, bound: BoundView) -> bool:
        """Whether another parameter writes what this one reads, or it flattens a picture."""
        own = set(_lengths(bound, bound.col_axes))
        lengths = set(_lengths(bound, bound.row_axes))
        if any(self.writers[length] - (length in own) > 0 for length in lengths):
            return True
        # A dense layer on a flattened picture reads some pixels of every channel.
        flat = len(bound.shape) == 2 and _size(bound, bound.row_axes)
        return bool(flat) and any(flat > n and flat % n == 0 for n in self.channels)


def _lengths(bound: BoundView, axes: tuple[int, ...]) -> Iterator[int]:
    if len(axes) > 2:
        # Of a convolution, the channels in, which stand beside the channels out.
        axes = tuple(axis for axis in axes if abs(axis - bound.col_axes[0]) == 1) or axes
    yield from dict.fromkeys([*(bound.shape[axis] for axis in axes), _size(bound, axes)])


def _size(bound: BoundView, axes: tuple[int, ...]) -> int:
    return math.prod(bound.shape[axis] for axis in axes)
