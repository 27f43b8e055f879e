"""What is known of one parameter, how it may be read, and the rules that decide by its name."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import re
from collections.abc import Callable, Container
from typing import Any

from optax_muon.matrices.dimension_numbers import is_dimension_numbers
from optax_muon.matrices.views import Axes, View

# A layer that keeps its own arrays: `layers/3`, `block_3`, `EncoderLayer_3`, `h0_attn`.
_INDEXED = re.compile(r"(\w*(layers?|blocks?|stages?)|h)_?\d+(_\w+)?")
# Modules whose arrays are stacked unless an index follows. `nn.scan` and `nn.vmap` write their name
# before the module's; linen adds a numeral that is no layer: `ScanBlock_0`.
_TRANSFORMED = re.compile(r"(scan|vmap)_\w+")
_STACKED = re.compile(
    rf"{_TRANSFORMED.pattern}|(?!shared)\w*(layers|blocks|stages)|h|\w*(scan|vmap|stack)(ed)?(_[a-z_]+)?"
)


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """What is known of a parameter when its rule is looked up."""

    path: str
    """Name in the tree: `Decoder_0/layers/MlpBlock_0/wi_0/kernel`."""
    shape: tuple[int, ...]
    """Shape of the parameter."""
    role: str
    """The path in lower snake case without indices: `decoder/layers/mlp_block/wi/kernel`."""
    indexed: bool = False
    """Whether the path holds the index of a layer."""
    stack: Axes = ()
    """Axes (from the front) along which layers are stacked."""

    @classmethod
    def of(cls, path: str, shape: tuple[int, ...], stack: Axes = ()) -> ParamInfo:
        """Read a path.

        >>> ParamInfo.of("ScanBlock_0/LayerNorm_1/scale", (12, 512)).role
        'scan_block/layer_norm/scale'
        """
        role, indexed = _read(path)
        return cls(path, shape, role, indexed, stack)

    @property
    def own_axes(self) -> Axes:
        """Axes of one layer's parameter."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.stack)

    @property
    def own(self) -> tuple[int, ...]:
        """Shape of one layer's parameter."""
        return tuple(self.shape[axis] for axis in self.own_axes)

    @property
    def long_axes(self) -> Axes:
        """The axes of one layer's parameter that are longer than 1."""
        return tuple(axis for axis in self.own_axes if self.shape[axis] > 1)

    @property
    def name(self) -> str:
        """The name of the module that owns a kernel, or of a bare array: `q_proj`."""
        parts = self.role.split("/")
        while len(parts) > 1 and parts[-1] in ("kernel", "w", "weight", "weights"):
            parts.pop()
        return parts[-1]

    @property
    def series(self) -> str:
        """The role without the numbers that its names end in: `layer/w` of `layer3/w`."""
        return _without_numbers(self.role)

    @property
    def out_first(self) -> bool:
        """Whether it is stored (out, in), as torch and equinox do, who call it `weight`."""
        last = self.role.rpartition("/")[2]
        return last.endswith("weight") or last.startswith("weight_")


@dataclasses.dataclass(frozen=True)
class Interpretation:
    """One way to read a parameter."""

    words: str
    """In words: `12 matrices of 512 x 2048`."""
    view: View | None
    """As a view, its axes counted from the front; None for AdamW."""

    @classmethod
    def of(cls, view: View | None, shape: tuple[int, ...], words: str = "") -> Interpretation:
        """Describe a view of a shape.

        >>> Interpretation.of(View(-2, -1), (12, 512, 2048)).words
        '12 matrices of 512 x 2048'
        """
        if view is None:
            return cls(words or "no matrix", None)
        bound = view.bind(shape)
        block = bound.blocks[0]
        count = "one matrix" if block.batch == 1 else f"{block.batch} matrices"
        described = f"{count} of {block.rows} x {block.cols}"
        return cls(words or described, View(bound.row_axes, bound.col_axes, bound.split))

    @property
    def code(self) -> str:
        """The view as one would write it: `View(rows=1, cols=2)`."""
        if self.view is None:
            return "None"
        rows, cols = (
            axes[0] if len(axes) == 1 else axes for axes in (self.view.rows, self.view.cols)
        )
        return f"View(rows={rows}, cols={cols})"


