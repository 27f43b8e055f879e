"""Which parameters are Muon's, and how each is read as matrices.

Evidence is asked in this order, and what decided is the printed reason:

1. `views`: what the user says;
2. the names of axes that parameters carry, or that `views` holds (`axis_names.py`);
3. the tree: stacks, widths, vocabulary, attention that must fit (`evidence.py`, `heads.py`);
4. names (`default_rules.py`);
5. otherwise an error that lists every ambiguous parameter and the ways to read it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_muon.matrices.axis_names import AxisRoles, CarriedAxes, Names, as_names, read_names
from optax_muon.matrices.default_rules import DEFAULT_RULES, classify, from_end
from optax_muon.matrices.dimension_numbers import is_dimension_numbers
from optax_muon.matrices.entries import is_function, is_position, keys_of, listed
from optax_muon.matrices.evidence import Tree
from optax_muon.matrices.heads import find_heads
from optax_muon.matrices.paths import is_masked, named_leaves
from optax_muon.matrices.rules import Decision, Interpretation, Kind, ParamInfo, Rule, as_view
from optax_muon.matrices.summary import LabelRow, Labels, ambiguity
from optax_muon.matrices.views import Axes, View

__all__ = ["DEFAULT_RULES", "MATRICES", "Rule", "Stacked", "assign", "label"]

MATRICES = "matrices"
"""As `views=`, or as an entry of it: ambiguous parameters with two axes are matrices."""

_NOT_FLOATING = Decision(None, "not floating point", kind=Kind.NOT_FLOATING)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """As an entry of `views`: along which axes the layers of a module are stacked.

    The tree still decides everything else. Use it where the tree does not show the stack:
    `views={"decoder/layers": Stacked(1)}`. `Stacked()` says that nothing is stacked.

    Raises:
        ValueError: (in `label` and `init`) a parameter has no such axis.

    >>> tree = {"net": {"mix": {"kernel": jnp.zeros((64, 3, 96))}}}
    >>> label(tree, {"net": Stacked(1)}).rows[0].blocks
    (Block(batch=3, rows=64, cols=96),)
    """

    axes: Axes
    """Axes of a parameter that count layers; negative axes count from the end."""

    def __init__(self, *axes: int) -> None:
        object.__setattr__(self, "axes", tuple(axes))

    def on(self, path: str, shape: tuple[int, ...]) -> Axes:
        """The axes of a parameter, counted from the front.

        Raises:
            ValueError: the parameter does not have such an axis.
        """
        for axis in self.axes:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(f"{path}: {self} names axis {axis}; its shape is {shape}.")
        return tuple(sorted(axis % len(shape) for axis in self.axes))


Entry = View | None | Stacked | Names | str
"""What `views` may hold for a path."""


def assign(tree: Any, views: Any = None) -> dict[str, View | None]:
    """Decide for every parameter how it is read as matrices, or that the fallback has it.

    Args:
        tree: parameters, gradients or `jax.ShapeDtypeStruct`s: linen (boxed or plain), nnx,
            equinox, haiku or any other tree. Leaves masked by optax are left out, and then nothing
            is concluded from what is missing: pass `views=label(params).views` to a link that sees
            a masked tree.
        views: what to decide by hand; None decides everything by the evidence.

            - A pytree, a prefix of one, or a dict from paths. Its entries are a `View`, dimension
              numbers (any object with `reduction_axis` and `output_axis`), None for the fallback,
              `Stacked(axis)`, `"matrices"`, or the logical names of a parameter's axes (a tuple or
              a `PartitionSpec`). An entry holds for the parameter at its path, for all below it,
              and for those that it matches as a glob (`*/mixer/w`); where several fit, the longest
              decides, and the exact path before all.
            - A list of `Rule`s, tried in order.
            - A function from the tree to any of these.
            - `"matrices"`: ambiguous parameters with two axes are matrices.

    Returns:
        Path to view, None for the fallback, for every leaf in the tree's order.

    Raises:
        ValueError: a parameter is ambiguous; an entry or rule matches no parameter; a view does not
            fit its shape.
        TypeError: `views` holds something else.

    >>> up = {"kernel": jnp.zeros((8, 32)), "bias": jnp.zeros(32)}
    >>> assign({"embed": jnp.zeros((64, 8)), "up": up})
    {'embed': None, 'up/bias': None, 'up/kernel': View(rows=(-2,), cols=(-1,), split=None)}
    >>> assign({"codebook": jnp.zeros((4, 8))})
    Traceback (most recent call last):
    ValueError: codebook of shape (4, 8) may be one matrix of 4 x 8 or no matrix.
    1 ambiguous parameter: name without a role
      'codebook' (4, 8)
    Pass views with one line for each group, or write your own:
    views={
        'codebook': View(rows=0, cols=1),  # one matrix of 4 x 8
        # 'codebook': None,  # no matrix
    }
    """
    _, decisions = _decide(tree, views)
    return {path: decision.view for path, decision in decisions.items()}


def label(params: Any, views: Any = None, *, strict: bool = True) -> Labels:
    """Show which parameters go to Muon, as what matrices, and why: `print(label(params))`.

    In the table `adamw` stands for the fallback, whichever it is.

    Args:
        params: Parameters or `jax.ShapeDtypeStruct`s.
        views: As for `muon`.
        strict: Whether an ambiguous parameter is an error; False prints it as an open row.

    Returns:
        The table, to be printed, as data in `.rows`, and as views in `.views`.

    Raises:
        ValueError: A parameter is ambiguous; an entry of `views` matches no parameter; a view does
            not fit its shape. The message names the path.
        TypeError: `views` holds something else.

    >>> params = {"layers": {"norm": jnp.zeros((12, 64)), "up_proj": jnp.zeros((12, 64, 256))}}
    >>> print(label(params))
    path            shape          matrices         optimizer  reason
    layers/norm     [12, 64]       -                adamw      norm
    layers/up_proj  [12, 64, 256]  12 x (64 x 256)  muon       matrix
    <BLANKLINE>
    optimizer  leaves  parameters  share
    muon       1       196,608     99.6%
    adamw      1       768         0.4%
    """
    leaves, decisions = _decide(params, views, strict=strict)
    return Labels(tuple(_row(path, leaves[path], decision) for path, decision in decisions.items()))


def _decide(
    tree: Any, views: Any, *, strict: bool = True
) -> tuple[dict[str, Any], dict[str, Decision]]:
    """The arrays of a tree and the decision for each, by path, in the tree's order."""
    positions = named_leaves(tree, is_leaf=is_position)
    leaves = {p: leaf for p, leaf in positions.items() if leaf is not None and not is_masked(leaf)}
    user = _user_decision(tree, positions, views)
    shapes = {path: _shape(leaf) for path, leaf in leaves.items()}
    floating = {path for path, leaf in leaves.items() if jnp.issubdtype(_dtype(leaf), jnp.inexact)}
    said = {path: user(ParamInfo.of(path, shape)) for path, shape in shapes.items()}
    decisions = dict.fromkeys(shapes, _NOT_FLOATING)
    for path, entry in said.items():
        if isinstance(entry, Decision):
            decisions[path] = _checked(path, shapes[path], entry, _dtype(leaves[path]), floating)
    # Where the views decide every parameter, as in the links of a chain, nothing else is asked.
    if any(not isinstance(said[path], Decision) for path in floating):
        hidden = any(map(is_masked, positions.values()))
        found = _by_evidence(
            {path: shape for path, shape in shapes.items() if path in floating},
            said,
            CarriedAxes.of(tree),
            partial=hidden,
        )
        decisions |= {p: d for p, d in found.items() if not isinstance(said[p], Decision)}
    if strict and any(decision.interpretations for decision in decisions.values()):
        raise ValueError(ambiguity(decisions, shapes))
    return leaves, decisions


