"""The recipes of the page on frameworks, run with the frameworks that are installed."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from optax_muon.extras import MissingExtraError

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "pages" / "frameworks.md"
SMALL = [
    "run_name=small",
    "hardware=cpu",
    "dataset_type=synthetic",
    "steps=3",
    "enable_checkpointing=False",
    "opt_type=muon",
    "model_name=default",
    "decoder_block=llama2",
    "base_emb_dim=64",
    "head_dim=16",
    "base_num_decoder_layers=2",
    "base_mlp_dim=128",
    "base_num_query_heads=4",
    "base_num_kv_heads=4",
    "vocab_size=256",
    "attention=dot_product",
    "per_device_batch_size=1",
    "max_target_length=32",
    "skip_jax_distributed_system=True",
    "ici_fsdp_parallelism=4",
    "ici_tensor_parallelism=2",
    "enable_goodput_recording=False",
    "monitor_goodput=False",
]


def recipe(framework):
    (program,) = (
        block
        for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
        if re.search(rf"^(import|from) {framework}\b", block, re.M)
    )
    return program


def run(program, folder, *arguments):
    (folder / "recipe.py").write_text(program)
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "recipe.py", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_keras(tmp_path):
    pytest.importorskip("optax_muon.compat.keras", exc_type=MissingExtraError)
    assert "64 x 8" in run(recipe("keras"), tmp_path)


@pytest.mark.slow
def test_maxtext(tmp_path):
    maxtext = pytest.importorskip("maxtext")
    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    said = run(recipe("maxtext"), tmp_path, str(base), *SMALL, f"base_output_directory={tmp_path}")
    losses = [float(x) for x in re.findall(r"completed step: .* lm_loss: ([\d.]+)", said)]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_levanter(tmp_path):
    pytest.importorskip("levanter")
    program = recipe("levanter") + (
        "import draccus\n"
        "config = draccus.decode(OptimizerConfig, {'type': 'optax_muon', 'beta': 0.9})\n"
        "assert config.beta == 0.9\n"
        "config.build(10)\n"
    )
    run(program, tmp_path)
