"""The default table: what parameters are, by the names that JAX libraries give them.

Read from the top; the first row that fits decides. Moonlight (arXiv 2502.16982, section 2.2) uses
AdamW "for RMSNorm, LM head, and embedding parameters" and Muon for the matrices; its Fig. 4 and 9
show routers under Muon, so they are matrices here too (`views={"*router*": None}` gives them to
AdamW). Biases, depthwise convolutions and whatever else is no matrix go to AdamW as well.

A row of `TABLE` says what a parameter is. Where the name alone does not tell the axes, it names a
reader (`readers.py`), which asks the tree and gives every reading that the evidence allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from optax_muon.matrices import readers
from optax_muon.matrices.evidence import Tree, is_norm
from optax_muon.matrices.likelihood import by_likelihood
from optax_muon.matrices.rules import Decision, Interpretation, Kind, ParamInfo, Rule, readings
from optax_muon.matrices.views import View

# ---- names ---------------------------------------------------------------------------------------

_BIAS = r"(\w+_)?bias(_\w+)?"
_SCALE = (
    r"(\w+_)?scales?|scale_\w+|(\w+_)?gamma(_\w+)?|((pre|post|res)_)?beta|offset|shift|alpha|temperature|gain"
    r"|(\w+_)?layer_?scale\w*(/\w+)?|ls\d*(/\w+)?|lambda\d*"
)
_HEAD = (
    r"lm_?head|logits?(_?\w+)?|(?!pre)\w*logits|unembed\w*|output_layer|readout|decode_head"
    r"|^((params|model)/)?(\w*head|output|classifier)"
    r"|(\w+_)?(pred\w*|scores?|logits?|class\w*|cls|box\w*|label|value|policy|action|reward)_?head"
)
_TABLE_NAMES = (
    r"\w*embed(ding|dings|der)?s?(_table)?|\w*embedding_table|(\w+_)?emb(_var)?|wte|wpe|(\w+_)?pos(ition\w*)?"
    r"|(\w+_)?(cls|tokens?)|rel(pos|ative)\w*_?(bias|table|embedding)|\w*_embed(ding)?s?_\w+"
    r"|input_embedding|embed\w*"
)
_STATE = r"a_log|dt|\w*decay\w*|(\w+_)?sinks?|time_(mix|first|maa)\w*|x_\w|probe|register\w*"
_STATE_SPACE = r"\w*(mamba|ssm|ssd|delta_?net|linear_att(n|ention))\w*"
_DEPTHWISE = r"dw|dw_?conv\w*|\w*depthwise\w*|\w*short_conv\w*"
_CONV = r"\w*conv\w*"
_PROJECTIONS = (
    r"\w*(kernel|proj\w*|projection\w*|dense\w*|linear\w*|einsum\w*)|fc\d*|c_(attn|fc|proj)"
    r"|(w|wi|wo)\d*|w[a-z]{1,3}(_(a|b|in|out))?|w[esh]?_\w+|\w*_w|(up|down|gate|query|key|value|out|gating)(_\w+)?"
    r"|[qkvo]|qkv|kv|[qkv]{2,3}_\w+|(q|k|v|o)_\w+|to_\w+|weight_\w+|\w*_weights?"
    r"|\w*_kernel|\w*kernel\w*|u_\w+|w\w?_?\d|\w+_w[ioqkv]"
)


@dataclasses.dataclass(frozen=True)
class RuleRow:
    """A row of the table: what parameters of this name are, and how their axes are found."""

    rule: Rule
    """Which parameters."""
    reader: readers.Reader | None = None
    """What the tree says of their axes; None for AdamW, or where the rule's view holds."""
    kind: Kind = Kind.ORDINARY
    """What they are where they go to AdamW."""


def _kernel(names: str) -> str:
    """A parameter called so, or the kernel of a module called so."""
    return rf"({names})(/(kernel|w|weight))?"


# ---- conditions ----------------------------------------------------------------------------------


def _is_vector(info: ParamInfo) -> bool:
    return len(info.long_axes) < 2


def _is_matrix(info: ParamInfo) -> bool:
    return len(info.long_axes) == 2


def _is_higher(info: ParamInfo) -> bool:
    return len(info.long_axes) > 2


