"""Readers: how the axes of a parameter are found where its name does not tell them.

A reader gets a parameter and its tree and gives every reading that the evidence allows. One reading
decides; several are ambiguous, and the caller refuses; none says that the reader does not apply.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

from optax_muon.matrices.evidence import Tree, module_of
from optax_muon.matrices.rules import ParamInfo
from optax_muon.matrices.views import Axes, View

_ATTENTION = re.compile(r"(.*/)?\w*att(n|ention)\w*(/.*)?")
_EXPERTS = re.compile(
    r"(.*/)?(\w*experts?|\w*(moe|mixture)(?!\w*(layers|blocks))\w*)(/.*)?|(.*/)?we_\w+(/\w+)?"
)
_ROUTER = re.compile(r"(.*/)?(\w*router\w*|(\w+_)?gate|gating)(/(kernel|w|weight))?")
_IN = {
    "q": frozenset({"q", "query", "queries", "wq", "qproj"}),
    "k": frozenset({"k", "key", "keys", "wk", "kproj"}),
    "v": frozenset({"v", "value", "values", "wv", "vproj"}),
    "kv": frozenset({"kv", "wkv"}),
    "qkv": frozenset({"qkv", "wqkv"}),
}
_OUT = frozenset({"o", "out", "wo", "output", "post", "oproj"})
_FUSED = {"qkv": 3, "kv": 2, "gates": 2}
WIDEST_KERNEL = 32
"""Kernels of convolutions are no wider; patches of vision transformers are the widest."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a reader found."""

    views: tuple[View | None, ...] | None
    """Every reading that the evidence allows; None if the reader does not apply."""
    reason: str = ""
    """Why, if not for the reason of the table."""


NOTHING = Found(None)


def matrix(info: ParamInfo, tree: Tree) -> Found:
    """Two axes: a matrix, stored (out, in) under `weight`."""
    first, second = info.long_axes
    return Found((View(second, first) if info.out_first else View(first, second),))


def bias(info: ParamInfo, tree: Tree) -> Found:
    """`b`: a bias if it is a vector, stacked, or beside the weights of its module."""
    beside = len(tree.modules[module_of(info.path)]) > 1
    vector = len(info.long_axes) < 2 or info.stack or beside
    return Found((None,)) if vector else NOTHING


def bias_of_pair(info: ParamInfo, tree: Tree) -> Found:
    """`query_b` beside `query_w` is its bias; alone it may be a second projection."""
    paired = f"{info.path.removesuffix('b')}w" in tree.shapes
    return Found((None,)) if paired else NOTHING


def one_hot_table(info: ParamInfo, tree: Tree) -> Found:
    """A dense layer on one-hot tokens is an embedding, if the head writes as many."""
    return Found((None,)) if info.path in tree.vocabularies.get(info.own[0], ()) else NOTHING


def short_convolution(info: ParamInfo, tree: Tree) -> Found:
    """Two axes below a convolution: a matrix, or the taps of each channel."""
    found = matrix(info, tree).views or ()
    wide = min(info.own) > WIDEST_KERNEL
    return Found(found, "pointwise convolution") if wide else Found((*found, None))


def router(info: ParamInfo, tree: Tree) -> Found:
    """A router `[d, experts]`."""
    if len(info.long_axes) == 2:
        return matrix(info, tree)
    found = (matrix(_without(info, axis), tree).views or () for axis in info.long_axes)
    return Found(tuple(view for views in found for view in views))


def head(info: ParamInfo, tree: Tree) -> Found:
    """An output head; of several kernels below it, those that another one reads are inside."""
    module = _head_module(info.path)
    below = [p for p in tree.shapes if p.startswith(f"{module}/")] if module else []
    kernels = [k for p in below if len((k := tree.info(p)).long_axes) > 1]
    if len(info.long_axes) > 1:
        written = _channels(info)[1]
        reads = [_channels(kernel)[0] for kernel in kernels if kernel.path != info.path]
        if written in reads:
            found = matrix(info, tree) if len(info.long_axes) == 2 else NOTHING
            return dataclasses.replace(found, reason="a layer of the head that another one reads")
    return Found((None,))


