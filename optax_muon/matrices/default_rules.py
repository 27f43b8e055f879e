"""The default table: which parameters are matrices, by the names that JAX libraries give them.

Read from the top, the first row that fits decides. Which matrices are Muon's follows Jordan (2024)
and Moonlight, arXiv 2502.16982, section 2: embeddings, the output head, norms, biases, routers and
whatever is no matrix stay with AdamW. The last rows fit anything; those with a rival that always
stands only say what their leaf may be, for the error. A row is described in `roles.py`.
"""

from __future__ import annotations

import functools
import math

from optax_muon.matrices.rules import Decision, Interpretation, ParamInfo, Rule
from optax_muon.matrices.views import Axes, BoundView, View

# Sides of a matrix that is taken for granted differ by no more: keys of one head are 8192 x 128.
_ELONGATED = 128
# No gate of an MLP narrows its input so far; every router does: 512 experts at a width of 2048.
_ROUTER_NARROWS = 4
# Layers are stacked in fewer numbers than they are wide, but for toys: 12 layers of width 8.
_LONG_STACK = 2

# ---- names ---------------------------------------------------------------------------------------

_BIAS = r"(\w+_)?bias(_\w+)?"
_NORM = r"\w*norm\w*|rms\w*|ln\d*|ln_\w+|\w+_ln"
_SCALE = r"(\w+_)?scales?|scale_\w+|gamma\w*|beta|offset|alpha|temperature"
_HEAD = r"lm_?head|logits\w*|unembed\w*|output_layer|^((params|model)/)?(\w*head|output|classifier)"
_EMBEDDING = (
    r"\w*embed\w*|(\w+_)?emb(_\w+)?|wte|wpe|(\w+_)?pos(ition\w*)?|(\w+_)?(cls|tokens?)"
    r"|relative_\w*(bias|table)"
)
_STATE = r"a_log|dt|\w*decay\w*|(\w+_)?sinks?|time_(mix|first|maa)\w*"
_STATE_SPACE = r"\w*(mamba|ssm|ssd|delta_?net|linear_att(n|ention))\w*"
_DEPTHWISE = r"dw|dw_?conv\w*|\w*depthwise\w*|\w*short_conv\w*"
_CONV = r"\w*conv\w*"
_CONV_ANY = rf"{_CONV}(/(kernel|w|weight))?"
_MOE = r"\w*(moe|mixture)\w*(?<!layers)(?<!blocks)"
_EXPERTS = r"\w*experts?\w*"
_GATE = r"gate|gating"
_MLP = r"\w*(mlp|ffn|ffw|feed_?forward)\w*"
_IN_MLP = (
    r"wi|w\d|fc\d*|c_fc|linear\d*|dense\d*|(gate|up|down|gate_up)(_proj)?|gating|intermediate\w*"
    rf"|{_MLP}(/\w+){{0,2}}"
)
_ATTENTION = r"\w*att(n|ention)\w*"
_TO_HEADS = r"(query|key|value|wq_b|wkv_b)/(kernel|w)"
_MAYBE_TO_HEADS = r"[qkv]|kv|w([qkv]|kv)(_b)?|([qkv]|kv)_proj|to_[qkv]|(query|key|value)(_proj)?"
_FROM_HEADS = rf"{_ATTENTION}/out/(kernel|w)"
_MAYBE_FROM_HEADS = rf"o_proj|{_ATTENTION}/(o|wo|out|output|proj|(out|output|c)_proj|to_out)"
_FUSED = r"\w*qkv(_proj)?|c_attn|query_key_value|gate_up(_proj)?"
_DENSE = (
    r"\w*proj|w\d|w[a-z]{1,3}(_[ab])?|fc\d*|c_(attn|fc)|(linear|dense)\w*|up|down|query|key|value"
)


def _of(names: str) -> str:
    """A parameter called so, or the kernel of a module called so."""
    return rf"({names})(/(kernel|w))?"


# ---- views, their axes counted from the end: whatever is stacked in front is batch ---------------

