"""A checkpoint's `config.json`, read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from optax_muon.models.moonlight import MoonlightConfig

CONFIG = "config.json"
"""The config of a checkpoint, and of a run."""

EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Keys that count the layers of multi-token prediction: before transformers 5, and since."""

CONTEXT = "max_position_embeddings"
"""The key whose value is our `context`."""

_OURS = {"context", "capacity", "query_block", "saved", "dtype", "rope_theta", "rope_interleave"}
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
}
"""Types of the config's values by the annotations of the fields, and their names for people."""

_SAME = [f.name for f in dataclasses.fields(MoonlightConfig) if f.name not in _OURS]
"""Fields that have the same name and must stand in both configs."""

_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "quantization_config": None,
}
"""Values that a checkpoint of this architecture has; another value is another architecture."""


def from_huggingface(config: Mapping[str, Any]) -> MoonlightConfig:
    """The sizes in a checkpoint's `config.json`.

    Raises:
        ValueError: A size is missing, or the config is of another architecture.
    """
    if refusals := list(_refusals(config)):
        raise ValueError(f"{CONFIG} does not describe a Moonlight: {'; '.join(refusals)}")
    return MoonlightConfig(
        **{name: config[name] for name in _SAME},
        context=config[CONTEXT],
        rope_theta=float(_rope(config)["rope_theta"]),
        rope_interleave=config.get("rope_interleave", True),
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
    )


def to_huggingface(
    config: MoonlightConfig, dtype: str, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A `config.json` that `transformers` loads.

    Args:
        config: The sizes.
        dtype: Numpy's name for the dtype of most parameters.
        like: The config of the checkpoint that the run started from; its other entries, such as
            the tokens that begin and end a text, are kept.
    """
    fixed = {key: value for key, value in _FIXED.items() if value is not None}
    base = dict(like or {"architectures": ["DeepseekV3ForCausalLM"], **fixed})
    sizes = {name: getattr(config, name) for name in _SAME} | {CONTEXT: config.context}
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if base.get("rope_parameters"):
        rope = {"rope_parameters": {**base["rope_parameters"], **rope}}
    # transformers 5 writes `dtype`, and still reads the older `torch_dtype`.
    dtype_key = "dtype" if "dtype" in base else "torch_dtype"
    derived = {"num_key_value_heads": config.num_attention_heads, dtype_key: dtype}
    if base.get("rope_interleave", True) != config.rope_interleave:
        derived["rope_interleave"] = config.rope_interleave
    return {**base, **sizes, **rope, **derived}


_ROPE = ("rope_scaling", "rope_parameters")
"""Keys under which transformers nests rotary parameters: before version 5, and since."""


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the rotary parameters, which transformers nests, at its top."""
    nested = [config.get(key) for key in _ROPE]
    merged = dict(config)
    for each in nested:
        merged.update(each if isinstance(each, Mapping) else {})
    return merged


def _refusals(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            yield f"{key} is {config[key]!r}, but must be {value!r}"
    for key in (*_SAME, CONTEXT):
        if key not in config:
            yield f"{key} is missing"
    if "rope_theta" not in _rope(config):
        yield "rope_theta is missing"
    for key in _ROPE:
        yield from _rope_refusals(key, config.get(key))
    yield from _type_refusals(config)
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads", heads) != heads:
        yield f"num_key_value_heads must be num_attention_heads, {heads}"


def _rope_refusals(key: str, rope: Any) -> Iterator[str]:
    """What makes the rotary parameters others than the plain ones."""
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        yield f"{key} is {rope!r}, but must be absent or {{'rope_type': 'default'}}"
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        yield f"{key} is {dict(rope)!r}: rope_type is {kind!r}, but must be 'default'"


def _type_refusals(config: Mapping[str, Any]) -> Iterator[str]:
    for field in dataclasses.fields(MoonlightConfig):
        key = CONTEXT if field.name == "context" else field.name
        if key not in config or field.name not in {*_SAME, "context"}:
            continue
        value, kind = config[key], str(field.type)
        if value is None and "None" in kind:
            continue
        accepted, words = _KINDS[kind.removesuffix(" | None")]
        is_bool = isinstance(value, bool)
        if not isinstance(value, accepted) or is_bool != (accepted is bool):
            yield f"{key} is {value!r}, but must be {words}"
        elif not is_bool and value < (0 if key == "first_k_dense_replace" else 1) and "int" in kind:
            yield f"{key} is {value!r}, but must be at least 1"
    if not isinstance(_rope(config).get("rope_theta", 1.0), int | float):
        yield f"rope_theta is {_rope(config)['rope_theta']!r}, but must be a number"
    for key in EXTRA_LAYERS:
        count = config.get(key)
        if count is not None and (not isinstance(count, int) or count < 0):
            yield f"{key} is {count!r}, but must be a whole number of at least 0"
