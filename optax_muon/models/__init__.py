"""Models in Flax (extra `models`): Llama and Moonlight, and Moonlight's Hugging Face checkpoints.

`spec.REGISTRY` lists the models; `spec.model(config)` makes one. Importing this package registers
both.
"""

from optax_muon.extras import require_extra

require_extra("models", "optax_muon.models")

# isort: split
from optax_muon.models.llama import SPEC as _LLAMA
from optax_muon.models.llama import Llama, LlamaConfig
from optax_muon.models.moonlight import SPEC as _MOONLIGHT
from optax_muon.models.moonlight import Moonlight, MoonlightConfig
from optax_muon.models.spec import (
    REGISTRY,
    Config,
    ForwardStats,
    Model,
    ModelSpec,
    model,
    model_of,
    named_configs,
    register,
)

__all__ = [
    "REGISTRY",
    "Config",
    "ForwardStats",
    "Llama",
    "LlamaConfig",
    "Model",
    "ModelSpec",
    "Moonlight",
    "MoonlightConfig",
    "model",
    "model_of",
    "named_configs",
    "register",
]

for _row in (_LLAMA, _MOONLIGHT):
    register(_row)
