"""Trees of parameters made at random, with the truth of every leaf.

A truth is None, or the axes longer than 1 parted into two sides, in no order.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

Sides = frozenset[frozenset[int]]
WORDS = ("zeta", "alder", "kiwi", "norn", "plum", "quartz", "basil", "iris", "ember", "fjord")


@dataclasses.dataclass
class Made:
    """A tree as a flat mapping, and what is right for each of its leaves."""

    shapes: dict[str, tuple[int, ...]]
    truth: dict[str, Sides | None]


def sides(*groups: tuple[int, ...]) -> Sides:
    """The two sides of a matrix."""
    return frozenset(map(frozenset, groups))


def make(seed: int) -> Made:
    """A decoder: embedding, layers in a list or stacked along some axis, final norm, a head."""
    rng = np.random.default_rng(seed)

    def pick(*options):
        return options[rng.integers(len(options))]

    d, heads, head_dim = pick(48, 64, 96, 256, 512), pick(1, 2, 4, 6, 8, 12), pick(8, 16, 32, 64)
    kv_heads = pick(*(k for k in (1, 2, 4, 6, 8, 12) if heads % k == 0))
    hidden, vocabulary = pick(128, 200, 384, 1024), pick(500, 1000, 32000)
    layers, experts = pick(1, 2, 3, 4, 8, 12, 26), pick(4, 8, 16)
    layout, place = pick("dense", "general", "einsum", "out_first"), pick(None, 0, 1, -1)
    value = pick("kernel", "kernel", "w", "weight")
    out_first = value == "weight"
    bias, moe, tied, head_norms = (bool(rng.integers(2)) for _ in range(4))
    shapes: dict[str, tuple[int, ...]] = {}
    truth: dict[str, Sides | None] = {}

    def dense(name: str, fan_in: int, fan_out: int, extra: int = 0):
        shape = (fan_out, fan_in) if out_first else (fan_in, fan_out)
        yield f"{name}/{value}", (*((extra,) if extra else ()), *shape), ((-2,), (-1,))
        if bias and not extra:
            yield f"{name}/bias", (fan_out,), None

    def into(name: str, count: int):
        if layout == "dense":
            yield from dense(name, d, count * head_dim)
            return
        shape, one = {
            "general": ((d, count, head_dim), -3),
            "einsum": ((count, d, head_dim), -2),
            "out_first": ((count, head_dim, d), -1),
        }[layout]
        yield f"{name}/{value}", shape, ((one,), tuple(a for a in (-3, -2, -1) if a != one))
        if bias:
            yield f"{name}/bias", (count, head_dim), None

    def out_of(name: str):
        if layout == "dense":
            yield from dense(name, heads * head_dim, d)
            return
        first = layout == "out_first"
        shape = (d, heads, head_dim) if first else (heads, head_dim, d)
        yield f"{name}/{value}", shape, ((-3,), (-2, -1)) if first else ((-3, -2), (-1,))
        if bias:
            yield f"{name}/bias", (d,), None

    def block():
        names = pick(
            ("query", "key", "value", "out"),
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            ("q", "k", "v", "o"),
        )
        attention = pick("attn", "self_attention", "MultiHeadDotProductAttention_0")
        yield "norm1/scale", (d,), None
        yield from into(f"{attention}/{names[0]}", heads)
        yield from into(f"{attention}/{names[1]}", kv_heads)
        yield from into(f"{attention}/{names[2]}", kv_heads)
        yield from out_of(f"{attention}/{names[3]}")
        if head_norms:
            yield f"{attention}/q_norm/scale", (head_dim,), None
        yield "norm2/scale", (d,), None
        if moe:
            yield from dense("moe/router", d, experts)
            for name, fans in (
                ("up", (d, hidden)),
                ("gate_proj", (d, hidden)),
                ("down", (hidden, d)),
            ):
                yield from dense(f"moe/experts/{name}", *fans, extra=experts)
        else:
            yield from dense("mlp/up", d, hidden)
            yield from dense("mlp/down", hidden, d)

    def add(path: str, shape: tuple[int, ...], groups, at: int | None = None) -> None:
        rank = len(shape)
        if at is not None:
            spot = at if at >= 0 else rank + 1 + at
            axes = [a for a in range(rank + 1) if a != spot]
            shape = (*shape[:spot], layers, *shape[spot:])
        else:
            axes = list(range(rank))
        shapes[path] = shape
        if groups is None:
            truth[path] = None
            return
        long = [
            tuple(axes[a + rank] for a in group if shape[axes[a + rank]] > 1) for group in groups
        ]
        truth[path] = sides(*long) if all(long) else None

    add("embed/embedding", (vocabulary, d), None)
    kept = list(block())
    if place is None:
        for i in range(layers):
            for path, shape, groups in kept:
                add(f"layers_{i}/{path}", shape, groups)
    else:
        module = pick("layers", "blocks", "encoderblock", "decoder", "stack")
        for path, shape, groups in kept:
            # A vector has no third axis; a stack along axis 1 of a vector is its last.
            add(f"{module}/{path}", shape, groups, place)
    add("final_norm/scale", (d,), None)
    if not tied:
        shape = (vocabulary, d) if out_first else (d, vocabulary)
        add(f"{pick('lm_head', 'logits_dense', 'Dense_0', 'proj')}/{value}", shape, None)
    return _renamed(Made(shapes, truth), rng) if rng.integers(2) else Made(shapes, truth)


def _renamed(made: Made, rng: np.random.Generator) -> Made:
    """The tree with some names replaced by words without a meaning, or taken out."""
    names = sorted(
        {name for path in made.shapes for name in path.split("/") if name != "embedding"}
    )
    chosen = rng.choice(names, size=min(len(names), int(rng.integers(1, 4))), replace=False)
    words = dict(zip(chosen, rng.permutation(WORDS), strict=False))
    drop = {name for name in chosen if rng.integers(3) == 0}

    def path(old: str) -> str:
        kept = [words.get(n, n) for n in old.split("/") if n not in drop]
        return "/".join(kept) or "root"

    new = {old: path(old) for old in made.shapes}
    counts: dict[str, int] = {}
    for name in new.values():
        counts[name] = counts.get(name, 0) + 1
    inner = {
        "/".join(name.split("/")[:i])
        for name in new.values()
        for i in range(1, name.count("/") + 1)
    }
    if max(counts.values()) > 1 or inner & set(new.values()):
        return made
    return Made(
        {new[old]: shape for old, shape in made.shapes.items()},
        {new[old]: sides for old, sides in made.truth.items()},
    )


def thinned(made: Made, seed: int) -> Made:
    """The tree without a quarter of its parameters, those of repeated blocks alike."""
    rng = np.random.default_rng(seed)
    roles = dict.fromkeys(re.sub(r"\d+", "#", path) for path in made.shapes)
    gone = {role for role in roles if rng.random() < 0.25}
    kept = [path for path in made.shapes if re.sub(r"\d+", "#", path) not in gone]
    return Made(*({path: field[path] for path in kept} for field in (made.shapes, made.truth)))
