"""Checkpoints in Hugging Face's DeepSeek-V3 layout, which Moonlight is published in, both ways.

A checkpoint is a folder of `config.json` and safetensors files, one tensor per layer, expert and
matrix, stored `[out, in]`; a run's parameters are one file of stacked leaves, stored `[in, out]`
(`safetensors_io.py`). `tensors` says which tensor is which part of which leaf, and
`import_checkpoint` and
`export_checkpoint` copy them, tensor by tensor, so that memory stays near one tensor and one shard.
Bits and dtypes stay as they are. Nothing is written until every tensor is known to be there and to
fit, and what is written appears all at once.

    RUN/config.json            {"model": our sizes, "huggingface": the checkpoint's own config}
    RUN/params.safetensors     parameters by path, and `router_bias`
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import safetensors.numpy

from optax_muon.errors import UsageError
from optax_muon.matrices.paths import named_leaves
from optax_muon.models import safetensors_io
from optax_muon.models.moonlight.model import MoonlightConfig, leaves
from optax_muon.models.safetensors_io import DTYPES, Entry

CONFIG, PARAMS = "config.json", "params.safetensors"
"""Files of a run."""

INDEX = "model.safetensors.index.json"
"""Which tensor is in which file of a checkpoint of several."""

BIAS = "router_bias"
"""Path of the router's biases among a run's leaves."""

SHARD_BYTES = 5_000_000_000
"""The size that a file of an exported checkpoint does not exceed, as in the published ones."""

Progress = Callable[[Iterable["Tensor"]], Iterable["Tensor"]]
"""Shows how far an iteration has come."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and the part of our parameters that it is."""

    name: str
    """Its name: `model.layers.3.mlp.experts.7.up_proj.weight`."""
    shape: tuple[int, ...]
    """Its shape."""
    path: str
    """The leaf that it is part of: `moe_layers/experts/up_proj`."""
    index: tuple[int, ...]
    """Where in the leaf, along its stacked axes: `(2, 7)`."""

    def turned(self, array: np.ndarray) -> np.ndarray:
        """From `[out, in]` to `[in, out]` or back; embeddings and vectors stay as they are."""
        return array if self.path == "embed/embedding" else array.T


# ---- names ---------------------------------------------------------------------------------------

_MODEL = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
_LAYER = {
    "attn_norm/scale": "input_layernorm.weight",
    "attn/q_proj/kernel": "self_attn.q_proj.weight",
    "attn/q_a_proj/kernel": "self_attn.q_a_proj.weight",
    "attn/q_a_norm/scale": "self_attn.q_a_layernorm.weight",
    "attn/q_b_proj/kernel": "self_attn.q_b_proj.weight",
    "attn/kv_a_proj/kernel": "self_attn.kv_a_proj_with_mqa.weight",
    "attn/kv_a_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attn/kv_b_proj/kernel": "self_attn.kv_b_proj.weight",
    "attn/o_proj/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate_proj/kernel": "mlp.gate_proj.weight",
    "mlp/up_proj/kernel": "mlp.up_proj.weight",
    "mlp/down_proj/kernel": "mlp.down_proj.weight",
    "router/kernel": "mlp.gate.weight",
    BIAS: "mlp.gate.e_score_correction_bias",
    "experts/gate_proj": "mlp.experts.{}.gate_proj.weight",
    "experts/up_proj": "mlp.experts.{}.up_proj.weight",
    "experts/down_proj": "mlp.experts.{}.down_proj.weight",
    "shared_experts/gate_proj/kernel": "mlp.shared_experts.gate_proj.weight",
    "shared_experts/up_proj/kernel": "mlp.shared_experts.up_proj.weight",
    "shared_experts/down_proj/kernel": "mlp.shared_experts.down_proj.weight",
}
_DERIVED = ".rotary_emb.inv_freq"
"""Computed from the config; some checkpoints keep it all the same."""