def adapter(info: ParamInfo, tree: Tree) -> Found:
    """A low-rank pair `A [.., in, r]`, `B [.., r, out]`: its rank ends A and begins B.

    In front of it may stand axes that both have: layers, experts.
    """
    axes = info.own_axes
    first = re.search(r"(lora_?|lora\w*/)a", info.role) is not None
    partner = _partner(info, tree, first)
    if partner is None:
        if len(info.long_axes) == 2:
            return matrix(dataclasses.replace(info, role="w"), tree)
        return Found(
            (
                View(axes[:-1], axes[-1]) if first else View(axes[0], axes[1:]),
                View(axes[-2], axes[-1]),
            )
        )
    down, up = (info, partner) if first else (partner, info)
    views = []
    for batch in range(min(len(down.own), len(up.own)) - 1):
        same = down.own[:batch] == up.own[:batch]
        if same and down.own[-1] == up.own[batch]:
            split = len(axes) - 1 if first else batch + 1
            views.append(View(axes[batch:split], axes[split:]))
    ones = up.own[:-2]
    if not views and len(ones) > 1 and set(ones) == {1} and down.own[-1] == up.own[-2]:
        # That of a convolution: `[3, 3, in, r]`, and a pointwise one out of the rank.
        views = [View(axes[:-1], axes[-1])]
    return Found(tuple(views)) if views else NOTHING


def convolution(info: ParamInfo, tree: Tree) -> Found:
    """A convolution: `H W I O` in Flax, Haiku and Keras, `O I H W` under `weight`."""
    views = []
    for spatial in _spatial_counts(info):
        axes = info.own_axes[-2 - spatial :]
        view = View(axes[1:], axes[0]) if info.out_first else View(axes[:-1], axes[-1])
        views.append(view)
    bias = tree.bias(info.path)
    if bias is not None and len([n for n in bias if n > 1]) <= 1:
        # One bias per output and no other axis: nothing is stacked.
        views = views[:1]
    return Found(tuple(views))


def unnamed_convolution(info: ParamInfo, tree: Tree) -> Found:
    """A convolution by its shape: small equal spatial axes, and a bias or norm of its outputs."""
    own, axes = info.own, info.own_axes
    if len(own) != 4 or not re.search(r"kernel|weight|(^|/)w$", info.role):
        return NOTHING
    spatial, channels = (own[2:], own[:2]) if info.out_first else (own[:2], own[2:])
    if spatial[0] != spatial[1] or spatial[0] > WIDEST_KERNEL:
        return NOTHING
    out = channels[0] if info.out_first else channels[1]
    bias = tree.bias(info.path)
    shown = bias is not None and [n for n in bias if n > 1] == [out]
    odd = spatial[0] % 2 == 1 and tree.settled(info.path) and spatial[0] < min(channels)
    if not (shown or odd):
        return NOTHING
    view = View(axes[1:], axes[0]) if info.out_first else View(axes[:-1], axes[-1])
    return Found(
        (view,), "convolution, by its shape and bias" if shown else "convolution, by its shape"
    )


def attention(info: ParamInfo, tree: Tree) -> Found:
    """Query, key, value and output with heads as axes: one axis is the model's width."""
    kind = _attention_kind(info, tree)
    if kind is None or kind in _FUSED:
        return NOTHING
    axes = info.long_axes
    ways = _into_one_and_rest(info, tree, axes)
    if len(ways) > 1:
        ways = _fitting(info, tree, kind, ways) or ways
    if len(ways) > 1 and _is_general_kernel(info, tree, kind):
        ways = [axes[-1]] if kind == "o" else [axes[0]]
    views = [_one_and_rest(axes, way, kind == "o") for way in ways]
    if len(info.own) > len(axes) == 3 and not _is_apart(info, tree):
        # One head, and of the other axes one may be layers.
        views += [View(one, other) for one, other in itertools.combinations(axes, 2)]
    return Found(tuple(views), "out of heads" if kind == "o" else "into heads")


