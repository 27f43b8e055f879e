"""A parameter's role: what its path says of it, and the rules that read a role as matrices.

A rule decides by what a parameter is called and by how many axes of its own it has, never by its
rank alone: `[12, 512]` is twelve norm scales below `layers/norm` and one matrix below `q_proj`.
A shape cannot give a role, but it may speak against one: `[4096, 32, 14336]` is hardly 4096 layers.
So a rule lists what else its leaf may be, its rivals; a leaf for which one stands is ambiguous, and
`rules.py` raises instead of guessing. The default table is in `table.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Container
from typing import Any

import optax

from optax_muon.matrices.views import BoundView, View

# A layer that keeps its own arrays: `layers/3`, `block_3`, `EncoderLayer_3`, `h0_attn`.
_INDEXED = re.compile(r"(\w*(layers?|blocks?|stages?)|h)_?\d+(_\w+)?")
# Modules whose arrays are stacked along a leading axis unless an index follows. `nn.scan` and
# `nn.vmap` write their name before the module's, linen a numeral that is no layer: `ScanBlock_0`.
_TRANSFORMED = re.compile(r"(scan|vmap)_\w+")
_STACKED = re.compile(
    rf"{_TRANSFORMED.pattern}|(?!shared)\w*(layers|blocks|stages|experts)|h|\w*(scan|vmap|stack)(_[a-z_]+)?"
)


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """What is known of a parameter: its path and shape, and nothing of its siblings."""

    path: str
    """Name in the tree: `Decoder_0/layers/MlpBlock_0/wi_0/kernel`."""
    shape: tuple[int, ...]
    """Shape of the parameter."""
    role: str
    """The path in lower snake case without indices: `decoder/layers/mlp_block/wi/kernel`."""
    stack: int
    """How many leading axes the path shows to be stacked layers or experts."""
    indexed: bool
    """Whether the path holds the index of a layer."""

    @classmethod
    def of(cls, path: str, shape: tuple[int, ...]) -> ParamInfo:
        """Read a path.

        >>> ParamInfo.of("ScanBlock_0/LayerNorm_1/scale", (12, 512))
        ParamInfo(path='ScanBlock_0/LayerNorm_1/scale', shape=(12, 512),
             role='scan_block/layer_norm/scale', stack=1, indexed=False)
        """
        names = [_snake(name) for name in re.split(r"[/.]", path) if name not in ("", "~")]
        modules = list(itertools.pairwise(names))
        stack = sum(
            bool(_STACKED.fullmatch(name)) and not after.isdigit() for name, after in modules
        )
        indexed = any(
            _INDEXED.fullmatch(f"{name}_{after}" if after.isdigit() else name)
            and not _TRANSFORMED.fullmatch(name)
            for name, after in modules
        )
        kept = (re.sub(r"_\d+$", "", name) for name in names if not name.isdigit())
        return cls(path, shape, "/".join(kept), stack, indexed)

    @property
    def axes(self) -> int:
        """Axes of one layer's parameter: the rank less the stacked axes."""
        return max(0, len(self.shape) - self.stack)

    @property
    def own(self) -> tuple[int, ...]:
        """Shape of one layer's parameter; the whole shape if that leaves less than two axes."""
        return self.shape[self.stack :] if self.axes > 1 else self.shape

    @property
    def out_first(self) -> bool:
        """Whether it is stored (out, in), as torch and equinox do, who call it `weight`."""
        return self.role.endswith("weight")

    @property
    def fans(self) -> tuple[int, int]:
        """Fan in and fan out, read as a matrix by its last two axes."""
        first, last = self.shape[-2:]
        return (last, first) if self.out_first else (first, last)


