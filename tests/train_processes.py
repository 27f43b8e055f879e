"""One of several processes of `optax-muon train --distributed`: `test_train_processes.py`.

Usage: train_processes.py DEVICES ARGUMENT..., with the devices of this process, and what the
command line gets. SLURM's variables say which process it is.
"""

import os
import sys

import jax

from optax_muon.cli.main import main
from optax_muon.models.moonlight.model import MoonlightConfig
from optax_muon.training.optimizers import HyperParams
from optax_muon.training.presets import PRESETS, Preset

CONFIG = MoonlightConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    kv_lora_rank=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    context=16,
)
SAME = HyperParams(6e-3, 0.3)
TOY = Preset(CONFIG, 16, 4, {"adamw": SAME, "muon": SAME}, "", bias_update_speed=2e-2)


def discard_output_of_libraries():
    """Leave the standard output to Python alone.

    Gloo reports its connections there, from several threads that break each other's lines, so that
    no pattern would find them all.
    """
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    discard_output_of_libraries()
    PRESETS["moonlight-toy"] = TOY
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    main(sys.argv[2:])