def _has_one_input_channel(info: ParamInfo) -> bool:
    """A convolution of one input channel: depthwise, or of an image without colours."""
    own = info.own
    if len(own) < 3:
        return False
    inputs_last = not info.out_first and own[-2] == 1 and max(own[:-2]) <= readers.WIDEST_KERNEL
    # `[channels, 1, taps]` is stored by other names than `weight` too.
    longest = info.out_first or own[0] > max(own[2:])
    return inputs_last or (longest and own[1] == 1 and max(own[2:]) <= readers.WIDEST_KERNEL)


def _is_filter(info: ParamInfo) -> bool:
    """A convolution from one channel to one: `[4, 4, 1, 1]`."""
    own = info.own
    return len(own) > 3 and (own[:2] if info.out_first else own[-2:]) == (1, 1)


def _is_flat(info: ParamInfo) -> bool:
    return len(info.own) == 2


def _is_spatial(info: ParamInfo) -> bool:
    return len(info.own) > 2


# ---- the table -----------------------------------------------------------------------------------

TABLE: tuple[RuleRow, ...] = (
    RuleRow(
        Rule(
            r"\w*lora_?[ab]\w*(/(kernel|w|weight))?|\w*lora\w*/[ab](/\w+)?",
            None,
            "low-rank adapter",
        ),
        readers.adapter,
    ),
    RuleRow(Rule(r".*", None, "norm", when=lambda info: is_norm(info.role))),
    RuleRow(Rule(_BIAS, None, "bias")),
    RuleRow(Rule(r"b\d*", None, "bias"), readers.bias),
    RuleRow(Rule(r"\w+_b", None, "bias"), readers.bias_of_pair),
    RuleRow(Rule(_SCALE, None, "scale")),
    RuleRow(
        Rule(
            rf"({_HEAD})(/(\w*kernel|w|weight|\w*head|decoder|dense|linear|layers|mlp|out\w*))*",
            None,
            "output head",
        ),
        readers.head,
        Kind.HEAD,
    ),
    RuleRow(
        Rule(
            rf"({_TABLE_NAMES})(/(embeddings?|weight|table|value|{_TABLE_NAMES}))*",
            None,
            "embedding",
        )
    ),
    RuleRow(
        Rule(
            r"(\w*patch\w*|\w*embed\w*)(/(proj\w*|conv\w*))?/(kernel|w|weight)",
            None,
            "patch embedding",
            when=_is_higher,
        )
    ),
    RuleRow(
        Rule(r"\w*embed\w*(/\w+)*/(kernel|w|weight)", None, "embedding", when=_is_matrix),
        readers.one_hot_table,
    ),
    RuleRow(Rule(r".*", None, "vector or scalar", when=_is_vector)),
    RuleRow(Rule(_STATE, None, "state, decay or token")),
    RuleRow(Rule(rf"{_STATE_SPACE}/in_proj\w*(/\w+)?", None, "fused input of a state space")),
    RuleRow(Rule(rf"({_DEPTHWISE})(/\w+)?", None, "depthwise convolution")),
    RuleRow(
        Rule(rf"{_CONV}(/\w+)?", None, "depthwise convolution", when=_has_one_input_channel),
    ),
    RuleRow(Rule(r"\w*kernel|\w*weight|w", None, "filter of one channel", when=_is_filter)),
    RuleRow(
        Rule(
            rf"{_CONV}(/(kernel|w|weight|\w*kernel))?|{_CONV}/conv\w*/\w+",
            None,
            "convolution",
            when=_is_spatial,
        ),
        readers.convolution,
    ),
    RuleRow(
        Rule(
            rf"{_CONV}(/(kernel|w|weight))?", None, "may be a depthwise convolution", when=_is_flat
        ),
        readers.short_convolution,
    ),
    RuleRow(
        Rule(r"(\w*router\w*|(moe\w*/)?\w*expert_gate)(/\w+)?", None, "router"), readers.router
    ),
    # DeepSeek-V4's output projections, as MaxText names them.
    RuleRow(
        Rule(_kernel("o_a_proj"), None, "projection of a group", when=_is_higher), readers.grouped
    ),
    RuleRow(Rule(r".*", None, "attention", when=_is_higher), readers.attention),
    RuleRow(Rule(r".*", None, "parts of a fused kernel", when=_is_higher), readers.fused_parts),
    RuleRow(Rule(r".*", None, "expert", when=_is_higher), readers.experts),
    RuleRow(Rule(r".*", None, "convolution", when=_is_spatial), readers.unnamed_convolution),
    RuleRow(
        Rule(rf"(\w+/)?({_PROJECTIONS})", None, "projection", when=_is_higher), readers.projection
    ),
    RuleRow(
        Rule(
            _kernel(r"\w*qkv(_proj)?|c_attn|query_key_value|gate_up(_proj)?"),
            None,
            "fused matrices, taken whole",
            when=_is_matrix,
        ),
        readers.matrix,
    ),
    RuleRow(
        Rule(
            rf"(\w+/)?({_PROJECTIONS})|\w+/w(eights?)?|weights?|.*kernel",
            None,
            "matrix",
            when=_is_matrix,
        ),
        readers.matrix,
    ),
)
"""Every row, in the order in which they are tried."""