@dataclasses.dataclass(frozen=True)
class Interpretation:
    """One way to read a parameter."""

    words: str
    """In words: `12 matrices of 512 x 2048`."""
    view: View | None
    """As a view, its axes counted from the front; None for AdamW."""

    @classmethod
    def of(cls, view: View, shape: tuple[int, ...]) -> Interpretation:
        """Describe a view of a shape.

        >>> Interpretation.of(View(-2, -1), (12, 512, 2048)).words
        '12 matrices of 512 x 2048'
        """
        bound = view.bind(shape)
        block = bound.blocks[0]
        count = "one matrix" if block.batch == 1 else f"{block.batch} matrices"
        words = f"{count} of {block.rows} x {block.cols}"
        return cls(words, View(bound.row_axes, bound.col_axes, bound.split))

    @property
    def code(self) -> str:
        """The view as one would write it: `View(rows=1, cols=2)`."""
        if self.view is None:
            return "None"
        rows, cols = (
            axes[0] if len(axes) == 1 else axes for axes in (self.view.rows, self.view.cols)
        )
        return f"View(rows={rows}, cols={cols})"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a rule says of a leaf."""

    view: View | None
    """How it is read, or None for the fallback optimizer."""
    reason: str
    """Why."""
    interpretations: tuple[Interpretation, ...] = ()
    """If it is ambiguous, the two readings."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table: parameters whose name and axes fit are read by this view.

    Args:
        pattern: regular expression for the end of the path, whole names at a time, in lower snake
          case and without indices: `mixer/w` fits `Block_3/Mixer_0/w` and `blocks/3/mixer/w`. Start
          it with `^` to fit the path from its beginning.
        view: how to read them, or None for the fallback optimizer. An
          `optax.contrib.MuonDimensionNumbers` is taken as well.
        reason: what they are, in a few words, for the report.
        axes: how many axes one layer's parameter may have, stacked layers and experts not counted;
          any by default.
        rivals: what else it may be: each gives another reading if the leaf allows for one, and the
          leaf is then ambiguous. Your own rules need none.
        when: a further condition on the leaf.

    >>> import jax
    >>> from optax_muon.matrices.assign import assign
    >>> mixer = Rule(r"mixer/w", View(0, (1, 2)), "mixes heads")
    >>> assign({"mixer": {"w": jax.ShapeDtypeStruct((64, 4, 16), "float32")}}, views=[mixer])
    {'mixer/w': View(rows=(0,), cols=(1, 2), split=None)}
    """

    pattern: str
    view: View | None
    reason: str
    axes: Container[int] | None = None
    alternatives: tuple[Callable[[ParamInfo, BoundView], Interpretation | None], ...] = ()
    when: Callable[[ParamInfo], bool] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "view", as_view(self.view))

    def fits(self, leaf: ParamInfo) -> bool:
        """Whether the rule decides this leaf."""
        return (
            (self.axes is None or leaf.axes in self.axes)
            and re.fullmatch(rf"(?:.*/)?(?:{self.pattern})", leaf.role) is not None
            and (self.when is None or self.when(leaf))
        )

    def decision(self, leaf: ParamInfo) -> Decision:
        """What the rule says of a leaf that fits it."""
        if self.view is None or not self.alternatives:
            return Decision(self.view, self.reason)
        bound = self.view.bind(leaf.shape)
        found = (alternative(leaf, bound) for alternative in self.alternatives)
        alternative = next((reading for reading in found if reading is not None), None)
        interpretations = (
            () if alternative is None else (Interpretation.of(self.view, leaf.shape), alternative)
        )
        return Decision(self.view, self.reason, interpretations)


def as_view(view: Any) -> View | None:
    """A view, whoever wrote it.

    Args:
        view: a `View`, an `optax.contrib.MuonDimensionNumbers`, or None.

    Raises:
        TypeError: it is none of these.

    >>> as_view(optax.contrib.MuonDimensionNumbers(0, (1, 2)))
    View(rows=(0,), cols=(1, 2), split=None)
    """
    if isinstance(view, optax.contrib.MuonDimensionNumbers):
        return View(view.reduction_axis, view.output_axis)
    if view is None or isinstance(view, View):
        return view
    raise TypeError(f"Expected a View, a MuonDimensionNumbers or None, got {view!r}.")


def _snake(name: str) -> str:
    """`RMSNorm_0` to `rms_norm_0`; `MoE`, one word of three cases, to `moe`."""
    parted = re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.replace("MoE", "Moe")
    )
    return re.sub(r"\W+", "_", parted).lower()