class Kind(enum.Enum):
    """What a parameter is, as far as more follows from it than its view says."""

    ORDINARY = "ordinary"
    """A matrix, a norm, a table."""
    HEAD = "output head"
    """It reads the features of the model, though it is no matrix for Muon."""
    NOT_FLOATING = "not floating point"
    """It has no gradient, so no optimizer."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a parameter is read, and why."""

    view: View | None
    """How it is read, or None for the fallback optimizer."""
    reason: str
    """Why, to be printed; nothing is decided by its words."""
    interpretations: tuple[Interpretation, ...] = ()
    """If it is ambiguous, every way to read it."""
    kind: Kind = Kind.ORDINARY
    """What it is."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table: parameters whose name and number of axes fit are read by this view.

    >>> import jax
    >>> from optax_muon.matrices.assign import assign
    >>> mixer = Rule(r"mixer/w", View(0, (1, 2)), "mixes heads")
    >>> assign({"mixer": {"w": jax.ShapeDtypeStruct((64, 4, 16), "float32")}}, views=[mixer])
    {'mixer/w': View(rows=(0,), cols=(1, 2), split=None)}
    """

    pattern: str
    """Regular expression for the end of the path, whole names at a time, in lower snake case and
    without indices: `mixer/w` fits `Block_3/Mixer_0/w` and `blocks/3/mixer/w`. A pattern that
    starts with `^` must fit the whole path."""
    view: View | None
    """How to read them, or None for the fallback optimizer. An object with `reduction_axis` and
    `output_axis`, such as `optax.contrib.MuonDimensionNumbers`, is taken as well."""
    reason: str
    """What they are, in a few words, for the report."""
    axes: Container[int] | None = None
    """How many axes one layer's parameter may have, stacked layers not counted; None for any."""
    when: Callable[[ParamInfo], bool] | None = None
    """A further condition on the parameter."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "view", as_view(self.view))

    def fits(self, info: ParamInfo) -> bool:
        """Whether the rule decides this parameter."""
        return (
            _matches(self.pattern, info.role)
            and (self.axes is None or len(info.own_axes) in self.axes)
            and (self.when is None or self.when(info))
        )


def as_view(view: Any) -> View | None:
    """Read a view, whichever package wrote it.

    Args:
        view: a `View`, None, or an object with `reduction_axis` and `output_axis`.

    Raises:
        TypeError: it is none of these.

    >>> import optax
    >>> as_view(optax.contrib.MuonDimensionNumbers(0, (1, 2)))
    View(rows=(0,), cols=(1, 2), split=None)
    """
    if view is None or isinstance(view, View):
        return view
    if is_dimension_numbers(view):
        return View(view.reduction_axis, view.output_axis)
    raise TypeError(
        f"Expected a View, dimension numbers (reduction_axis, output_axis) or None, got {view!r}."
    )


def is_stacked_name(name: str) -> bool:
    """Whether a module of this name stacks its layers, if no index follows."""
    return _STACKED.fullmatch(snake(name)) is not None


@functools.lru_cache(maxsize=65536)
def snake(name: str) -> str:
    """`RMSNorm_0` to `rms_norm_0`; `MoE`, one word of three cases, to `moe`."""
    parted = re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.replace("MoE", "Moe")
    )
    return re.sub(r"\W+", "_", parted).lower().strip("_")


def readings(info: ParamInfo) -> list[View]:
    """Every usual way to read a parameter as matrices, the likelier first.

    One layer's axes are parted into rows and columns where they stand; one axis, or two, may count
    matrices instead; a leading axis may be layers that no name shows.
    """
    axes = info.long_axes
    found: list[View] = []
    for count in range(max(0, len(axes) - 1)):
        for batch in itertools.combinations(axes, count):
            kept = tuple(axis for axis in axes if axis not in batch)
            found += _parted(kept, info.out_first)
    return found


def _parted(axes: Axes, out_first: bool) -> list[View]:
    """The ways to part axes into two groups: a single axis against the rest, or a cut."""
    singles = [(tuple(a for a in axes if a != axis), (axis,)) for axis in axes]
    cuts = [(axes[:cut], axes[cut:]) for cut in range(2, len(axes) - 1)]
    pairs = dict.fromkeys(tuple(sorted(pair)) for pair in (*singles, *cuts))
    return [View(b, a) if out_first else View(a, b) for a, b in pairs]


@functools.lru_cache(maxsize=65536)
def _matches(pattern: str, role: str) -> bool:
    return re.fullmatch(rf"(?:.*/)?(?:{pattern})", role) is not None


@functools.lru_cache(maxsize=65536)
def _without_numbers(role: str) -> str:
    return re.sub(r"_?\d+(?=/|$)", "", role)


@functools.lru_cache(maxsize=65536)
def _read(path: str) -> tuple[str, bool]:
    """The role of a path, and whether it holds the index of a layer."""
    names = [snake(name) for name in re.split(r"[/.]", path) if name not in ("", "~")]
    indexed = any(
        _INDEXED.fullmatch(f"{name}_{after}" if after.isdigit() else name)
        and not _TRANSFORMED.fullmatch(name)
        for name, after in itertools.pairwise(names)
    )
    kept = (re.sub(r"_\d+$", "", name) for name in names if not name.isdigit())
    return "/".join(kept), indexed