def leaf_shapes(config: MoonlightConfig) -> dict[str, tuple[int, ...]]:
    """The leaves of a run by path, in the order of its file: parameters, then the biases."""
    shapes = {path: leaf.shape for path, leaf in named_leaves(leaves(config)).items()}
    biases = (
        {BIAS: (config.num_moe_layers, config.n_routed_experts)} if config.num_moe_layers else {}
    )
    return {**shapes, **biases}


def tensors(config: MoonlightConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of this size.

    >>> from optax_muon.models.moonlight.model import CONFIGS
    >>> table = {tensor.name: tensor for tensor in tensors(CONFIGS["moonlight-16b-a3b"])}
    >>> table["model.layers.3.mlp.experts.7.up_proj.weight"]
    Tensor(name='model.layers.3.mlp.experts.7.up_proj.weight', shape=(1408, 2048),
           path='moe_layers/experts/up_proj', index=(2, 7))
    """
    for path, shape in leaf_shapes(config).items():
        stack, _, rest = path.partition("/")
        if path in _MODEL:
            name, first, stacked = _MODEL[path], 0, 0
        else:
            name = f"model.layers.{{}}.{_LAYER[rest or path]}"
            first = 0 if stack == "dense_layers" else config.first_k_dense_replace
            stacked = name.count("{}")
        for index in itertools.product(*map(range, shape[:stacked])):
            numbers = (first + index[0], *index[1:]) if index else ()
            own = shape[stacked:]
            turned = own if path == "embed/embedding" else own[::-1]
            yield Tensor(name.format(*numbers), turned, path, index)


# ---- configs -------------------------------------------------------------------------------------

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "n_shared_experts": "n_shared_experts",
    "n_routed_experts": "n_routed_experts",
    "routed_scaling_factor": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "num_experts_per_tok": "num_experts_per_tok",
    "first_k_dense_replace": "first_k_dense_replace",
    "norm_topk_prob": "norm_topk_prob",
    "max_position_embeddings": "context",
    "rms_norm_eps": "rms_norm_eps",
}
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_scaling": None,
    "quantization_config": None,
}
"""What this model is; a checkpoint that says otherwise is another one."""


def from_huggingface(config: Mapping[str, Any]) -> MoonlightConfig:
    """Our sizes of a checkpoint's `config.json`.

    Raises:
        UsageError: when it lacks a size or is of another model.
    """
    rope = config.get("rope_parameters") or {}
    wrong = [
        f"{key} is {config[key]!r}, it must be {value!r}"
        for key, value in _FIXED.items()
        if config.get(key, value) != value
    ]
    wrong += [f"{key} is missing" for key in _SIZES if key not in config]
    if "rope_theta" not in {**config, **rope}:
        wrong.append("rope_theta is missing")
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"rope_type is {rope['rope_type']!r}, it must be 'default'")
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads", heads) != heads:
        wrong.append(f"num_key_value_heads must be num_attention_heads, {heads}")
    if wrong:
        raise UsageError(f"{CONFIG} is of no Moonlight: {'; '.join(wrong)}")
    return MoonlightConfig(
        **{ours: config[theirs] for theirs, ours in _SIZES.items()},
        rope_theta=float({**config, **rope}["rope_theta"]),
        rope_interleave=config.get("rope_interleave", True),
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
    )


def to_huggingface(
    config: MoonlightConfig, dtype: str, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A `config.json` that `transformers` loads.

    Args:
        config: our sizes.
        dtype: of most parameters, as numpy calls it.
        like: the config of the checkpoint that the run began with; what it says beyond the sizes,
            the tokens that begin and end a text above all, is kept.
    """
    fixed = {key: value for key, value in _FIXED.items() if value is not None}
    base = dict(like or {"architectures": ["DeepseekV3ForCausalLM"], **fixed})
    sizes = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if base.get("rope_parameters"):
        rope = {"rope_parameters": {**base["rope_parameters"], **rope}}
    derived = {"num_key_value_heads": config.num_attention_heads, _dtype_key(base): dtype}
    if base.get("rope_interleave", True) != config.rope_interleave:
        derived["rope_interleave"] = config.rope_interleave
    return {**base, **sizes, **rope, **derived}


def _dtype_key(config: Mapping[str, Any]) -> str:
    """`transformers` 5 writes `dtype`, and reads what came before it."""
    return "dtype" if "dtype" in config else "torch_dtype"


# ---- both ways -----------------------------------------------------------------------------------


def import_checkpoint(source: Path, run: Path, progress: Progress = iter) -> MoonlightConfig:
    """Make a run's folder of a checkpoint.

    Args:
        source: the checkpoint: `config.json` and safetensors files, with an index if several.
        run: the folder to make.
        progress: shows how far it has come.

    Returns:
        The sizes.

    Raises:
        UsageError: when the checkpoint is not whole or of another model, with every tensor that is
            missing, unknown or of another shape or dtype than it should be; or when `run` exists.
    """
    theirs = _json(source / CONFIG)
    config = from_huggingface(theirs)
    expected = {tensor.name: tensor for tensor in tensors(config)}
    files = _files(source)
    found = {
        name: (file, entry)
        for file in files
        for name, entry in safetensors_io.entries(file).items()
    }
    found = {name: constrain for name, constrain in found.items() if not name.endswith(_DERIVED)}
    entries = {name: entry for name, (_, entry) in found.items()}
    _check(source, {name: tensor.shape for name, tensor in expected.items()}, entries)
    dtypes = _one_dtype_each(source, expected.values(), entries)
    layout = {path: Entry(shape, dtypes[path]) for path, shape in leaf_shapes(config).items()}
    by_file = sorted(expected.values(), key=lambda tensor: found[tensor.name][0])
    with (
        safetensors_io.folder_at_once(run) as draft,
        safetensors_io.Writer(draft / PARAMS, layout) as writer,
    ):
        both = {"model": dataclasses.asdict(config), "huggingface": theirs}
        _write_json(draft / CONFIG, both)
        for file, group in itertools.groupby(progress(by_file), key=lambda t: found[t.name][0]):
            with safetensors.safe_open(file, framework="np") as shard:
                for tensor in group:
                    array = tensor.turned(shard.get_tensor(tensor.name))
                    writer.write(tensor.path, tensor.index, array)
    return config


def export_checkpoint(
    run: Path, target: Path, progress: Progress = iter, shard_bytes: int = SHARD_BYTES
) -> None:
    """Make a checkpoint of a run's parameters, for `transformers` and all that reads its layout.

    Args:
        run: a run's folder, as `import_checkpoint` makes it.
        target: the folder to make.
        progress: shows how far it has come.
        shard_bytes: what a file holds at most, but for a larger tensor alone.

    Raises:
        UsageError: when the run is not whole, or `target` exists.
    """
    config, like = read_config(run)
    entries = safetensors_io.entries(run / PARAMS)
    _check(run, leaf_shapes(config), entries)
    ordered = sorted(tensors(config), key=_by_layer)
    files = _files_to_write(ordered, entries, shard_bytes)
    most = DTYPES[entries["embed/embedding"].dtype].name
    with safetensors_io.folder_at_once(target) as draft:
        _write_json(draft / CONFIG, to_huggingface(config, most, like))
        with safetensors.safe_open(run / PARAMS, framework="np") as params:
            for file, group in itertools.groupby(progress(ordered), key=lambda t: files[t.name]):
                # An argument, so that it is gone before the next file's tensors are read.
                _write_tensors(draft / file, {t.name: _theirs(params, t) for t in group})
        if len(set(files.values())) > 1:
            size = sum(entry.nbytes for entry in entries.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
            _write_json(draft / INDEX, index)


def read_config(run: Path) -> tuple[MoonlightConfig, dict[str, Any] | None]:
    """The sizes of a run and, if it began with a checkpoint, that checkpoint's own config.

    Raises:
        UsageError: when `run` is no Moonlight's folder.
    """
    config = _json(run / CONFIG)
    if "model" not in config:
        raise UsageError(f"{run / CONFIG} has no sizes of a Moonlight; import-hf makes such a run")
    return MoonlightConfig(**config["model"]), config.get("huggingface")


def load(
    run: Path, shardings: optax.Params | None = None
) -> tuple[MoonlightConfig, optax.Params, jax.Array | None]:
    """Sizes, parameters and router biases of a run.

    Args:
        run: a run's folder, as `import_checkpoint` makes it.
        shardings: of the parameters, as `moonlight.shardings` gives them; a device reads only its
            own part. None puts everything on the first device.

    Raises:
        UsageError: when `run` is no Moonlight's folder.
    """
    config, _ = read_config(run)
    if shardings is not None:
        first = jax.tree.leaves(shardings)[0]
        copies = jax.sharding.NamedSharding(first.mesh, jax.sharding.PartitionSpec())
        shardings = {**shardings, BIAS: copies}
    params = safetensors_io.load(run / PARAMS, shardings)
    return config, params, params.pop(BIAS, None)


def _theirs(params: Any, tensor: Tensor) -> np.ndarray:
    """A tensor as a checkpoint stores it, out of a run's file."""
    ours = params.get_slice(tensor.path)[tensor.index or slice(None)]
    return np.ascontiguousarray(tensor.turned(ours))


def _write_tensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # "pt": laid out as torch does; transformers refuses a file that does not say so.
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    return content


def _files(source: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    index = source / INDEX
    if not index.exists():
        files = sorted(source.glob("*.safetensors"))
        if not files:
            raise UsageError(f"{source} holds no safetensors files")
        return files
    files = sorted({source / name for name in _json(index)["weight_map"].values()})
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UsageError(f"{source} lacks {', '.join(missing)}, which its index names")
    return files


def _check(
    where: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Entry]
) -> None:
    """Refuse what is not exactly as expected, all of it in one error."""
    wrong = [f"missing    {name} {list(expected[name])}" for name in expected if name not in found]
    wrong += [
        f"unknown    {name} {list(found[name].shape)}" for name in found if name not in expected
    ]
    for name in expected.keys() & found.keys():
        shape, dtype = found[name]
        if shape != expected[name]:
            wrong.append(f"misshapen  {name} {list(shape)}, it must be {list(expected[name])}")
        if dtype not in DTYPES:
            wrong.append(f"dtype      {name} {dtype}, it must be one of {', '.join(DTYPES)}")
    if wrong:
        lines = "\n  ".join(sorted(wrong))
        raise UsageError(f"{where} does not hold the tensors of its config:\n  {lines}")


def _one_dtype_each(
    where: Path, expected: Iterable[Tensor], found: Mapping[str, Entry]
) -> dict[str, str]:
    """The dtype of every leaf, whose tensors must agree in it."""
    dtypes: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for tensor in expected:
        dtypes[tensor.path].setdefault(found[tensor.name].dtype, tensor.name)
    wrong = [
        " and ".join(f"{name} {dtype}" for dtype, name in names.items())
        for names in dtypes.values()
        if len(names) > 1
    ]
    if wrong:
        lines = "\n  ".join(sorted(wrong))
        raise UsageError(f"{where} has tensors of one stack in several dtypes:\n  {lines}")
    return {path: next(iter(names)) for path, names in dtypes.items()}


def _files_to_write(
    ordered: Iterable[Tensor], leaves: Mapping[str, Entry], most: int
) -> dict[str, str]:
    """The file of every tensor, in order and at most so many bytes to a file."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for tensor in ordered:
        size = Entry(tensor.shape, leaves[tensor.path].dtype).nbytes
        if filled and filled + size > most:
            number, filled = number + 1, 0
        numbers[tensor.name] = number
        filled += size
    if number == 1:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{i:05}-of-{number:05}.safetensors" for name, i in numbers.items()}


def _by_layer(tensor: Tensor) -> tuple[int, str]:
    """The embedding, the layers in order, the rest."""
    words = tensor.name.split(".")
    if words[1:2] == ["layers"]:
        return int(words[2]), tensor.name
    return (-1 if tensor.path == "embed/embedding" else 2**31), tensor.name