DEFAULT_RULES: tuple[Rule, ...] = tuple(row.rule for row in TABLE)
"""The rules of the table. Among your own rules they mean: decide the rest by the table."""


def classify(path: str, tree: Tree) -> Decision:
    """Decide a parameter by the table and the evidence of its tree.

    >>> tree = Tree({"layers/attn_norm/scale": (12, 512), "layers/q_proj/kernel": (12, 512, 512)})
    >>> classify("layers/attn_norm/scale", tree)
    Decision(view=None, reason='norm', interpretations=(), kind=<Kind.ORDINARY: 'ordinary'>)
    >>> classify("layers/q_proj/kernel", tree).view
    View(rows=(-2,), cols=(-1,), split=None)
    """
    decisions = [_classify(info, tree) for info in tree.infos(path)]
    shape = tree.shapes[path]
    ways = {_sides(decision.view, shape) for decision in decisions}
    if len(ways) == 1 and not any(decision.interpretations for decision in decisions):
        return decisions[0]
    offered = [
        i for d in decisions for i in d.interpretations or (Interpretation.of(d.view, shape),)
    ]
    unique = _unique(by_likelihood(offered, path, tree), shape)
    return Decision(None, decisions[0].reason, unique, decisions[0].kind)


def refuse(path: str, tree: Tree, likely: list[View | None], reason: str) -> Decision:
    """Refuse a parameter, with every way to read it, the likelier first."""
    shape, info = tree.shapes[path], tree.info(path)
    plain = dataclasses.replace(info, stack=())
    every: list[View | None] = [*readings(info), *readings(plain), None]
    groups = ([Interpretation.of(view, shape) for view in views] for views in (likely, every))
    offered = [one for group in groups for one in by_likelihood(group, path, tree)]
    return Decision(None, reason, _unique(offered, shape))


def _classify(info: ParamInfo, tree: Tree) -> Decision:
    for row in TABLE:
        if not row.rule.fits(info):
            continue
        if row.reader is None:
            return Decision(None, row.rule.reason, kind=row.kind)
        found = row.reader(info, tree)
        if found.views is None:
            continue
        reason = found.reason or row.rule.reason
        if len({_sides(view, info.shape) for view in found.views}) == 1:
            view = from_end(found.views[0], info.shape)
            return Decision(view, reason, kind=row.kind if view is None else Kind.ORDINARY)
        return refuse(info.path, tree, list(found.views), reason)
    return refuse(info.path, tree, [], "name without a role")


def _unique(
    offered: Iterable[Interpretation], shape: tuple[int, ...]
) -> tuple[Interpretation, ...]:
    """The readings without those that cut a parameter into the same matrices."""
    unique: dict[object, Interpretation] = {}
    for one in offered:
        unique.setdefault(_sides(one.view, shape), one)
    return tuple(unique.values())


def _sides(view: View | None, shape: tuple[int, ...]) -> object:
    """What two views must share to cut a parameter into the same matrices."""
    if view is None:
        return None
    bound = view.bind(shape)
    sides = (bound.row_axes, bound.col_axes)
    return frozenset(frozenset(a for a in axes if shape[a] > 1) for axes in sides)


def from_end(view: View | None, shape: tuple[int, ...]) -> View | None:
    """The view with its axes counted from the end, as a stack in front leaves them."""
    if view is None:
        return None
    bound, rank = view.bind(shape), len(shape)
    rows, cols = (tuple(a - rank for a in axes) for axes in (bound.row_axes, bound.col_axes))
    return View(rows, cols)