_MATRIX = View(-2, -1)
_OUT_FIRST = View(-1, -2)
_INTO_HEADS = View(-3, (-2, -1))
_OUT_OF_HEADS = View((-3, -2), -1)


def _hwio(spatial: int) -> View:
    return View(range(-2 - spatial, -1), -1)


def _oihw(spatial: int) -> View:
    return View(range(-1 - spatial, 0), -2 - spatial)


_AT_MOST_2, _AT_LEAST_2, _AT_LEAST_3 = range(3), range(2, 99), range(3, 99)


# ---- conditions ----------------------------------------------------------------------------------


def _is_vector(leaf: ParamInfo) -> bool:
    return sum(size > 1 for size in leaf.own) < 2


def _widens(leaf: ParamInfo) -> bool:
    fan_in, fan_out = leaf.fans
    return fan_out >= fan_in


def _narrows_like_a_router(leaf: ParamInfo) -> bool:
    fan_in, fan_out = leaf.fans
    return fan_in >= _ROUTER_NARROWS * fan_out


def _has_one_input_channel(leaf: ParamInfo) -> bool:
    return leaf.own[1 if leaf.out_first else -2] == 1


def _has_three_parts(leaf: ParamInfo) -> bool:
    return leaf.shape[-3] == 3


# ---- rivals --------------------------------------------------------------------------------------