def fused_parts(info: ParamInfo, tree: Tree) -> Found:
    """Kernels of equal parts along an axis: q, k and v, k and v, gate and up. Parts are batch."""
    kind = _fused_kind(info, tree)
    if kind is None:
        return NOTHING
    axes = info.long_axes
    parts = [a for a in axes if info.shape[a] == _FUSED[kind]]
    views: list[View | None] = []
    for part in parts:
        rest = tuple(a for a in axes if a != part)
        ways = _into_one_and_rest(info, tree, rest)
        # Two axes beside the parts are a matrix, whichever of them is the model's width.
        ways = ways[:1] if len(rest) == 2 else ways
        views += [_one_and_rest(rest, way, info.out_first) for way in ways]
    if not parts:
        # Grouped queries: [d, q + k + v heads, head_dim] has no axis of parts.
        ways = _into_one_and_rest(info, tree, axes)
        if len(ways) > 1 and _is_general_kernel(info, tree, kind):
            ways = [axes[0]]
        views = [_one_and_rest(axes, way, False) for way in ways]
    return Found(tuple(views), "equal parts of a fused kernel")


def projection(info: ParamInfo, tree: Tree) -> Found:
    """`[d, n, h]` outside attention, d the width, in a layer that is not stacked; and its inverse.

    The first axis is contracted, the others are produced. `[n, h, d]` is its inverse only if a
    kernel beside it makes these n and h; it may be n matrices otherwise.
    """
    axes = info.long_axes
    unstacked = tree.settled(info.path) and not info.stack and tree.has_vector_norm(info.path)
    if len(axes) != 3 or not unstacked or _in_experts(info, tree):
        return NOTHING
    wide = [a for a in axes if info.shape[a] in tree.widths(info.path)]
    if wide == [axes[0]]:
        return Found((_one_and_rest(axes, axes[0], False),), "projection of the width")
    inverse = tuple(info.shape[a] for a in (axes[-1], *axes[:-1]))
    made = [p for p in tree.peers(info.path) if p.path != info.path and p.shape == inverse]
    if wide == [axes[-1]] and made:
        return Found((_one_and_rest(axes, axes[-1], True),), "projection to the width")
    return NOTHING


def experts(info: ParamInfo, tree: Tree) -> Found:
    """Experts `[E, in, out]`: all share the axis of experts, which is what the router writes."""
    if len(info.long_axes) != 3 or not _in_experts(info, tree) or _ATTENTION.fullmatch(info.role):
        return NOTHING
    axes = info.long_axes
    written = {_fans(r)[1] for r in _routers(info, tree)}
    ways = [a for a in axes if info.shape[a] in written]
    if len(ways) != 1:
        named = [a for a in ways or axes if a in _shared_axes(info, tree)]
        ways = named or ways
    if not ways:
        ways = list(axes)
    views = [matrix(_without(info, way), tree).views for way in ways]
    return Found(tuple(view for found in views for view in found or ()), "expert")


def grouped(info: ParamInfo, tree: Tree) -> Found:
    """A grouped projection `[groups, in, out]`: every group has a matrix of its own."""
    if len(info.long_axes) != 3:
        return NOTHING
    return Found((View(*info.long_axes[1:]),))


# ---- attention -----------------------------------------------------------------------------------


def _attention_kind(info: ParamInfo, tree: Tree) -> str | None:
    """Which projection of an attention this is: `q`, `k`, `v`, `o`, `kv` or `qkv`."""
    kind = _kind(info)
    inside = _ATTENTION.fullmatch(info.role.rpartition("/")[0]) is not None
    others = {_kind(peer) for peer in tree.peers(info.path) if peer.path != info.path}
    with_others = bool(others & {"q", "k", "v", "kv", "qkv"})
    if kind in _IN:
        return kind
    if kind == "o":
        return kind if inside or with_others else None
    # One that is left beside queries and keys is the output, if no other is.
    last = with_others and "o" not in others and (inside or "q" in others)
    if last and len(info.long_axes) == 3:
        return "o"
    return None


