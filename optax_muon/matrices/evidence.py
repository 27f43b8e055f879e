"""What a whole tree of parameters shows: stack axes, widths, vocabulary, who reads whose outputs.

A parameter's own name and shape are often not enough: `[32, 32, 128, 4096]` is a stack of layers
along the first or along the second axis. Its siblings tell: all parameters of a scanned module
share the length of the stack at one place, the scale `[4096, 32]` of a norm shows which place that
is, and its other axis is the width of the model. A `Tree` collects this once, in a pass that is
linear in the number of parameters.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

from optax_muon.matrices.rules import ParamInfo, is_stacked_name
from optax_muon.matrices.views import Axes

Mark = tuple[int, int]
"""An axis, counted from the front (>= 0) or from the end (< 0), and its length."""

# Layers are stacked in fewer numbers than they are wide, but for toys: 12 layers of width 8.
LONG_STACK = 2
# Norms of one block, and of some blocks more, that are asked for a stack.
_LOOKED_AT = 8

_NORM = re.compile(
    r"(.*/)?((\w*norm\w*|\w*rms\w*|(\w+_)?(ln|bn)\d*|(ln|bn)_\w+)(/(scale|weight|w|gamma|gain|beta|offset"
    r"|bias|b|shift))?|(\w+_)?gammas?(_\w+)?|\w+/(scale|offset))"
)
_HEAD_NORM = re.compile(
    r"(.*/)?(([qk]|query|key)_?(layer)?_?(norm|ln)\w*|(\w+_)?[qk]_gamma)(/\w+)?"
)
_BIAS = re.compile(r"(.*/)?(\w+_)?(bias|b)")
_VALUE = re.compile(r"kernel|w|weights?|embeddings?")
_EMBEDDING = re.compile(r"(.*/)?(\w*embed\w*|wte|(\w+_)?emb|tok\w*)(/.*)?")
# What has two axes in one layer, by its name.
_TWO_AXES = re.compile(rf"(?!.*(norm|bias|scale))((.*/)?kernel|{_EMBEDDING.pattern})")
_NOT_VOCABULARY = re.compile(r"(.*/)?\w*(pos|segment|type|patch|time|rel|label|class)\w*(/.*)?")
_CONVOLUTION = re.compile(r"conv[^/]*(/(kernel|w|weight)(_lora_[ab])?)?$")
_ATTENTION = re.compile(r"\w*att(n|ention)\w*")


@dataclasses.dataclass(slots=True)
class _Node:
    """A module: what all parameters below it have in common."""

    children: dict[str, _Node] = dataclasses.field(default_factory=dict)
    leaves: list[str] = dataclasses.field(default_factory=list)
    count: int = 0
    rank: int = 0
    common: frozenset[Mark] | None = None
    norms: list[str] = dataclasses.field(default_factory=list)
    vectors: bool = False
    flattest: int = 99


class Tree:
    """The evidence of a tree of parameters.

    Args:
        shapes: path to shape, of every parameter that is visible.
        partial: whether some parameters are hidden by a mask; then nothing follows from absence.
        stacks: stack axes that are known beforehand, by path.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        partial: bool = False,
        stacks: Mapping[str, Axes] | None = None,
    ) -> None:
        self.shapes = shapes
        self._infos: dict[str, ParamInfo] = {}
        self.partial = partial
        self.plain = {path: ParamInfo.of(path, shape) for path, shape in shapes.items()}
        self._root = _Node()
        for path in shapes:
            self._insert(path)
        _summarize(self._root, self.plain)
        self._stacks: dict[str, list[Axes]] = {}
        self._walk(self._root, "", [()], False)
        self._hinted = frozenset(stacks or ())
        self._stacks |= {path: [axes] for path, axes in (stacks or {}).items()}
        self.homes: dict[str, list[str]] = collections.defaultdict(list)
        self.modules: dict[str, list[str]] = collections.defaultdict(list)
        for path in shapes:
            module = module_of(path)
            self.modules[module].append(path)
            self.homes[module.rpartition("/")[0]].append(path)

    def infos(self, path: str) -> list[ParamInfo]:
        """The parameter, once for every set of stack axes that it may have."""
        ways = dict.fromkeys([*self._stacks[path], *self._unexplained(path)])
        return [dataclasses.replace(self.plain[path], stack=axes) for axes in ways]

    def info(self, path: str) -> ParamInfo:
        """The parameter with its likeliest stack axes."""
        if path not in self._infos:
            stack = self._stacks[path][0]
            self._infos[path] = dataclasses.replace(self.plain[path], stack=stack)
        return self._infos[path]

    def settled(self, path: str) -> bool:
        """Whether the stack axes of a parameter are known."""
        return len(self.infos(path)) == 1

    def bias(self, path: str) -> tuple[int, ...] | None:
        """Shape of one layer's bias beside a kernel: `q/bias` of `q/kernel`, `q_bias` of `q`."""
        module = module_of(path)
        beside = [
            p for p in self.modules[module] if p != path and _BIAS.fullmatch(self.plain[p].role)
        ]
        beside += [f"{path}_bias"] if f"{path}_bias" in self.shapes else []
        return self.info(beside[0]).own if len(beside) == 1 else None

    def widths(self, path: str) -> frozenset[int]:
        """Widths of the features around a parameter: those that the nearest norms scale.

        The nearest may be norms of queries and keys, so those of the module around count as well.
        """
        if self.partial:
            # The norms that are left may be those of queries and keys.
            return frozenset()
        node, prefix = self._root, ""
        levels = [self._norm_widths("")]
        for name in path.split("/")[:-1]:
            node = node.children[name]
            prefix = f"{prefix}/{name}" if prefix else name
            if node.norms:
                levels.append(self._norm_widths(prefix))
        # Near norms may all be those of queries and keys; then the embedding has a say.
        shown = self.embedding_widths & set(self.shapes[path])
        return frozenset.union(*levels[-2:]) | shown or self.embedding_widths

    def norm_lengths(self, path: str) -> frozenset[int]:
        """The lengths of all axes of the nearest norms that have several."""
        shapes = (self.shapes[norm] for norm in self._near_norms(path))
        return frozenset(n for shape in shapes if len(shape) > 1 for n in shape if n > 1)

    def has_vector_norm(self, path: str) -> bool:
        """Whether the nearest norms are vectors, so that no layers are stacked around.

        The root has a final norm, which says nothing of the blocks.
        """
        norms = self._near_norms(path, inside=True)
        return bool(norms) and all(len(self.shapes[norm]) == 1 for norm in norms)

    def all_widths(self) -> frozenset[int]:
        """Widths of all features in the tree."""
        return self._norm_widths("") | self.embedding_widths

    @functools.cached_property
    def _table_widths(self) -> frozenset[int]:
        """Widths of embeddings of two axes, before it is known what is stacked."""
        tables = (
            info.shape
            for info in self.plain.values()
            if len(info.shape) == 2
            and _EMBEDDING.fullmatch(info.role)
            and not _NOT_VOCABULARY.fullmatch(info.role)
            and not info.role.endswith(("kernel", "/w"))
        )
        return frozenset(shape[1] for shape in tables)

    @functools.cached_property
    def common(self) -> int:
        """How many names in front all series share: `params`, or a model of one module."""
        roles = [info.series.split("/")[:-1] for info in self.plain.values()] or [[]]
        pairs = zip(min(roles), max(roles), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    @functools.cached_property
    def vocabularies(self) -> dict[int, list[str]]:
        """Length of a vocabulary to the tables that have it as rows."""
        found: dict[int, list[str]] = collections.defaultdict(list)
        for path, info in self.plain.items():
            named = _EMBEDDING.fullmatch(info.role) and not _NOT_VOCABULARY.fullmatch(info.role)
            own = self.info(path)
            # A table under a `kernel` is a projection, unless it is one for one-hot tokens.
            table = not info.role.endswith(("kernel", "/w")) or self._is_unembedded(path)
            if named and table and len(own.own) == 2:
                found[own.own[0]].append(path)
        return found

    def _is_unembedded(self, path: str) -> bool:
        """Whether a kernel `[n, d]`, n > d, and a `[d, n]` in another module are all that knows n.

        A vector of n, the bias of the head, may stand beside them; a norm of n may not.
        """
        shape, home = self.shapes[path], module_of(path).rpartition("/")[0]
        if len(shape) != 2 or shape[0] < shape[1] or self.inside(path):
            return False
        users = self._users[shape[0]]
        kernels = [p for p in users if len(self.shapes[p]) > 1]
        norms = [p for p in users if is_norm(self.plain[p].role)]
        others = [p for p in kernels if p != path and self.shapes[p] == shape[::-1]]
        apart = [p for p in others if not p.startswith(f"{home}/")]
        return len(kernels) == 2 and len(apart) == 1 and not norms

    @functools.cached_property
    def _users(self) -> dict[int, list[str]]:
        """Length of an axis to the parameters that have such an axis."""
        found: dict[int, list[str]] = collections.defaultdict(list)
        for path, shape in self.shapes.items():
            for length in set(shape):
                found[length].append(path)
        return found

    def below(self, module: str) -> Iterable[str]:
        """The parameters below a module."""
        return _paths(self._node(module))

    @functools.cached_property
    def embedding_widths(self) -> frozenset[int]:
        """Widths of the tables with a vocabulary."""
        tables = itertools.chain(*self.vocabularies.values())
        return frozenset(self.info(path).own[1] for path in tables)

    @functools.cached_property
    def repeats(self) -> collections.Counter[tuple[str, tuple[int, ...]]]:
        """In how many modules a series occurs with a shape; layers of one module count once."""
        places = {
            (info.series, info.shape, module_of(path).rpartition("/")[0])
            for path, info in self.plain.items()
        }
        return collections.Counter((series, shape) for series, shape, _ in places)

    @functools.cached_property
    def layers(self) -> collections.Counter[tuple[str, str]]:
        """How many layers of a series a module has."""
        homes = ((module_of(path).rpartition("/")[0], info) for path, info in self.plain.items())
        return collections.Counter((home, info.series) for home, info in homes)

    def inside(self, path: str) -> bool:
        """Whether a parameter lies in a block that is repeated or stacked."""
        info = self.info(path)
        if info.stack or self.repeats[info.series, info.shape] > 1:
            return True
        if not info.indexed:
            return False
        # `layers/3/weight` and `layer3/weight` may be one layer of a sequence, but
        # `layers/3/mlp/weight` is in a block.
        above, _, last = module_of(path).rpartition("/")
        around = above.rpartition("/")[0] if last.isdigit() else above
        return not last[-1:].isdigit() or ParamInfo.of(f"{around}/kernel", ()).indexed

    def is_last(self, path: str) -> bool:
        """Whether all numbers in its path are the last of their rows, and no other is of its shape.

        It is in the last of several blocks, whatever it is called there, or their last layer.
        """
        info = self.info(path)
        if info.stack or self.repeats[info.series, info.shape] > 1:
            return False
        places = [(self._rows[row], number) for row, number in _numbered(path)]
        return any(len(row) > 1 for row, _ in places) and all(n == row[-1] for row, n in places)

    @functools.cached_property
    def _rows(self) -> dict[tuple[str, str], list[int]]:
        """Module and name without a number to the numbers that end it there, in order."""
        found: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
        for path in self.shapes:
            for row, number in _numbered(path):
                found[row].add(number)
        return {row: sorted(numbers) for row, numbers in found.items()}

    def head_norms(self, path: str) -> frozenset[int]:
        """Lengths that norms of queries and keys beside a parameter scale."""
        home = self.homes[module_of(path).rpartition("/")[0]]
        return frozenset(
            max(self.info(p).own, default=1)
            for p in home
            if _HEAD_NORM.fullmatch(self.plain[p].role)
        )

    def peers(self, path: str) -> list[ParamInfo]:
        """The parameters of the modules beside a parameter's own, itself included."""
        home = module_of(path).rpartition("/")[0]
        return [self.info(peer) for peer in self.homes[home]]

    def _unexplained(self, path: str) -> list[Axes]:
        """Stack axes that the nearest norms may show, where one of them has an axis too many."""
        shape, stack = self.shapes[path], self._stacks[path][0]
        if (
            path in self._hinted
            or len(shape) - len(stack) < 3
            or is_convolution(self.plain[path].role)
        ):
            return []
        found: dict[Axes, None] = dict.fromkeys(self._hidden(path))
        for norm in self._near_norms(path):
            info = self.info(norm)
            rank = len(info.shape)
            for axis in info.long_axes if len(info.long_axes) > 1 else ():
                for place in (axis, axis - rank):
                    fits = -len(shape) <= place < len(shape) and shape[place] == info.shape[axis]
                    if fits and place % len(shape) not in stack:
                        found[tuple(sorted((*stack, place % len(shape))))] = None
        return list(found)

    def _hidden(self, path: str) -> list[Axes]:
        """Stack axes that nothing speaks against: no vector shows that layers are kept apart."""
        shape, info = self.shapes[path], self.plain[path]
        if info.indexed or self._stacks[path] != [()] or is_convolution(info.role):
            return []
        home = module_of(path).rpartition("/")[0]
        above = home.rpartition("/")[0]
        # The root has a final norm, which says nothing of the blocks.
        around = bool(above) and self._node(above).vectors
        node = self._node(home)
        if node.vectors or around or not node.common or node.count < 2:
            return []
        places = {mark[0] % len(shape) for mark in node.common}
        return [(place,) for place in sorted(places)]

    def _node(self, module: str) -> _Node:
        node = self._root
        for name in module.split("/") if module else ():
            node = node.children[name]
        return node

    def _near_norms(self, path: str, *, inside: bool = False) -> list[str]:
        """The norms below the nearest module that has some, the root only if not `inside`."""
        node, near = self._root, [] if inside else self._root.norms
        for name in path.split("/")[:-1]:
            node = node.children[name]
            near = node.norms or near
        return near[:_LOOKED_AT]

    def _norm_widths(self, prefix: str) -> frozenset[int]:
        if prefix not in self._widths:
            node = self._root
            for name in prefix.split("/") if prefix else ():
                node = node.children[name]
            owns = [self.info(path) for path in node.norms]
            self._widths[prefix] = frozenset(
                info.shape[info.long_axes[0]] for info in owns if len(info.long_axes) == 1
            )
        return self._widths[prefix]

    @functools.cached_property
    def _widths(self) -> dict[str, frozenset[int]]:
        return {}

    def _insert(self, path: str) -> None:
        node = self._root
        for name in path.split("/")[:-1]:
            node = node.children.setdefault(name, _Node())
        node.leaves.append(path)

    def _walk(
        self,
        node: _Node,
        name: str,
        ways: list[tuple[Mark, ...]],
        plain: bool,
    ) -> None:
        """Find the modules that stack their layers, from the root downward.

        Args:
            node: the module.
            name: its name.
            ways: every set of stack axes that is possible here.
            plain: whether a vector shows that no module above stacks.
        """
        plain = plain or node.vectors
        found = self._stack_marks(node, name, ways[0])
        if found:
            ways, plain = found, True
        for path in node.leaves:
            self._stacks[path] = self._axes(path, ways, plain)
        for child, below in node.children.items():
            listed = child.isdigit() and not found
            self._walk(below, "" if listed else child, ways, plain and not _opens(child, below))

    def _stack_marks(
        self, node: _Node, name: str, known: tuple[Mark, ...]
    ) -> list[tuple[Mark, ...]]:
        """The stack axes that a module adds to those known; empty if it stacks nothing."""
        free = sorted(node.common or (), key=lambda mark: (mark[0] < 0, abs(mark[0])))
        free = [mark for mark in free if mark not in known]
        # What a stack leaves of a kernel or of a table has two axes.
        if not free or node.flattest - len(known) < 3 or _ATTENTION.fullmatch(name):
            return []
        named = is_stacked_name(name) and not all(map(str.isdigit, node.children or "x"))
        if node.norms and node.count > len(node.norms):
            return self._by_norms(node, free, known)
        return self._by_name(node, free, known) if named else []

    def _by_norms(
        self, node: _Node, free: list[Mark], known: tuple[Mark, ...]
    ) -> list[tuple[Mark, ...]]:
        """A norm has one axis of its own; its others are stacks, shared by all beside it."""
        shape = min((self.shapes[path] for path in node.norms), key=len)
        extra = len(shape) - 1 - len(known)
        places = {mark[0] % len(shape): mark for mark in reversed(free) if mark[0] < len(shape)}
        for mark in known:
            places.pop(mark[0] % len(shape), None)
        if extra < 1 or len(places) < extra:
            return []
        ways = list(itertools.combinations(places.values(), extra))
        if len(ways) > 1 and extra == 1:
            ways = [(mark,) for mark in self._shorter(places, shape)]
        return [(*known, *marks) for marks in ways]

    def _shorter(self, places: Mapping[int, Mark], shape: tuple[int, ...]) -> list[Mark]:
        """Of two axes that all share, the stack: the other one is the width.

        The width is an embedding's, or what is seldom less than the layers.
        """
        width = {place: shape[1 - place] for place in places} if len(shape) == 2 else {}
        beside = [mark for p, mark in places.items() if width.get(p) in self._table_widths]
        if len(beside) == 1:
            return beside
        return [m for p, m in places.items() if m[1] <= LONG_STACK * width.get(p, m[1])]

    def _by_name(
        self, node: _Node, free: list[Mark], known: tuple[Mark, ...]
    ) -> list[tuple[Mark, ...]]:
        """A module whose name is a plural of layers stacks them at a place that all share."""
        front = [mark for mark in free if mark[0] >= 0] or free
        # `nn.scan` and `vmap` stack along axis 0 unless told otherwise.
        lone = sum(not _BIAS.fullmatch(self.plain[path].role) for path in _paths(node)) == 1
        if not lone:
            front = [mark for mark in front if self._short(node, mark)] or front
        likely = [mark for mark in front if mark[0] == 0 and self._short(node, mark)]
        prefer = lone and likely and not self.partial
        ways = [(*known, mark) for mark in (likely if prefer else front)]
        # Two axes may be one matrix, or vectors of stacked layers; a square may be a convolution's.
        unsure = node.rank - len(known) < 3 or (lone and any(map(self._is_square, _paths(node))))
        return [*ways, known] if unsure else ways

    def _is_square(self, path: str) -> bool:
        """Whether the first two axes may be those of a convolution."""
        shape = self.shapes[path]
        return len(shape) == 4 and shape[0] == shape[1] and is_convolution(self.plain[path].role)

    def _short(self, node: _Node, mark: Mark) -> bool:
        """Whether a stack is not longer than its matrices are wide."""
        for path in _paths(node):
            others = sorted(n for axis, n in enumerate(self.shapes[path]) if axis != mark[0])[-2:]
            if others and mark[1] > LONG_STACK * min(others):
                return False
        return True

    def _axes(self, path: str, ways: list[tuple[Mark, ...]], plain: bool) -> list[Axes]:
        shape, info = self.shapes[path], self.plain[path]
        rank = len(shape)
        known = list(
            dict.fromkeys(tuple(sorted({a % rank for a, _ in way})) for way in ways if rank)
        )
        if info.role.endswith("kernel"):
            # A kernel is no vector, so two of its axes belong to one layer.
            known = [axes for axes in known if rank - len(axes) > 1] or known
        if known != [()] or plain or info.indexed or rank < 3 or is_convolution(info.role):
            return known or [()]
        rest = [length for length in shape[1:] if length > 1]
        hidden = len(rest) > 1 and shape[0] <= LONG_STACK * min(rest)
        return [(), (0,)] if hidden else [()]


def is_convolution(role: str) -> bool:
    """Whether a role names a convolution."""
    return _CONVOLUTION.search(role) is not None


def module_of(path: str) -> str:
    """The module that owns a parameter: the path without `kernel`, `weight`, `weight/0` or `bias`.

    >>> module_of("attn/q_proj/weight/0"), module_of("attn/q")
    ('attn/q_proj', 'attn/q')
    """
    above, _, last = path.rpartition("/")
    if last.isdigit() and _VALUE.fullmatch(above.rpartition("/")[2]):
        above, _, last = above.rpartition("/")
    if last.isdigit() and _BIAS.fullmatch(above.rpartition("/")[2]):
        above, _, last = above.rpartition("/")
    return above if above and (_VALUE.fullmatch(last) or last in ("bias", "b")) else path


def is_norm(role: str) -> bool:
    """Whether a role is a norm's scale or offset."""
    return _NORM.fullmatch(role) is not None


def _numbered(path: str) -> Iterator[tuple[tuple[str, str], int]]:
    """The names in a path that end in a number: the module that has it, the rest of it, the number.

    >>> list(_numbered("mlp/layer_3/w"))
    [(('mlp/', 'layer'), 3)]
    """
    for found in re.finditer(r"([^/.]*?)_?(\d+)(?=[/.]|$)", path):
        yield (path[: found.start()], found[1]), int(found[2])


def _paths(node: _Node) -> Iterable[str]:
    yield from node.leaves
    for child in node.children.values():
        yield from _paths(child)


def _opens(name: str, node: _Node) -> bool:
    """Whether a module may stack its layers though those around it are not stacked."""
    return is_stacked_name(name) and not all(map(str.isdigit, node.children or "x"))


def _summarize(node: _Node, infos: Mapping[str, ParamInfo]) -> None:
    """Fill in what the parameters below a module share, from the leaves upward."""
    shared: list[frozenset[Mark]] = []
    for path in node.leaves:
        info = infos[path]
        rank = len(info.shape)
        marks = [(a, n) for a, n in enumerate(info.shape)]
        shared.append(frozenset([*marks, *((a - rank, n) for a, n in marks)]))
        if _NORM.fullmatch(info.role) and not _HEAD_NORM.fullmatch(info.role) and rank:
            node.norms.append(path)
        node.vectors = node.vectors or rank == 1
        if _TWO_AXES.fullmatch(info.role):
            node.flattest = min(node.flattest, rank)
        node.rank = max(node.rank, rank)
    node.count = len(node.leaves)
    for child in node.children.values():
        _summarize(child, infos)
        node.count += child.count
        node.rank = max(node.rank, child.rank)
        node.flattest = min(node.flattest, child.flattest)
        node.norms += child.norms
        node.vectors = node.vectors or child.vectors
        if child.common is not None:
            shared.append(child.common)
    node.common = frozenset.intersection(*shared) if shared else None