def _by_evidence(
    shapes: Mapping[str, tuple[int, ...]],
    said: Mapping[str, Any],
    carried: CarriedAxes,
    *,
    partial: bool,
) -> dict[str, Decision]:
    """Decide all parameters together, those that the user decided among them."""
    roles = {path: _roles(path, shapes[path], said[path], carried) for path in shapes}
    stacks = {
        path: entry.on(path, shapes[path])
        for path, entry in said.items()
        if isinstance(entry, Stacked) and path in shapes
    }
    stacks |= {p: n.stack for p, n in roles.items() if n is not None and (n.stack or n.known)}
    evidence = Tree(shapes, partial=partial, stacks=stacks)
    found = {
        path: _classified(
            path, carried.layer_of(path) or _named(path, roles[path], evidence), evidence
        )
        for path in shapes
    }
    found = _agreeing(find_heads(found, evidence), evidence)
    return {p: _two_axes(d, shapes[p]) if said[p] == MATRICES else d for p, d in found.items()}


def _roles(path: str, shape: tuple[int, ...], said: Any, carried: CarriedAxes) -> AxisRoles | None:
    """The roles of a parameter's axes, if names of them are known and fit its shape."""
    names = said if isinstance(said, tuple) else carried.names_of(path)
    return AxisRoles.of(names) if names is not None and len(names) == len(shape) else None


def _named(path: str, roles: AxisRoles | None, tree: Tree) -> Decision | None:
    """What the names of its axes say of a parameter, if they say enough."""
    return None if roles is None else read_names(roles, tree.plain[path].out_first)


def _classified(path: str, carried: Decision | None, tree: Tree) -> Decision:
    """What a parameter's axes say, or else what the tree says."""
    if carried is None:
        return classify(path, tree)
    if carried.view is None:
        return carried
    bound = carried.view.bind(tree.shapes[path])
    vector = min(bound.blocks[0].rows, bound.blocks[0].cols) == 1
    view = None if vector else from_end(carried.view, tree.shapes[path])
    return Decision(view, "vector or scalar" if vector else carried.reason)


