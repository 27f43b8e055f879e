"""Which parameters are Muon's, and how each is read: what `views` says, else the table by role.

Everything is decided per leaf, from its path, its shape and `views`, never from its siblings: the
links of a chain see the tree with other optimizers' leaves masked, and must decide alike.
The report is in `labels.py`, the table in `table.py`, the meaning of a view in `views.py`.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optax_muon.matrices.default_rules import DEFAULT_RULES, classify
from optax_muon.matrices.paths import is_masked, named_leaves
from optax_muon.matrices.rules import Decision, ParamInfo, Rule, as_view
from optax_muon.matrices.summary import Labels, Row
from optax_muon.matrices.views import View

__all__ = ["DEFAULT_RULES", "Rule", "assign", "label"]

_LISTED = 8
_GLOB = re.compile(r"[*?[]")


def assign(tree: Any, views: Any = None) -> dict[str, View | None]:
    """Decide for every parameter how it is read as matrices, or that the fallback has it.

    Args:
        tree: parameters, gradients or `jax.ShapeDtypeStruct`s: linen (boxed or plain), nnx, equinox,
          haiku or any other tree. Leaves masked by optax are left out.
        views: what to decide by hand; the default, None, decides all by role.

          - A pytree of views, a prefix of one, or a dict from paths to views. A view is a `View`, an
            `optax.contrib.MuonDimensionNumbers`, or None for the fallback. An entry holds for the
            parameter at its path, for all below it, and for those that it matches as a glob
            (`*/mixer/w`); where several fit, the longest decides, and the exact path before all.
          - A list of `Rule`s, tried in order.
          - A function from the tree to any of these.

          What none of them covers is decided by role, by `DEFAULT_RULES`.

    Returns:
        Path to view, None for the fallback, for every leaf in the tree's order.

    Raises:
        ValueError: a leaf is ambiguous; an entry or rule fits no parameter; a view does not fit its
          shape.
        TypeError: `views` holds something else than views.

    >>> up = {"kernel": jnp.zeros((8, 32)), "bias": jnp.zeros(32)}
    >>> assign({"embed": jnp.zeros((64, 8)), "up": up})
    {'embed': None, 'up/bias': None, 'up/kernel': View(rows=(-2,), cols=(-1,), split=None)}
    >>> assign({"mixer": {"w": jnp.zeros((4, 8, 16))}})
    Traceback (most recent call last):
    ValueError: mixer/w of shape (4, 8, 16) may be 4 matrices of 8 x 16 or none; pass one of
      views={'mixer/w': View(rows=1, cols=2)}
      views={'mixer/w': None}
    """
    return {path: decision.view for path, decision in _decide(tree, views).items()}


def label(params: Any, views: Any = None) -> Labels:
    """Show which parameters go to Muon, as what matrices, and why: `print(label(params))`.

    Args:
        params: parameters or `jax.ShapeDtypeStruct`s, as for `assign`.
        views: as for `assign` and `muon`.

    Returns:
        The table: printable, and as data in `.rows`.

    Raises:
        ValueError: as `assign` does.

    >>> params = {"layers": {"norm": jnp.zeros((12, 8)), "up_proj": jnp.zeros((12, 8, 32))}}
    >>> print(label(params))
    path            shape        matrices       optimizer  reason
    layers/norm     [12, 8]      -              adamw      norm
    layers/up_proj  [12, 8, 32]  12 x (8 x 32)  muon       matrix
    <BLANKLINE>
    optimizer  leaves  parameters  share
    muon       1       3,072       97.0%
    adamw      1       96          3.0%
    """
    leaves = named_leaves(params, is_leaf=is_masked)
    return Labels(
        tuple(
            _row(path, leaves[path], decision) for path, decision in _decide(params, views).items()
        )
    )


def _decide(tree: Any, views: Any) -> dict[str, Decision]:
    named = named_leaves(tree, is_leaf=is_masked)
    leaves = {path: leaf for path, leaf in named.items() if not is_masked(leaf)}
    said = _user_decision(tree, views)
    verdicts = {path: _verdict(path, leaf, said) for path, leaf in leaves.items()}
    unclear = {path: decision for path, decision in verdicts.items() if decision.interpretations}
    if unclear:
        raise ValueError(_ambiguity(unclear, {path: np.shape(leaves[path]) for path in unclear}))
    return verdicts


def _verdict(path: str, leaf: Any, said: Callable[[ParamInfo], Decision | None]) -> Decision:
    shape = tuple(np.shape(leaf)) if hasattr(leaf, "dtype") else ()
    decision = said(ParamInfo.of(path, shape))
    if not jnp.issubdtype(_dtype(leaf), jnp.inexact):
        if decision is not None and decision.view is not None:
            raise ValueError(
                f"{path} is {_dtype(leaf)}, which has no gradient; its view must be None."
            )
        return Decision(None, "not floating point")
    if decision is None:
        return classify(path, shape)
    if decision.view is not None:
        _on(path, shape, decision.view)
    return decision


def _user_decision(tree: Any, views: Any) -> Callable[[ParamInfo], Decision | None]:
    """What `views` says of a leaf: a function that gives None where it says nothing."""
    if views is None:
        return lambda leaf: None
    if isinstance(views, Rule):
        views = [views]
    if isinstance(views, list | tuple) and views and all(isinstance(rule, Rule) for rule in views):
        return _by_rules(tree, tuple(views))
    entries = named_leaves(views, is_leaf=_is_view)
    if callable(views) and not any(map(_is_view, entries.values())):
        return _user_decision(tree, views(tree))
    return _by_entries(tree, {path: _entry(path, view) for path, view in entries.items()})


def _by_rules(tree: Any, rules: tuple[Rule, ...]) -> Callable[[ParamInfo], Decision | None]:
    known = _known(tree)
    leaves = [
        ParamInfo.of(path, np.shape(leaf)) for path, leaf in known.items() if hasattr(leaf, "dtype")
    ]
    hidden = any(map(is_masked, known.values()))
    for rule in rules:
        if not hidden and rule not in DEFAULT_RULES and not any(map(rule.fits, leaves)):
            paths = _list(leaf.role for leaf in leaves)
            raise ValueError(
                f"The rule {rule.pattern!r} ({rule.reason}) fits no parameter of {paths}."
            )

    def said(leaf: ParamInfo) -> Decision | None:
        rule = next((rule for rule in rules if rule.fits(leaf)), None)
        return None if rule is None else rule.decision(leaf)

    return said


def _by_entries(
    tree: Any, entries: Mapping[str, View | None]
) -> Callable[[ParamInfo], Decision | None]:
    known = _known(tree)
    fitting = {path: _fitting(entries, path) for path in known}
    hidden = [path for path, leaf in known.items() if is_masked(leaf)]
    used = set(itertools.chain(*fitting.values()))
    for entry in entries:
        if entry not in used and not any(_may_hide(path, entry) for path in hidden):
            close = difflib.get_close_matches(entry, known, n=3, cutoff=0.4)
            raise ValueError(
                f"views[{entry!r}] fits no parameter; there are {_list(close or known)}."
            )

    def said(leaf: ParamInfo) -> Decision | None:
        if not fitting[leaf.path]:
            return None
        best = leaf.path if leaf.path in entries else max(fitting[leaf.path], key=len)
        equals = [entry for entry in fitting[leaf.path] if len(entry) == len(best)]
        if best != leaf.path and any(entries[entry] != entries[best] for entry in equals):
            raise ValueError(
                f"{leaf.path} fits {_list(equals)} of views, which disagree; name it in full."
            )
        return Decision(entries[best], f"views[{best!r}]" if best else "views")

    return said


def _known(tree: Any) -> dict[str, Any]:
    """Every position an entry may name: leaves, masked leaves, an equinox module's Nones."""
    return named_leaves(tree, is_leaf=lambda node: node is None or is_masked(node))


