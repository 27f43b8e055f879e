"""One of several processes of `optax-muon train --distributed`: `test_train_processes.py`.

Usage: train_processes.py LOG DEVICES ARGUMENT..., with the file for what libraries say, the devices
of this process, and what the command line gets. SLURM's variables say which process it is.
"""

import logging
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


def part_output_of_libraries(log):
    """Leave the standard streams to the command alone; what libraries say goes into a file.

    Gloo reports its connections from several threads that break each other's lines, and XLA warns
    of a slow compilation on a busy machine, so that no pattern would find them all.
    """
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
    file = open(log, "w", buffering=1)  # noqa: SIM115
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    logging.basicConfig(stream=file)
    logging.captureWarnings(True)


if __name__ == "__main__":
    part_output_of_libraries(sys.argv[1])
    PRESETS["moonlight-toy"] = TOY
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    main(sys.argv[3:])
