"""Reading and writing Hugging Face checkpoints."""

from optax_muon.models.huggingface.config import CONFIG, from_huggingface, to_huggingface
from optax_muon.models.huggingface.convert import (
    PARAMS,
    SHARD_BYTES,
    export_checkpoint,
    import_checkpoint,
    load,
    read_config,
)
from optax_muon.models.huggingface.names import BIAS, Tensor, leaf_shapes, tensors
from optax_muon.models.huggingface.source import INDEX, read_json

__all__ = [
    "BIAS",
    "CONFIG",
    "INDEX",
    "PARAMS",
    "SHARD_BYTES",
    "Tensor",
    "export_checkpoint",
    "from_huggingface",
    "import_checkpoint",
    "leaf_shapes",
    "load",
    "read_config",
    "read_json",
    "tensors",
    "to_huggingface",
]
