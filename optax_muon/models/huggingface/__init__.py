"""Reading and writing Hugging Face checkpoints."""

from optax_muon.models.huggingface.convert import (
    BIAS,
    CONFIG,
    INDEX,
    PARAMS,
    SHARD_BYTES,
    Tensor,
    export_checkpoint,
    from_huggingface,
    import_checkpoint,
    leaf_shapes,
    load,
    read_config,
    tensors,
    to_huggingface,
)

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
    "tensors",
    "to_huggingface",
]
