"""The way that a user goes: a checkpoint of Hugging Face, trained further here, and back.

Every command is a process of its own, as typed.
"""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from processes import SECONDS, wait_until

from optax_muon.training.initialize import PretrainedSource
from optax_muon.training.run_folder import RunFolder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONTEXT, VOCAB, STEPS = 32, 48, 24
TRAIN = (
    *("train", "--model", "moonlight-tiny", "--from", "imported", "--name", "run"),
    *("--data", "tokens.npy", "--context", CONTEXT, "--batch", 8, "--steps", STEPS),
    *("--eval-every", 4, "--save-every", 4),
)


def start(folder, *arguments, devices=1):
    """Begin `optax-muon ARGUMENTS` in a folder, with so many devices."""
    command = "from optax_muon.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", command, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, *arguments, devices=1):
    process = start(folder, *arguments, devices=devices)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def kill_after(process, folder, trial, steps):
    """`kill -9` once a trial has done so many steps."""
    journal = RunFolder(folder).journal
    wait_until(lambda: any(record.step >= steps for record in journal.read(trial)), process)
    process.kill()
    process.communicate()


def published(folder):
    """A small checkpoint, as `transformers` saves it."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.409,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=CONTEXT,
        eos_token_id=None,
        attn_implementation="eager",
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.timeout(5 * SECONDS)
def test_import_train_on_eight_devices_die_go_on_on_four_export(tmp_path):
    published(tmp_path / "published")
    counting = np.arange(40_000, dtype=np.uint16) * 5 % VOCAB
    np.save(tmp_path / "tokens.npy", counting)

    run(tmp_path, "import-hf", "published", "--out", "imported")
    process = start(tmp_path, *TRAIN, "--mesh", "fsdp=2,expert=4", devices=8)
    kill_after(process, tmp_path / "runs/run", "muon-carried", 10)
    run(tmp_path, *TRAIN, "--mesh", "fsdp=2,expert=2", "--resume", devices=4)
    run(tmp_path, "export-hf", "runs/run", "--trial", "muon-carried", "--out", "exported")

    records = RunFolder(tmp_path / "runs/run").journal.read("muon-carried")
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    # They count by fives: what comes next is known. Steps before the kill ran on eight devices.
    assert records[-1].val_loss < records[3].val_loss < np.log(VOCAB) + 0.5

    tokens = counting[None, :20].astype(np.int64)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "exported", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = PretrainedSource(tmp_path / "runs/run", "muon-carried")
    params, bias = ours.weights()
    found, _ = ours.model.forward(params, jnp.asarray(tokens, jnp.int32), bias)
    # The tolerance of the comparisons in `test_huggingface.py`: both sum in float32.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