def _fitting(entries: Mapping[str, View | None], path: str) -> list[str]:
    """The entries for a path: its own, those of the modules above it, and globs."""
    above = itertools.accumulate(path.split("/"), "{}/{}".format)
    named = dict.fromkeys(("", *above))
    globs = (entry for entry in entries if _GLOB.search(entry) and entry not in named)
    return [
        *(name for name in named if name in entries),
        *(entry for entry in globs if fnmatch.fnmatchcase(path, entry)),
    ]


def _may_hide(masked: str, entry: str) -> bool:
    """Whether an entry may be for what a mask hides, which can be a whole subtree."""
    return masked == "" or entry.startswith(f"{masked}/") or bool(_GLOB.search(entry))


def _is_view(node: Any) -> bool:
    return node is None or isinstance(node, View | optax.contrib.MuonDimensionNumbers)


def _entry(path: str, view: Any) -> View | None:
    try:
        return as_view(view)
    except TypeError as error:
        raise TypeError(f"views[{path!r}]: {error}") from None


def _on(path: str, shape: tuple[int, ...], view: View) -> tuple[Any, ...]:
    try:
        return view.bind(shape).blocks
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _row(path: str, leaf: Any, decision: Decision) -> Row:
    shape = tuple(np.shape(leaf)) if hasattr(leaf, "dtype") else ()
    blocks = () if decision.view is None else _on(path, shape, decision.view)
    return Row(path, shape, str(_dtype(leaf)), blocks, decision.reason)


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", None) or np.asarray(leaf).dtype


def _ambiguity(unclear: Mapping[str, Decision], shapes: Mapping[str, tuple[int, ...]]) -> str:
    path, decision = next(iter(unclear.items()))
    one, other = decision.interpretations
    lines = [
        f"{path} of shape {shapes[path]} may be {one.words} or {other.words}; pass one of",
        *(f"  views={{{path!r}: {reading.code}}}" for reading in decision.interpretations),
    ]
    if len(unclear) > 1:
        lines.append(f"As ambiguous: {_list(list(unclear)[1:])}.")
    return "\n".join(lines)


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more