def _kind(info: ParamInfo) -> str | None:
    tokens = set(info.name.split("_"))
    for kind in ("qkv", "kv", "q", "k", "v"):
        if tokens & _IN[kind]:
            return kind
    if {"c", "attn"} <= tokens or "query_key_value" in info.name:
        return "qkv"
    return "o" if tokens & _OUT else None


def _into_one_and_rest(info: ParamInfo, tree: Tree, axes: Axes) -> list[int]:
    """The axes that may be the width of the model, by the widths around and by the bias."""
    ways = list(axes)
    widths = tree.widths(info.path)
    wide = [a for a in ways if info.shape[a] in widths]
    ways = wide or _by_head_norms(info, tree, axes) or ways
    bias = tree.bias(info.path)
    if bias is not None and len(ways) > 1:
        long = tuple(n for n in bias if n > 1)
        fit = [
            a
            for a in ways
            if long in (tuple(info.shape[b] for b in axes if b != a), (info.shape[a],))
        ]
        ways = fit or ways
    return ways


def _by_head_norms(info: ParamInfo, tree: Tree, axes: Axes) -> list[int]:
    """A norm of queries or keys scales the features of a head, or latents that heads read."""
    scaled = [a for a in axes if info.shape[a] in tree.head_norms(info.path)]
    if scaled == [axes[0]]:
        return scaled
    return [a for a in axes if a not in scaled] if scaled == [axes[-1]] else []


def _fitting(info: ParamInfo, tree: Tree, kind: str, ways: list[int]) -> list[int]:
    """The axes for which query, key, value and output fit each other.

    All have one width, and the output takes the heads that the queries make.
    """
    peers = {_attention_kind(p, tree): p for p in tree.peers(info.path) if len(p.long_axes) == 3}
    query, out = peers.get("q"), peers.get("o")
    if query is None or out is None:
        return []
    fits = [
        (a, b)
        for a in _into_one_and_rest(query, tree, query.long_axes)
        for b in _into_one_and_rest(out, tree, out.long_axes)
        if query.shape[a] == out.shape[b] and _rest(query, a) == _rest(out, b)
    ]
    if kind == "o":
        return sorted({b for _, b in fits}) if out.path == info.path else []
    places = {query.long_axes.index(a) for a, _ in fits}
    found = [info.long_axes[place] for place in sorted(places)]
    return [a for a in found if a in ways]


def _is_apart(info: ParamInfo, tree: Tree) -> bool:
    """Whether it is known that no layers are stacked, or where they are."""
    return bool(info.stack) or info.indexed or tree.has_vector_norm(info.path)


def _rest(info: ParamInfo, axis: int) -> tuple[int, ...]:
    return tuple(info.shape[a] for a in info.long_axes if a != axis)


def _one_and_rest(axes: Axes, one: int, out: bool) -> View:
    rest = tuple(a for a in axes if a != one)
    return View(rest, one) if out else View(one, rest)


def _is_general_kernel(info: ParamInfo, tree: Tree, kind: str) -> bool:
    """Whether it is a `kernel` of Flax's `DenseGeneral`: inputs in front, outputs behind.

    That holds for its attention; other kernels may be an einsum's, so the model's width must stand
    where `DenseGeneral` puts it and be the longest axis.
    """
    own = [info.shape[a] for a in info.long_axes]
    edge, rest = (own[-1], own[:-1]) if kind == "o" else (own[0], own[1:])
    named = info.role.endswith("/kernel") and "einsum" not in info.role
    return named and tree.settled(info.path) and edge > max(rest)


# ---- parts and experts ---------------------------------------------------------------------------


