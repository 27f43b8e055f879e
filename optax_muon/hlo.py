"""The collectives and the products of a compiled program, read from its HLO text.

What is inside a loop counts as often as the loop turns, or as often as it is told where the program
does not know. Asynchronous forms (`all-gather-start`
and `all-gather-done`) count once, with the result of the latter.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FIRST = re.compile(r"(?:\w+\[\S* )?%?([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([0-9,]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_LISTED = re.compile(r"replica_groups=\{(\{[0-9,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str
    """Its name in HLO, without `-start`."""
    bytes: int
    """Bytes of its result on one device, all entries of a tuple together."""
    times: int
    """How often the program runs it."""
    groups: tuple[tuple[int, ...], ...]
    """Who takes part with whom, as positions in the mesh; empty if the text does not list them."""


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, given its text."""
    found, chains = [], set()
    for run in _walk(text):
        # A TPU program may hide a collective behind several products, and names it in each.
        chain = _CHAIN.search(run.rest) if run.kind in KINDS else None
        if run.kind in KINDS and (chain is None or chain[1] not in chains):
            found.append(Collective(run.kind, _size(run.result), run.times, _groups(run.rest)))
        if chain:
            chains.add(chain[1])
    return found


def counts(text: str) -> dict[str, int]:
    """How many collectives of each kind a program runs."""
    total: collections.Counter[str] = collections.Counter()
    for each in collectives(text):
        total[each.kind] += each.times
    return dict(total)


def moved(text: str) -> int:
    """Result bytes of all collectives that one device runs."""
    return sum(each.bytes * each.times for each in collectives(text))


def flops(text: str, turns: int = 1) -> int:
    """Operations of all matrix products that one device runs, a multiply-add counted as two.

    A TPU program has convolutions for products, and a call for rows times the matrix of each one's
    group. `turns` are those of loops that turn as often as their data say.
    """
    count = {"dot": _dot, "convolution": _convolution, "custom-call": _ragged_dot}
    return sum(
        2 * count[run.kind](run) * run.times for run in _walk(text, turns) if run.kind in count
    )


def _dot(run: "_Run") -> int:
    lengths = _lengths(run.shapes[_FIRST.match(run.rest)[1]])
    inner = math.prod(lengths[axis] for axis in _numbers(_CONTRACTED.search(run.rest)[1]))
    return inner * math.prod(_lengths(run.result))


def _convolution(run: "_Run") -> int:
    """Multiplications with what is neither padding nor dilation."""
    left, right = (_lengths(run.shapes[name]) for name in _OPERAND.findall(run.rest)[:2])
    of_left, of_right, of_result = _LABELS.search(run.rest).groups()
    result = _lengths(run.result)
    total = right[of_right.index("i")] * result[of_result.index("b")] * result[of_result.index("f")]
    window = dict(entry.split("=") for entry in _window(run.rest).split())
    for axis in filter(str.isdigit, of_left):
        of_axis = {key: value.split("x")[int(axis)] for key, value in window.items()}
        total *= _pairs(left[of_left.index(axis)], result[of_result.index(axis)], of_axis)
    return total


def _window(rest: str) -> str:
    window = _WINDOW.search(rest)
    return window[1] if window else ""


def _pairs(length: int, results: int, window: dict[str, str]) -> int:
    """Places of a result and of a window, along an axis, that meet an entry of the input."""
    size, stride, dilate, spread = (
        int(window.get(key, 1)) for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window.get("pad", "0_0").split("_")[0])
    at = np.arange(results)[:, None] * stride + np.arange(size)[None] * spread - before
    return int(((at >= 0) & (at <= (length - 1) * dilate) & (at % dilate == 0)).sum())


def _ragged_dot(run: "_Run") -> int:
    """Rows times rows and columns of a matrix; the last two operands are rows and matrices."""
    if "ragged-dot" not in run.rest or run.result.startswith("("):
        return 0
    names = _OPERAND.findall(run.rest[: run.rest.index(")")])
    rows = _lengths(run.shapes[names[-2]])
    return math.prod(rows) * _lengths(run.result)[-1]


@dataclasses.dataclass(frozen=True)
class _Run:
    """An instruction that is run."""

    kind: str
    """Its operation, without `-done`."""
    result: str
    """Its type."""
    rest: str
    """Its operands and attributes."""
    times: int
    """How often."""
    shapes: dict[str, str]
    """Types of the instructions beside it."""


def _walk(text: str, turns: int = 1) -> Iterator[_Run]:
    """All instructions, those of a loop's body with the times that the loop turns."""
    starts = list(_COMPUTATION.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    bodies = {m[2]: text[m.end() : end] for m, end in zip(starts, ends, strict=True)}
    entry = next(match[2] for match in starts if match[1])
    yield from _walk_from(bodies, entry, 1, turns)


def _walk_from(bodies: dict[str, str], name: str, times: int, unknown: int) -> Iterator[_Run]:
    instructions = _INSTRUCTION.findall(bodies[name])
    shapes = {name: result for name, result, _, _ in instructions}
    for _, result, operation, rest in instructions:
        yield _Run(operation.removesuffix("-done"), result, rest, times, shapes)
        if operation in ("async-update", "async-done"):
            continue
        inside = times * (_turns(bodies, rest, unknown) if operation == "while" else 1)
        called = _CALLED.findall(rest)
        for branches in _BRANCHES.findall(rest):
            called += [branch.strip(" %") for branch in branches.split(",")]
        for other in called:
            yield from _walk_from(bodies, other, inside, unknown)


def _turns(bodies: dict[str, str], rest: str, unknown: int) -> int:
    """Turns of a loop: as noted, or the only bound of its condition, where TPU programs keep it."""
    if noted := _TURNS.search(rest):
        return int(noted[1])
    condition = _CONDITION.search(rest)
    bounds = _BOUND.findall(bodies[condition[1]]) if condition else []
    return int(bounds[0]) if len(bounds) == 1 else unknown


def _size(result: str) -> int:
    arrays = _ARRAY.findall(result)
    return sum(_itemsize(kind) * math.prod(_numbers(lengths)) for kind, lengths in arrays)


def _lengths(result: str) -> list[int]:
    """Lengths of the axes of an array."""
    return _numbers(_ARRAY.search(result)[2])


def _itemsize(kind: str) -> int:
    return _BYTES[kind] if kind in _BYTES else int(re.sub(r"\D", "", kind)) // 8


def _groups(rest: str) -> tuple[tuple[int, ...], ...]:
    if listed := _LISTED.search(rest):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([0-9,]*)\}", listed[1]))
    if iota := _IOTA.search(rest):
        shape, extents, order = (_numbers(part or "") for part in iota.groups())
        devices = np.arange(math.prod(extents)).reshape(extents)
        return tuple(map(tuple, devices.transpose(order or None).reshape(shape).tolist()))
    if named := _NAMED.search(rest):
        mesh = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return _along(mesh, re.findall(r"'(\w+)'", named[2]))
    return ()


def _along(mesh: dict[str, int], axes: list[str]) -> tuple[tuple[int, ...], ...]:
    """Groups of devices that differ along these axes of a mesh only."""
    devices = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    last = [list(mesh).index(axis) for axis in axes]
    groups = np.moveaxis(devices, last, range(-len(last), 0))
    return tuple(map(tuple, groups.reshape(-1, math.prod(mesh[axis] for axis in axes)).tolist()))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
