"""The collectives, matrix products and estimated cycles of a compiled program, from its HLO text.

XLA's own cost analysis counts the body of a loop once and does not list collectives. These
functions count what is inside a loop as often as the loop runs, and tell which devices take part in
each collective. Asynchronous forms (`all-gather-start` and `all-gather-done`) count once, with the
result of the latter.

    text = jax.jit(step).lower(params).compile().as_text()
    hlo.collectives(text), hlo.collective_bytes(text), hlo.flops(text), hlo.cycles(text)

The compiler for TPUs notes with most instructions how many clock cycles it expects them to take.
`cycles` sums these notes. They are the compiler's model, on which its own choices rest; they are
not a measurement.

This module imports nothing else of the package.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

__all__ = [
    "KINDS",
    "Collective",
    "Cycles",
    "collective_bytes",
    "collective_counts",
    "collectives",
    "cycles",
    "flops",
]

KINDS = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
"""The collectives of HLO."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FIRST_OPERAND = re.compile(r"(?:\w+\[\S* )?%?([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([0-9,]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LOOP_BOUND = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_CHAIN_ID = re.compile(r'chain_id="(\d+)"')
_LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[0-9,{}]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}


Trips = int | Callable[[str], int]
"""Iterations of the loops whose number of iterations depends on data: of all of them, or a function
of a loop's `op_name`, which has the `jax.named_scope`s around it."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str
    """Its HLO operation, one of `KINDS`."""
    bytes: int
    """Bytes of its result on one device; the entries of a tuple are summed."""
    times: int
    """How often the program runs it."""
    groups: tuple[tuple[int, ...], ...]
    """Devices that communicate with each other, by position in the mesh; empty if not stated."""
    overlapped_cycles: int = 0
    """Estimated cycles of the work that is done while it is under way; 0 if it blocks."""

    @property
    def blocks(self) -> bool:
        """Whether nothing that has an estimate is computed while it is under way.

        Programs for GPUs and CPUs have no estimates: there all collectives seem to block.
        """
        return self.overlapped_cycles == 0


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Clock cycles of one TPU device as its compiler estimates them, in one run of a program.

    Collectives have no estimate, nor do Pallas kernels, copies between memories that are started
    and waited for, and scalar instructions.
    """

    products: int = 0
    """Of matrix products, with what is fused into them."""
    rest: int = 0
    """Of everything else that has an estimate."""

    @property
    def total(self) -> int:
        """Of all instructions that have an estimate."""
        return self.products + self.rest


def collectives(text: str, loop_trips: Trips = 1) -> list[Collective]:
    """List the collectives of a compiled program, in the order of its text.

    Args:
        text: HLO of a compiled program, as `compiled.as_text()` returns it.
        loop_trips: Iterations of the loops whose number of iterations depends on data.

    Raises:
        ValueError: The text is not the HLO of a program.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((8,), ("data",))
    >>> x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    >>> def total(x):
    ...     return jax.lax.psum(x, "data")
    >>> mapped = jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P())
    >>> text = jax.jit(mapped).lower(x).compile().as_text()
    >>> [found] = collectives(text)
    >>> found.kind, found.bytes, found.groups
    ('all-reduce', 32, ((0, 1, 2, 3, 4, 5, 6, 7),))
    >>> collective_bytes(text), collective_counts(text)
    (32, {'all-reduce': 1})
    """
    found: dict[str, Collective] = {}
    overlapped: collections.Counter[str] = collections.Counter()
    begun: dict[str, tuple[str, int]] = {}
    clock = 0
    for each in _instructions(text, loop_trips):
        clock += each.cycles * each.times
        start, since = begun.get(each.operand, (each.name, clock))
        if each.kind.endswith("-start"):
            begun[each.name] = each.name, clock
        elif each.kind in ("async-update", "custom-call-update"):
            begun[each.name] = start, since
        # A TPU program may hide a collective behind several products, and names it in each.
        chain = _CHAIN_ID.search(each.attributes)
        key = chain[1] if chain else each.inside or start
        if each.kind in KINDS and key not in found:
            size, groups = _bytes(each.result), _groups(each.attributes)
            found[key] = Collective(each.kind, size, each.times, groups)
        if each.kind in KINDS and chain:
            overlapped[key] += each.cycles_around
        # A custom call that is started runs a collective on the SparseCores of a TPU.
        elif each.kind in (*KINDS, "async", "custom-call"):
            overlapped[key] += (clock - since) // max(each.times, 1)
    return [
        dataclasses.replace(each, overlapped_cycles=overlapped[key]) for key, each in found.items()
    ]


def collective_counts(text: str) -> dict[str, int]:
    """Count the collectives of each kind that a program runs.

    Raises:
        ValueError: The text is not the HLO of a program.
    """
    total: collections.Counter[str] = collections.Counter()
    for each in collectives(text):
        total[each.kind] += each.times
    return dict(total)


def collective_bytes(text: str) -> int:
    """Sum the result bytes of all collectives that one device runs.

    Raises:
        ValueError: The text is not the HLO of a program.
    """
    return sum(each.bytes * each.times for each in collectives(text))


def flops(text: str, loop_trips: Trips = 1) -> int:
    """Count the operations of all matrix products on one device, a multiply-add as two.

    Products are `dot` and, in TPU programs, convolutions and calls of grouped matrix products.

    Args:
        text: HLO of a compiled program, as `compiled.as_text()` returns it.
        loop_trips: Iterations of the loops whose number of iterations depends on data.

    Raises:
        ValueError: The text is not the HLO of a program.

    >>> import jax, jax.numpy as jnp
    >>> def work(x):
    ...     return jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x)
    >>> x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    >>> flops(jax.jit(work).lower(x).compile().as_text()) == 5 * 2 * 16**3
    True
    """
    count = {"dot": _dot, "convolution": _convolution, "custom-call": _grouped_dot}
    return sum(
        2 * count[each.kind](each) * each.times
        for each in _instructions(text, loop_trips)
        if each.kind in count
    )


def cycles(text: str, loop_trips: Trips = 1) -> Cycles:
    """Sum the cycles that the compiler for TPUs expects a program to take on one device.

    This is the compiler's own model and not a measurement. Programs for other platforms have no
    estimates, and give 0.

    Args:
        text: HLO of a compiled program, as `compiled.as_text()` returns it.
        loop_trips: Iterations of the loops whose number of iterations depends on data.

    Raises:
        ValueError: the text is not the HLO of a program.

    >>> cycles('''
    ... ENTRY %main (x: f32[8,8]) -> f32[8,8] {
    ...   %x = f32[8,8]{1,0} parameter(0)
    ...   %y = f32[8,8]{1,0} negate(%x), backend_config={"estimated_cycles":"100"}
    ...   ROOT %z = f32[8,8]{1,0} dot(%y, %y), backend_config={"estimated_cycles":"700"}
    ... }''')
    Cycles(products=700, rest=100)
    """
    products = rest = 0
    for each in _instructions(text, loop_trips):
        if each.multiplies:
            products += each.cycles * each.times
        else:
            rest += each.cycles * each.times
    return Cycles(products, rest)


_STARTS = ("async-start", "custom-call-start")
"""Start a computation beside others."""
_FOLLOWERS = ("async-update", "async-done", "custom-call-update", "custom-call-done")
"""Name the computation that such a start runs again."""
_PRODUCTS = ("dot", "convolution")
"""The matrix products of HLO."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """An instruction of a program."""

    name: str
    """Its name in its computation."""
    kind: str
    """Its operation, without `-done`."""
    result: str
    """Type of its result."""
    attributes: str
    """Its operands and attributes."""
    times: int
    """How often the program runs it."""
    types: dict[str, str]
    """Types of all instructions of its computation, by name."""
    multiplies: bool
    """Whether it is a matrix product, or a fusion with one."""
    cycles: int
    """Estimated cycles of one run, 0 if there is no estimate."""
    cycles_around: int
    """Estimated cycles of the fusion that it is a part of, which are not its own."""
    inside: str
    """Name of the asynchronous start that runs its computation, if one does."""

    @property
    def operand(self) -> str:
        """Name of its first operand, if it has one."""
        operand = _FIRST_OPERAND.match(self.attributes)
        return operand[1] if operand else ""


def _dot(each: _Instruction) -> int:
    """Multiplications of a `dot`."""
    lengths = _lengths(each.types[_found(_FIRST_OPERAND.match(each.attributes))[1]])
    contracted = _numbers(_found(_CONTRACTED.search(each.attributes))[1])
    return math.prod(lengths[axis] for axis in contracted) * math.prod(_lengths(each.result))


def _convolution(each: _Instruction) -> int:
    """Multiplications of a convolution with what is neither padding nor dilation."""
    left, right = (_lengths(each.types[name]) for name in _OPERAND.findall(each.attributes)[:2])
    of_left, of_right, of_result = _found(_LABELS.search(each.attributes)).groups()
    result = _lengths(each.result)
    total = right[of_right.index("i")] * result[of_result.index("b")] * result[of_result.index("f")]
    window = dict(entry.split("=") for entry in _window(each.attributes).split())
    for axis in filter(str.isdigit, of_left):
        of_axis = {key: value.split("x")[int(axis)] for key, value in window.items()}
        total *= _pairs(left[of_left.index(axis)], result[of_result.index(axis)], of_axis)
    return total


def _window(attributes: str) -> str:
    window = _WINDOW.search(attributes)
    return window[1] if window else ""


def _pairs(length: int, results: int, window: dict[str, str]) -> int:
    """Pairs of a result and a window position, along an axis, that meet an entry of the input."""
    size, stride, dilate, spread = (
        int(window.get(key, 1)) for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window.get("pad", "0_0").split("_")[0])
    at = np.arange(results)[:, None] * stride + np.arange(size)[None] * spread - before
    return int(((at >= 0) & (at <= (length - 1) * dilate) & (at % dilate == 0)).sum())


def _grouped_dot(each: _Instruction) -> int:
    """Multiplications of rows with their group's matrix; the last two operands are both."""
    if "ragged-dot" not in each.attributes or each.result.startswith("("):
        return 0
    names = _OPERAND.findall(each.attributes[: each.attributes.index(")")])
    rows = _lengths(each.types[names[-2]])
    return math.prod(rows) * _lengths(each.result)[-1]


def _instructions(text: str, loop_trips: Trips = 1) -> Iterator[_Instruction]:
    """All instructions that a program runs; those of a loop with its number of iterations."""
    starts = list(_COMPUTATION.finditer(text))
    entry = next((match[2] for match in starts if match[1]), None)
    if entry is None:
        raise ValueError(
            "the text has no ENTRY computation; pass the HLO of a compiled program,"
            " jax.jit(f).lower(...).compile().as_text()."
        )
    ends = [match.start() for match in starts[1:]] + [len(text)]
    bodies = {m[2]: text[m.end() : end] for m, end in zip(starts, ends, strict=True)}
    yield from _called_from(bodies, entry, _Caller(), loop_trips)


@dataclasses.dataclass(frozen=True)
class _Caller:
    """What a computation has to know of the instruction that runs it."""

    times: int = 1
    """How often the computation runs."""
    fused: bool = False
    """Whether it is the body of a fusion."""
    cycles: int = 0
    """Estimated cycles of the fusion."""
    start: str = ""
    """Name of the asynchronous start."""


def _called_from(
    bodies: dict[str, str], name: str, caller: _Caller, loop_trips: Trips
) -> Iterator[_Instruction]:
    """The instructions of a computation and of all that it calls."""
    found = _INSTRUCTION.findall(bodies[name])
    types = {name: result for name, result, _, _ in found}
    for own, result, operation, attributes in found:
        called = _called(attributes)
        estimate = _ESTIMATE.search(attributes)
        cycles = int(estimate[1]) if estimate and not caller.fused else 0
        yield _Instruction(
            name=own,
            kind=operation.removesuffix("-done"),
            result=result,
            attributes=attributes,
            times=caller.times,
            types=types,
            multiplies=operation in _PRODUCTS
            or (operation == "fusion" and any(_multiplies(bodies, other) for other in called)),
            cycles=cycles,
            cycles_around=caller.cycles,
            inside=caller.start,
        )
        if operation in _FOLLOWERS:
            continue
        trips = _trips(bodies, attributes, loop_trips) if operation == "while" else 1
        fused = caller.fused or operation == "fusion"
        inner = _Caller(
            times=caller.times * trips,
            fused=fused,
            cycles=(cycles or caller.cycles) if fused else 0,
            start=own if operation in _STARTS else caller.start,
        )
        for other in called:
            yield from _called_from(bodies, other, inner, loop_trips)


def _called(attributes: str) -> list[str]:
    """Names of the computations that an instruction calls."""
    called = _CALLED.findall(attributes)
    for branches in _BRANCHES.findall(attributes):
        called += [branch.strip(" %") for branch in branches.split(",")]
    return called


def _multiplies(bodies: dict[str, str], name: str) -> bool:
    """Whether a computation, or one that it calls, has a matrix product."""
    return any(
        operation in _PRODUCTS or any(_multiplies(bodies, other) for other in _called(attributes))
        for _, _, operation, attributes in _INSTRUCTION.findall(bodies[name])
    )


def _trips(bodies: dict[str, str], attributes: str, unknown: Trips) -> int:
    """Iterations of a loop: as XLA notes them, or the only bound in its condition (TPU)."""
    if noted := _TRIP_COUNT.search(attributes):
        return int(noted[1])
    condition = _CONDITION.search(attributes)
    bounds = _LOOP_BOUND.findall(bodies[condition[1]]) if condition else []
    if len(bounds) == 1:
        return int(bounds[0])
    if isinstance(unknown, int):
        return unknown
    name = _OP_NAME.search(attributes)
    return unknown(name[1] if name else "")


def _bytes(result: str) -> int:
    """Bytes of a type; the entries of a tuple are summed."""
    arrays = _ARRAY.findall(result)
    bits = (_bits(kind) * math.prod(_numbers(lengths)) for kind, lengths in arrays)
    return sum(-(-each // 8) for each in bits)


def _lengths(result: str) -> list[int]:
    """Lengths of the axes of an array."""
    return _numbers(_found(_ARRAY.search(result))[2])


def _bits(kind: str) -> int:
    """Bits of an entry: the first number in the name of its type, as in `f8e4m3fn` or `s4`."""
    return 8 * _BYTES[kind] if kind in _BYTES else int(_found(re.search(r"\d+", kind))[0])


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The replica groups, in any of the three ways in which XLA writes them."""
    if listed := _LISTED_GROUPS.search(attributes):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([0-9,]*)\}", listed[1]))
    if iota := _IOTA_GROUPS.search(attributes):
        shape, extents, order = (_numbers(part or "") for part in iota.groups())
        devices = np.arange(math.prod(extents)).reshape(extents)
        return _as_tuples(devices.transpose(order or None).reshape(shape))
    if named := _MESH_GROUPS.search(attributes):
        mesh = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return _along(mesh, re.findall(r"'(\w+)'", named[2]))
    return ()


def _along(mesh: dict[str, int], axes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Groups of devices that differ along these axes of a mesh only."""
    devices = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    last = [list(mesh).index(axis) for axis in axes]
    groups = np.moveaxis(devices, last, range(-len(last), 0))
    return _as_tuples(groups.reshape(-1, math.prod(mesh[axis] for axis in axes)))


def _as_tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(device) for device in group) for group in groups)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _found(match: re.Match[str] | None) -> re.Match[str]:
    if match is None:
        raise ValueError("an instruction of the HLO text is not written as XLA writes it.")
    return match