def _fused_kind(info: ParamInfo, tree: Tree) -> str | None:
    kind = _kind(info)
    if kind in ("kv", "qkv"):
        return kind if kind in _FUSED else None
    gates = re.search(
        r"(^|/)(\w*gat(e|ing)\w*|wi|up_gate\w*|gate_up\w*)(/(kernel|w|weight))?$", info.role
    )
    lone = (
        gates and len(info.long_axes) == 3 and [info.shape[a] for a in info.long_axes].count(2) == 1
    )
    return "gates" if lone else None


def _in_experts(info: ParamInfo, tree: Tree) -> bool:
    return _EXPERTS.fullmatch(info.role) is not None or bool(_routers(info, tree))


def _routers(info: ParamInfo, tree: Tree) -> list[ParamInfo]:
    """The routers beside a parameter, or beside the module of it."""
    home = module_of(info.path).rpartition("/")[0]
    near = [*tree.homes[home], *tree.homes[home.rpartition("/")[0]]]
    found = (tree.info(path) for path in near if _ROUTER.fullmatch(tree.plain[path].role))
    return [r for r in found if len(r.long_axes) == 2 and r.path != info.path]


def _shared_axes(info: ParamInfo, tree: Tree) -> list[int]:
    """Axes whose length and place all kernels beside a parameter share; alone, the first."""
    beside = [p for p in tree.peers(info.path) if len(p.long_axes) == 3 and p.path != info.path]
    if not beside:
        return list(info.long_axes[:1])
    places = range(3)
    return [
        info.long_axes[i]
        for i in places
        if all(p.shape[p.long_axes[i]] == info.shape[info.long_axes[i]] for p in beside)
    ]


def _without(info: ParamInfo, axis: int) -> ParamInfo:
    return dataclasses.replace(info, stack=(*info.stack, axis))


def _channels(info: ParamInfo) -> tuple[int, int]:
    """Inputs and outputs of a dense layer or of a convolution."""
    if len(info.own) < 3:
        return _fans(info)
    first, second = info.own[:2] if info.out_first else info.own[-2:]
    return (second, first) if info.out_first else (first, second)


def _fans(info: ParamInfo) -> tuple[int, int]:
    first, last = (info.shape[a] for a in info.long_axes[-2:])
    return (last, first) if info.out_first else (first, last)


# ---- adapters, convolutions and heads ------------------------------------------------------------


def _partner(info: ParamInfo, tree: Tree, first: bool) -> ParamInfo | None:
    """The other half of a low-rank pair: the path with `b` for `a`."""
    old, new = ("a", "b") if first else ("b", "a")
    for pattern in (
        rf"(lora_?){old}",
        rf"(lora\w*/){old}",
        rf"(LoRA_?){old.upper()}",
        rf"(lora_?){old.upper()}",
    ):
        replace = new.upper() if pattern.endswith(old.upper()) else new
        path = re.sub(pattern, rf"\g<1>{replace}", info.path)
        if path != info.path and path in tree.shapes:
            return tree.info(path)
    return None


def _spatial_counts(info: ParamInfo) -> list[int]:
    """How many spatial axes a convolution may have: all, or one less if a stack is in front."""
    own = info.own
    count = len(own) - 2
    unstacked = own[2:] if info.out_first else own[:-2]
    square = len(set(unstacked)) == 1 or 1 in unstacked
    named = re.search(rf"conv{count}", info.role)
    if count == 1 or info.indexed or info.stack or named or (count == 2 and square):
        return [count]
    return [count, count - 1]


def _head_module(path: str) -> str:
    """The outermost module that is called a head."""
    parts = path.split("/")
    for end in range(1, len(parts)):
        if re.fullmatch(r"\w*head\w*|classifier\w*|output\w*", parts[end - 1], re.IGNORECASE):
            return "/".join(parts[:end])
    return ""


Reader = Callable[[ParamInfo, Tree], Found]
"""What a row of the table may name."""