def _stacked_elsewhere(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    """A stack longer than its matrices are wide is more likely stacked along the second axis."""
    block = bound.blocks[0]
    longest = max((leaf.shape[axis] for axis in bound.batch_axes), default=0)
    if longest <= _LONG_STACK * min(block.rows, block.cols):
        return None
    if 1 in bound.batch_axes:
        return Interpretation("none", None)
    rows, cols = (_renumber(axes, {1: 0}) for axes in (bound.row_axes, bound.col_axes))
    return Interpretation.of(View(rows, cols), leaf.shape)


def _too_elongated(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    block = bound.blocks[0]
    short, long = sorted((block.rows, block.cols))
    return Interpretation("too elongated for Muon", None) if long > _ELONGATED * short else None


def _stack_without_heads(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    """Heads are narrower than the model; where these are not, the first axis counts layers."""
    width_axes, head_axes = sorted((bound.row_axes, bound.col_axes), key=len)
    width, heads, head_dim = (leaf.shape[axis] for axis in (*width_axes, *head_axes))
    plausible = head_dim < width or heads == 1
    return None if plausible else Interpretation.of(_MATRIX, leaf.shape)


def _unnamed_stack(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    """Where the path shows no layer, the first axis may count layers that were stacked unnamed."""
    return None if leaf.stack or leaf.indexed else Interpretation.of(_MATRIX, leaf.shape)


def _other_spatial_axes(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    """A stack has the rank of one convolution with a spatial axis more; most are square."""
    view = _oihw if leaf.out_first else _hwio
    unstacked = leaf.shape[2:] if leaf.out_first else leaf.shape[:-2]
    square = len(set(unstacked)) == 1 or 1 in unstacked
    if leaf.stack:
        return Interpretation.of(view(len(unstacked)), leaf.shape) if square else None
    decided = leaf.indexed or len(unstacked) == 1 or (len(unstacked) == 2 and square)
    named = f"conv{len(unstacked)}" in leaf.role
    return None if decided or named else Interpretation.of(view(len(unstacked) - 1), leaf.shape)


def _depthwise(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    return Interpretation("a depthwise convolution", None)


def _router(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    return Interpretation("a router", None)


def _vectors(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    return Interpretation(f"{math.prod(leaf.shape[:-1])} vectors of {leaf.shape[-1]}", None)


def _no_matrices(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    return Interpretation("none", None)


def _one_matrix(leaf: ParamInfo, bound: BoundView) -> Interpretation | None:
    first, *others = range(leaf.stack, len(leaf.shape))
    return Interpretation.of(View(first, others), leaf.shape)


def _renumber(axes: Axes, numbers: dict[int, int]) -> Axes:
    return tuple(numbers.get(axis, axis) for axis in axes)


_DOUBTS = (_stacked_elsewhere, _too_elongated)
_HEAD_DOUBTS = (_stacked_elsewhere, _stack_without_heads, _too_elongated)
_UNNAMED_DOUBTS = (_unnamed_stack, *_HEAD_DOUBTS)


# ---- the table -----------------------------------------------------------------------------------

_NO_MATRICES = (
    Rule(_BIAS, None, "bias"),
    Rule(r"b\d*", None, "bias", range(2)),
    Rule(rf"({_NORM})(/(?!\w*kernel)\w+)?", None, "norm"),
    Rule(_SCALE, None, "scale"),
    Rule(rf"({_HEAD})(/\w+){{0,2}}", None, "output head"),
    Rule(rf"({_EMBEDDING})(/\w+){{0,2}}", None, "embedding"),
    Rule(r"(\w*router\w*|\w*expert_gate)(/\w+)?", None, "router"),
    Rule(rf"{_MOE}/({_GATE})(/\w+)?", None, "router", _AT_MOST_2),
    Rule(_STATE, None, "state, decay or sink"),
    Rule(r"d", None, "skip of a state space", range(2)),
    Rule(rf"{_STATE_SPACE}/in_proj\w*(/\w+)?", None, "fused input of a state space"),
    Rule(r"\w*", None, "vector or scalar", when=_is_vector),
)

# Flax and Haiku store H W I O, equinox O I H W.
_CONVOLUTIONS = (
    Rule(rf"({_DEPTHWISE})(/\w+)?", None, "depthwise convolution"),
    Rule(_CONV_ANY, None, "depthwise convolution", _AT_LEAST_3, when=_has_one_input_channel),
    *(
        Rule(names, view(axes - 2), "convolution", (axes,), (_other_spatial_axes,))
        for axes in (3, 4, 5)
        for names, view in ((rf"{_CONV}/?weight", _oihw), (_of(_CONV), _hwio))
    ),
    Rule(_CONV_ANY, _MATRIX, "convolution", _AT_MOST_2, (_depthwise,)),
)

# Each expert is a matrix of its own, and there may be more of them than they are wide.
_EXPERT_RULES = (
    Rule(_of(rf"{_MOE}/({_GATE})"), _MATRIX, "expert", _AT_LEAST_3, (_router,)),
    Rule(rf"{_EXPERTS}(/\w+)*/weight", _OUT_FIRST, "expert", _AT_LEAST_2, (_too_elongated,)),
    Rule(rf"{_EXPERTS}(/\w+)+", _MATRIX, "expert", _AT_LEAST_2, (_too_elongated,)),
    Rule(_of(rf"{_MOE}/\w+"), _MATRIX, "expert", _AT_LEAST_3, (_too_elongated,)),
)

# `mlp/gate` is half of a gated MLP, or a router where the mixture of experts is called `mlp`.
_GATES = (
    Rule(_of(_GATE), _MATRIX, "gate of an MLP", _AT_MOST_2, _DOUBTS, _widens),
    Rule(rf"({_GATE})/weight", _OUT_FIRST, "gate of an MLP", _AT_MOST_2, _DOUBTS, _widens),
    Rule(rf"({_GATE})(/\w+)?", None, "router", _AT_MOST_2, when=_narrows_like_a_router),
    Rule(rf"({_GATE})(/\w+)?", _MATRIX, "gate of an MLP", _AT_MOST_2, (_router,)),
)

# Heads as an axis: [d, h, k] and [h, k, d] of Flax, [h, d, k] of Gemma.
_HEAD_RULES = (
    Rule(_TO_HEADS, _INTO_HEADS, "into heads", _AT_LEAST_3, _HEAD_DOUBTS),
    Rule(_FROM_HEADS, _OUT_OF_HEADS, "out of heads", _AT_LEAST_3, _HEAD_DOUBTS),
    Rule(_of(_MAYBE_TO_HEADS), _INTO_HEADS, "into heads", _AT_LEAST_3, _UNNAMED_DOUBTS),
    Rule(_of(_MAYBE_FROM_HEADS), _OUT_OF_HEADS, "out of heads", _AT_LEAST_3, _UNNAMED_DOUBTS),
    Rule(_of(r"\w*qkv"), View(-4, (-2, -1)), "q, k, v into heads", (4,), _DOUBTS, _has_three_parts),
    Rule(_of(r"q_einsum"), View(-2, (-3, -1)), "into heads", (3,), _DOUBTS),
    Rule(_of(r"q?kv_einsum"), View(-2, (-3, -1)), "into heads", (4,), _DOUBTS),
    Rule(_of(r"attn_vec_einsum"), _OUT_OF_HEADS, "out of heads", (3,), _DOUBTS),
    Rule(_of(r"gating_einsum"), _MATRIX, "gate and up", (3,), _DOUBTS),
)

_MATRICES = (
    Rule(rf"({_IN_MLP})/weight", _OUT_FIRST, "matrix", _AT_LEAST_3, _DOUBTS),
    Rule(_of(_IN_MLP), _MATRIX, "matrix", _AT_LEAST_3, _DOUBTS),
    Rule(_of(_FUSED), _MATRIX, "fused matrices, taken whole", _AT_MOST_2, _DOUBTS),
    Rule(rf"({_FUSED})/weight", _OUT_FIRST, "fused matrices, taken whole", _AT_MOST_2, _DOUBTS),
    # A kernel of two axes is a matrix however long: two coordinates into a width of 512.
    Rule(rf"\w*kernel|({_DENSE})(/w)?", _MATRIX, "matrix", _AT_MOST_2, (_stacked_elsewhere,)),
    Rule(rf"({_DENSE})/weight", _OUT_FIRST, "matrix", _AT_MOST_2, (_stacked_elsewhere,)),
    Rule(r"\w*weight|weight_\w+", _OUT_FIRST, "matrix", (2,), _DOUBTS),
    Rule(r"w", _MATRIX, "matrix", (2,), _DOUBTS),
)

_UNKNOWN = (
    Rule(r"b\d*", _MATRIX, "", _AT_MOST_2, (_vectors,)),
    Rule(_of(r"\w*general|\w*einsum|[qkv]{2,3}"), _MATRIX, "", _AT_LEAST_3, (_one_matrix,)),
    Rule(r".*", _MATRIX, "two axes and no other role in its name", (2,), _DOUBTS),
    Rule(r".*weight", _OUT_FIRST, "", _AT_MOST_2, (_vectors,)),
    Rule(r".*weight", _OUT_FIRST, "", alternatives=(_no_matrices,)),
    Rule(r".*", _MATRIX, "", _AT_MOST_2, (_vectors,)),
    Rule(r".*", _MATRIX, "", alternatives=(_no_matrices,)),
)

DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(_of(r"\w*lora_?[ab]\w*|\w*lora\w*/[ab]"), _MATRIX, "low-rank adapter", _AT_LEAST_2),
    *_NO_MATRICES,
    *_CONVOLUTIONS,
    *_EXPERT_RULES,
    *_GATES,
    *_HEAD_RULES,
    *_MATRICES,
    *_UNKNOWN,
)
"""Every rule by role, in the order in which they are tried."""


@functools.lru_cache(maxsize=8192)
def classify(path: str, shape: tuple[int, ...]) -> Decision:
    """Look a parameter up in the default table.

    >>> classify("layers/attn_norm/scale", (12, 512))
    Decision(view=None, reason='norm', interpretations=())
    >>> classify("layers/attn/q_proj/kernel", (12, 512, 512)).view
    View(rows=(-2,), cols=(-1,), split=None)
    """
    leaf = ParamInfo.of(path, shape)
    return next(rule for rule in DEFAULT_RULES if rule.fits(leaf)).decision(leaf)