def _two_axes(decision: Decision, shape: tuple[int, ...]) -> Decision:
    views = {i.view for i in decision.interpretations}
    if len(views) == 2 and len(shape) == 2:
        return Decision(View(-2, -1), "views say that it is a matrix")
    return decision


def _agreeing(decisions: dict[str, Decision], tree: Tree) -> dict[str, Decision]:
    """Repeated blocks must be read alike; where they are not, all of them are ambiguous."""
    groups: dict[Any, list[str]] = {}
    for path in decisions:
        info = tree.plain[path]
        if info.indexed:
            groups.setdefault((info.role, info.shape), []).append(path)
    changed: dict[str, Decision] = {}
    for paths in groups.values():
        ways = dict.fromkeys(decisions[path].view for path in paths)
        if len(ways) > 1:
            shape = tree.shapes[paths[0]]
            offered = tuple(Interpretation.of(view, shape) for view in ways)
            changed |= dict.fromkeys(paths, Decision(None, "blocks disagree", offered))
    return decisions | changed


def _checked(
    path: str, shape: tuple[int, ...], decision: Decision, dtype: Any, floating: set[str]
) -> Decision:
    """What the user decided, if the parameter allows for it."""
    if path not in floating:
        if decision.view is not None:
            raise ValueError(f"{path} is {dtype}, which has no gradient; its view must be None.")
        return _NOT_FLOATING
    if decision.view is not None:
        _blocks(path, shape, decision.view)
    return decision


# ---- what the user says --------------------------------------------------------------------------

_UserDecision = Callable[[ParamInfo], Any]
"""From a parameter to a `Decision`, a hint (`Stacked`, names, MATRICES), or None for nothing."""


def _user_decision(tree: Any, positions: Mapping[str, Any], views: Any) -> _UserDecision:
    if views is None:
        return lambda info: None
    if isinstance(views, str):
        return _by_entries(positions, {"": _entry("", views)})
    if isinstance(views, Rule):
        views = [views]
    if isinstance(views, list | tuple) and views and all(isinstance(rule, Rule) for rule in views):
        return _by_rules(positions, tuple(views))
    if is_function(views):
        return _user_decision(tree, positions, views(tree))
    entries = named_leaves(views, is_leaf=_is_entry)
    return _by_entries(positions, {path: _entry(path, view) for path, view in entries.items()})


def _by_rules(positions: Mapping[str, Any], rules: tuple[Rule, ...]) -> _UserDecision:
    # The default rules among them say: decide the rest by the table.
    own = tuple(itertools.takewhile(lambda rule: rule not in DEFAULT_RULES, rules))
    infos = [
        ParamInfo.of(path, np.shape(leaf))
        for path, leaf in positions.items()
        if hasattr(leaf, "dtype")
    ]
    hidden = any(map(is_masked, positions.values()))
    for rule in own:
        if not hidden and not any(map(rule.fits, infos)):
            raise ValueError(
                f"The rule {rule.pattern!r} ({rule.reason}) matches no parameter of"
                f" {listed(info.role for info in infos)}."
            )

    def decide(info: ParamInfo) -> Decision | None:
        rule = next((rule for rule in own if rule.fits(info)), None)
        return None if rule is None else Decision(rule.view, rule.reason)

    return decide


def _by_entries(positions: Mapping[str, Any], entries: Mapping[str, Entry]) -> _UserDecision:
    keys = keys_of("views", entries, positions)

    def decide(info: ParamInfo) -> Any:
        key = keys[info.path]
        if key is None:
            return None
        value = entries[key]
        if value is None or isinstance(value, View):
            return Decision(value, f"views[{key!r}]" if key else "views")
        return value

    return decide


def _is_entry(node: Any) -> bool:
    return (
        node is None
        or isinstance(node, View | Stacked)
        or is_dimension_numbers(node)
        or as_names(node) is not None
    )


def _entry(path: str, value: Any) -> Entry:
    if isinstance(value, Stacked) or value == MATRICES:
        return value
    names = as_names(value)
    if names is not None:
        return names
    try:
        return as_view(value)
    except TypeError as error:
        raise TypeError(f"views[{path!r}]: {error}") from None


# ---- leaves --------------------------------------------------------------------------------------


def _blocks(path: str, shape: tuple[int, ...], view: View) -> tuple[Any, ...]:
    try:
        return view.bind(shape).blocks
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _row(path: str, leaf: Any, decision: Decision) -> LabelRow:
    shape = _shape(leaf)
    blocks = () if decision.view is None else _blocks(path, shape, decision.view)
    return LabelRow(
        path,
        shape,
        str(_dtype(leaf)),
        blocks,
        decision.reason,
        decision.view,
        decision.interpretations,
        decision.kind,
    )


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(np.shape(leaf)) if hasattr(leaf, "dtype") else ()


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
