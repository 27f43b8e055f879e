"""Moonlight against `transformers`, and checkpoints in its layout, both ways."""

import dataclasses
import functools
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_muon.cli import main
from optax_muon.models import huggingface, safetensors_io
from optax_muon.models.huggingface import export_checkpoint, import_checkpoint, load
from optax_muon.models.moonlight import CONFIGS, Moonlight
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.presets import PRESETS
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.state import State

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50.0,
    "eos_token_id": None,
}
VARIANTS = {
    "moonlight": {},
    "queries through a latent": {"q_lora_rank": 12, "first_k_dense_replace": 0},
    "odd experts, halves": {
        "n_routed_experts": 7,
        "num_experts_per_tok": 2,
        "rope_interleave": False,
        "norm_topk_prob": False,
    },
    "groups": {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 2, "n_shared_experts": 1},
}


@functools.cache
def peer(variant="moonlight"):
    """A random model of theirs, its norms and biases away from where they begin."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **{**SIZES, **VARIANTS[variant]}, attn_implementation="eager"
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("norm.weight", "e_score_correction_bias")):
                parameter += 0.2 * torch.randn_like(parameter)
            elif "inv_freq" not in name:
                parameter += 0.15 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder that `transformers` saves a variant in."""

    @functools.cache
    def saved(variant="moonlight", dtype="float32", shard="5GB"):
        folder = tmp_path_factory.mktemp("checkpoint")
        model = peer(variant)
        if dtype != "float32":
            model = type(model)(model.config)
            model.load_state_dict(peer(variant).state_dict())
            model = model.to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=shard)
        return folder

    return saved


def tensors_in(folder):
    """Every tensor of a folder, with its bits and dtype."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name)
    return {name: (x.shape, x.dtype.name, x.tobytes()) for name, x in found.items()}


def tokens_of(batch=2, length=20, seed=0):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], [batch, length])


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, bias):
    return Moonlight(config).forward(params, tokens, bias)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant, checkpoint, tmp_path):
    import_checkpoint(checkpoint(variant), tmp_path / "run")
    config, params, bias = load(tmp_path / "run")
    tokens = tokens_of()
    got = logits(config, params, jnp.asarray(tokens, jnp.int32), bias)
    with torch.no_grad():
        truth = peer(variant)(torch.tensor(tokens)).logits.numpy()
    assert truth.std() > 0.5
    np.testing.assert_allclose(got, truth, atol=1e-4)


@pytest.mark.parametrize("variant", ["moonlight", "queries through a latent"])
def test_greedy_continuations_are_those_of_transformers(variant, checkpoint, tmp_path):
    import_checkpoint(checkpoint(variant), tmp_path / "run")
    config, params, bias = load(tmp_path / "run")
    prompt = tokens_of(length=6)
    truth = peer(variant).generate(torch.tensor(prompt), max_new_tokens=16, do_sample=False)
    tokens = jnp.zeros([2, 22], jnp.int32).at[:, :6].set(prompt.astype(np.int32))
    for i in range(6, 22):  # what is after a position has no part in it
        tokens = tokens.at[:, i].set(logits(config, params, tokens, bias)[:, i - 1].argmax(-1))
    np.testing.assert_array_equal(tokens, truth.numpy())


def test_gradients_are_those_of_torch(checkpoint, tmp_path):
    import_checkpoint(checkpoint(), tmp_path / "run")
    config, params, bias = load(tmp_path / "run")
    tokens = tokens_of()

    def loss(params):
        scores = logits(config, params, jnp.asarray(tokens[:, :-1], jnp.int32), bias)
        chosen = jax.nn.log_softmax(scores)[
            jnp.arange(2)[:, None], jnp.arange(19)[None], tokens[:, 1:]
        ]
        return -chosen.mean()

    grads = by_path(jax.jit(jax.grad(loss))(params))
    model = peer()
    scores = model(torch.tensor(tokens[:, :-1])).logits
    truth = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten()
    )
    names = dict(model.named_parameters())
    slopes = dict(zip(names, torch.autograd.grad(truth, names.values()), strict=True))
    for tensor in huggingface.tensors(config):
        if tensor.path == huggingface.BIAS:
            continue
        want = slope_of(slopes, tensor.name)
        got = tensor.transposed(np.asarray(grads[tensor.path])[tensor.index or ...])
        np.testing.assert_allclose(
            got, want, atol=1e-5 * max(1, np.abs(want).max()), err_msg=tensor.name
        )


def slope_of(slopes, name):
    """In memory `transformers` stacks experts, gate and up fused; its files have them apart."""
    stack, _, rest = name.removesuffix(".weight").partition(".experts.")
    if not rest:
        return slopes[name].numpy()
    expert, matrix = rest.split(".")
    if matrix == "down_proj":
        return slopes[f"{stack}.experts.down_proj"][int(expert)].numpy()
    fused = slopes[f"{stack}.experts.gate_up_proj"][int(expert)].numpy()
    return np.split(fused, 2)[matrix == "up_proj"]


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "dtype", "shard"),
    [
        ("moonlight", "float32", "5GB"),
        ("moonlight", "bfloat16", "20KB"),
        ("queries through a latent", "bfloat16", "5GB"),
        ("groups", "float16", "30KB"),
    ],
)
def test_there_and_back_is_the_same_bit_for_bit(variant, dtype, shard, checkpoint, tmp_path):
    source = checkpoint(variant, dtype, shard)
    import_checkpoint(source, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "back", shard_bytes=15_000)
    assert tensors_in(tmp_path / "back") == tensors_in(source)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 15_000 + 3_000 for file in files), "data and header"


@pytest.mark.parametrize("shard_bytes", [15_000, 10**9])
def test_an_exported_checkpoint_loads_in_transformers(shard_bytes, checkpoint, tmp_path):
    import_checkpoint(checkpoint(), tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "back", shard_bytes=shard_bytes)
    again, report = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values())
    there, here = again.state_dict(), peer().state_dict()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_a_model_that_began_here_loads_in_transformers(checkpoint, tmp_path):
    """Its `config.json` is all ours."""
    import_checkpoint(checkpoint("groups"), tmp_path / "run")
    config, _ = huggingface.read_config(tmp_path / "run")
    theirs = huggingface.to_huggingface(config, "float32")
    (tmp_path / "run/config.json").write_text(
        json.dumps({"model": json.loads((tmp_path / "run/config.json").read_text())["model"]})
    )
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == theirs
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokens = torch.tensor(tokens_of())
    with torch.no_grad():
        np.testing.assert_allclose(again(tokens).logits, peer("groups")(tokens).logits, atol=1e-5)


def test_a_run_is_read_onto_a_mesh(checkpoint, tmp_path):
    import_checkpoint(checkpoint(), tmp_path / "run")
    config, params, bias = load(tmp_path / "run")
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"))
    there = Moonlight(config).shardings(mesh)
    _, spread, copies = load(tmp_path / "run", there)
    for a, b, sharding in zip(*map(jax.tree.leaves, (spread, params, there)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == sharding
    np.testing.assert_array_equal(bias, copies)
    assert copies.sharding == NamedSharding(mesh, P())


def test_a_run_holds_the_leaves_of_the_model(checkpoint, tmp_path):
    config = import_checkpoint(checkpoint("moonlight", "bfloat16"), tmp_path / "run")
    shapes = by_path(Moonlight(config).abstract_params)
    found = safetensors_io.entries(tmp_path / "run/params.safetensors")
    assert found.pop(huggingface.BIAS).shape == (2, 8)
    assert {path: entry.shape for path, entry in found.items()} == {
        path: leaf.shape for path, leaf in shapes.items()
    }
    assert {entry.dtype for entry in found.values()} == {"BF16"}


def test_memory_stays_near_one_shard(tmp_path):
    config = dataclasses.replace(CONFIGS["moonlight-small"], n_routed_experts=32)
    layout = {
        path: safetensors_io.Entry(shape, "F32")
        for path, shape in huggingface.leaf_shapes(config).items()
    }
    run, shard, size = tmp_path / "run", 4_000_000, sum(entry.nbytes for entry in layout.values())
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": dataclasses.asdict(config)}))
    with safetensors_io.Writer(run / "params.safetensors", layout):
        pass  # zeros
    assert size > 20 * shard
    # 1.2 shards; safetensors before 0.8 copies a shard once more.
    assert peak(export_checkpoint, run, tmp_path / "there", shard_bytes=shard) < 2.5 * shard
    assert peak(import_checkpoint, tmp_path / "there", tmp_path / "back") < shard
    assert by_bytes(tmp_path / "back") == by_bytes(run)


def by_bytes(run):
    return (run / "params.safetensors").read_bytes()


def peak(function, *args, **options):
    """The most memory that numpy and Python held during a call, in bytes."""
    tracemalloc.start()
    try:
        function(*args, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- training runs -------------------------------------------------------------------------------


@pytest.fixture
def trained(checkpoint, tmp_path):
    """A training run that began with a checkpoint and has saved it, and other states around it."""
    import_checkpoint(checkpoint(), tmp_path / "start")
    config, params, bias = load(tmp_path / "start")
    run = RunFolder(tmp_path / "run")
    saved = State(params, {"mu": params}, bias)
    others = jax.jit(functools.partial(jax.tree.map, lambda x: x + 1))(saved)
    named = {"trials": [{"name": "adamw"}, {"name": "muon"}], "pretrained": str(tmp_path / "start")}
    run.create_or_resume(
        {"training": {"model": dataclasses.asdict(config)}, **named}, resume=False, overwrite=False
    )
    for name, states in {"adamw": [others, saved], "muon": [saved, others]}.items():
        with Checkpoints(run.checkpoints(name)) as checkpoints:
            for step, state in enumerate(states, 1):
                checkpoints.save(step, state)
    return run


@pytest.mark.parametrize("options", [["--trial", "adamw"], ["--step", "1"]], ids=" ".join)
def test_a_training_run_is_exported_bit_for_bit(options, trained, checkpoint, tmp_path):
    out = tmp_path / "new/back"
    main.main(["export-hf", str(trained.path), "--out", str(out), *options])
    assert tensors_in(out) == tensors_in(checkpoint())
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (checkpoint() / "config.json").read_text()
    )
    assert sorted(path.name for path in out.parent.iterdir()) == ["back"]


def test_a_training_run_that_began_here_loads_in_transformers(trained, tmp_path):
    shutil.rmtree(tmp_path / "start")
    main.main(["export-hf", str(trained.path), "--out", str(tmp_path / "back"), "--step", "1"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokens = torch.tensor(tokens_of())
    with torch.no_grad():
        np.testing.assert_allclose(again(tokens).logits, peer()(tokens).logits, atol=1e-5)


def test_a_training_run_is_read_a_leaf_at_a_time(trained, tmp_path, monkeypatch):
    read, array = [], Checkpoints.array

    def spied(self, *which):
        read.append(array(self, *which))
        return read[-1]

    monkeypatch.setattr(Checkpoints, "array", spied)
    monkeypatch.setattr(Checkpoints, "restore", None)
    monkeypatch.setattr(Checkpoints, "params", None)
    main.main(["export-hf", str(trained.path), "--out", str(tmp_path / "back")])
    config, _ = huggingface.read_config(tmp_path / "start")
    assert [leaf.shape for leaf in read] == list(huggingface.leaf_shapes(config).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trial", "sgd"], "run has no trial 'sgd'; it has adamw, muon"),
        (["--step", "7"], "muon has no checkpoint of step 7; it has 1, 2"),
    ],
)
def test_what_a_training_run_lacks_is_refused(options, message, trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(["export-hf", str(trained.path), "--out", str(tmp_path / "new/back"), *options])
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "start"]


def test_contestants_of_no_training_run_are_refused(trained, tmp_path, capsys):
    where = [str(tmp_path / "start"), "--out", str(tmp_path / "back")]
    with pytest.raises(SystemExit):
        main.main(["export-hf", *where, "--step", "1"])
    assert "start is not a training run; it has neither trials nor" in capsys.readouterr().err


def test_a_llama_is_refused(trained, tmp_path, capsys):
    config = trained.read_config()
    config["training"]["model"] = dataclasses.asdict(PRESETS["tiny"].model)
    trained.config.write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main.main(["export-hf", str(trained.path), "--out", str(tmp_path / "back")])
    assert "run trained a Llama" in capsys.readouterr().err


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, and a function that changes its tensors."""
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint(), folder)

    def change(function):
        path = folder / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        function(tensors)
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})

    return folder, change


def refusal(folder, tmp_path):
    with pytest.raises(ValueError) as error:
        import_checkpoint(folder, tmp_path / "run")
    assert not [path for path in tmp_path.iterdir() if path != folder], "nothing is written"
    return str(error.value)


def test_all_that_is_wrong_with_tensors_is_in_one_error(broken, tmp_path):
    folder, change = broken

    def spoil(tensors):
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.3.enorm.weight"] = np.zeros([32], np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros([32], np.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros([2], np.float32)

    change(spoil)
    assert refusal(folder, tmp_path).splitlines()[1:] == [
        "  dtype      model.layers.0.input_layernorm.weight I8, "
        "but must be one of BF16, F16, F32, F64",
        "  misshapen  lm_head.weight [32, 48], but must be [48, 32]",
        "  missing    model.layers.1.mlp.experts.3.up_proj.weight [16, 32]",
        "  missing    model.norm.weight [32]",
        "  unknown    model.layers.3.enorm.weight [32]",
    ]


def test_a_stack_of_several_dtypes_is_refused(broken, tmp_path):
    folder, change = broken
    name = "model.layers.2.self_attn.o_proj.weight"
    change(lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    message = refusal(folder, tmp_path)
    assert f"model.layers.1.self_attn.o_proj.weight F32 and {name} F16" in message


def test_thousands_of_wrong_tensors_are_cut_and_counted(broken, tmp_path):
    folder, change = broken
    more = {f"model.layers.{i}.extra.weight": np.zeros([1], np.float32) for i in range(3, 3003)}
    change(lambda tensors: tensors.update(more))
    lines = refusal(folder, tmp_path).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  and 2980 more"


# ---- which file ----------------------------------------------------------------------------------


@pytest.fixture
def split(checkpoint, tmp_path):
    """A checkpoint in several files, a tensor of it in two, and its index."""
    folder = tmp_path / "split"
    shutil.copytree(checkpoint("moonlight", "float32", "30KB"), folder)
    index = json.loads((folder / huggingface.INDEX).read_text())
    right = index["weight_map"]["model.norm.weight"]
    other = next(file for file in sorted(set(index["weight_map"].values())) if file != right)
    tensors = safetensors.numpy.load_file(folder / other)
    tensors["model.norm.weight"] = np.full([32], 7, np.float32)
    safetensors.numpy.save_file(tensors, folder / other, metadata={"format": "pt"})
    return folder, index, right, other


@pytest.mark.parametrize("which", ["right", "other"])
def test_a_tensor_of_two_files_is_taken_from_the_one_that_the_index_names(which, split, tmp_path):
    folder, index, right, other = split
    index["weight_map"]["model.norm.weight"] = {"right": right, "other": other}[which]
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    import_checkpoint(folder, tmp_path / "run")
    got = load(tmp_path / "run")[1]["final_norm"]["scale"]
    truth = peer().model.norm.weight.detach().numpy() if which == "right" else np.full([32], 7)
    np.testing.assert_array_equal(got, truth)


def test_a_tensor_of_two_files_without_an_index_is_refused(split, tmp_path):
    folder, _, right, other = split
    (folder / huggingface.INDEX).unlink()
    message = refusal(folder, tmp_path)
    assert "add model.safetensors.index.json, whose weight_map names the right ones" in message
    assert message.splitlines()[1:] == [
        f"  model.norm.weight in {' and '.join(sorted([right, other]))}"
    ]


def test_a_copy_of_every_tensor_is_refused_in_a_short_list(checkpoint, tmp_path):
    folder = tmp_path / "twice"
    shutil.copytree(checkpoint(), folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    lines = refusal(folder, tmp_path).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[1].endswith(" in consolidated.safetensors and model.safetensors")


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {"a": 3}}, [], "text"])
def test_an_index_that_maps_nothing_is_refused_in_a_sentence(index, split, tmp_path):
    folder = split[0]
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    message = refusal(folder, tmp_path)
    assert str(folder / huggingface.INDEX) in message
    assert len(message.splitlines()) == 1


def test_an_index_that_names_the_wrong_file_is_refused(split, tmp_path):
    folder, index, right, other = split
    name = next(n for n, f in index["weight_map"].items() if f == right and "norm" not in n)
    index["weight_map"][name] = other
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    message = refusal(folder, tmp_path)
    assert message.splitlines()[1:] == [f"  {name} in {other}"]


# ---- stacked experts -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["moonlight", "odd experts, halves", "groups"])
def test_experts_that_transformers_stacks_are_those_that_it_writes_apart(
    variant, checkpoint, tmp_path
):
    peer(variant).save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = tensors_in(tmp_path / "stacked")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    assert not any("experts.0." in name for name in names)
    import_checkpoint(tmp_path / "stacked", tmp_path / "run")
    import_checkpoint(checkpoint(variant), tmp_path / "apart")
    assert by_bytes(tmp_path / "run") == by_bytes(tmp_path / "apart")


def test_stacked_experts_of_a_wrong_shape_or_twice_are_refused(tmp_path):
    peer().save_pretrained(tmp_path / "stacked", save_original_format=False)
    path = tmp_path / "stacked/model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = tensors[name][:, :16].copy()
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"] = np.zeros([16, 32], np.float32)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    assert refusal(tmp_path / "stacked", tmp_path).splitlines()[1:] == [
        f"  misshapen  {name} [8, 16, 32], but must be [8, 32, 32]",
        "  unknown    model.layers.1.mlp.experts.0.up_proj.weight [16, 32]",
    ]


# ---- multi-token prediction ----------------------------------------------------------------------


def add_extra_layer(folder, change, number=3, **counts):
    """A layer after the last one, as DeepSeek-V3 publishes it, and what the config says of it."""

    def add(tensors):
        last = "model.layers.2."
        block = {name: x for name, x in tensors.items() if name.startswith(last)}
        for name, x in block.items():
            tensors[name.replace(last, f"model.layers.{number}.")] = x + 1
        for name, shape in {
            "eh_proj.weight": [32, 64],
            "enorm.weight": [32],
            "hnorm.weight": [32],
            "embed_tokens.weight": [48, 32],
            "shared_head.norm.weight": [32],
            "shared_head.head.weight": [48, 32],
        }.items():
            tensors[f"model.layers.{number}.{name}"] = np.zeros(shape, np.float32)

    change(add)
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, **counts}))


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_a_layer_of_multi_token_prediction_is_left_out_with_a_note(
    key, broken, checkpoint, tmp_path, capsys
):
    folder, change = broken
    add_extra_layer(folder, change, **{key: 1})
    main.main(["import-hf", str(folder), "--out", str(tmp_path / "run")])
    shown = " ".join(capsys.readouterr().err.split())
    assert "model.layers.3, of multi-token prediction, is left out; the model does" in shown
    import_checkpoint(checkpoint(), tmp_path / "plain")
    assert by_bytes(tmp_path / "run") == by_bytes(tmp_path / "plain")
    assert huggingface.read_config(tmp_path / "run")[1][key] == 0


@pytest.mark.parametrize(("number", "counts"), [(3, {}), (4, {"num_mtp_layers": 1})])
def test_a_layer_of_multi_token_prediction_that_is_not_counted_is_refused(
    number, counts, broken, tmp_path
):
    folder, change = broken
    add_extra_layer(folder, change, number, **counts)
    message = refusal(folder, tmp_path)
    assert f"the checkpoint has model.layers.{number}, a layer of multi-token" in message
    assert f"set it to {number - 2}, and the layer is left out" in message


def test_a_missing_shard_is_named(checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint("moonlight", "bfloat16", "20KB"), folder)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    assert f"lacks {last.name}, which its index names" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', but must be 'deepseek_v3'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be num_attention_heads, 4"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', but must be 'sigmoid'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, but must be False"),
        ({"rope_parameters": None}, "rope_theta is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0, but must be absent or"),
        ({"vocab_size": "48"}, "vocab_size is '48', but must be a whole number"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0, but must be a whole number"),
        ({"hidden_size": -32}, "hidden_size is -32, but must be at least 1"),
        ({"n_group": True}, "n_group is True, but must be a whole number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, but must be true or false"),
        (
            {"rope_theta": "1e4", "rope_parameters": None},
            "rope_theta is '1e4', but must be a number",
        ),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1, but must be a whole"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message, broken, tmp_path):
    folder, _ = broken
    config = {**json.loads((folder / "config.json").read_text()), **change}
    kept = {key: value for key, value in config.items() if key not in change or value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    assert message in refusal(folder, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '{"a": ', "\udcff"])
def test_a_config_that_is_no_object_is_refused(text, broken, tmp_path):
    folder, _ = broken
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(folder, tmp_path)
    assert f"{folder / 'config.json'}" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default"}, {"type": "default"}, {"rope_type": "default", "factor": 1.0}]
)
@pytest.mark.parametrize("nested", [True, False])
def test_plain_rotary_parameters_are_read_however_they_are_spelt(rope, nested, broken, tmp_path):
    """The logits are those of `transformers`, which reads this spelling as well."""
    folder, _ = broken
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    theta = {"rope_theta": 50.0}
    spelt = {"rope_scaling": {**rope, **theta}} if nested else {"rope_scaling": rope, **theta}
    (folder / "config.json").write_text(json.dumps({**config, **spelt}))
    assert import_checkpoint(folder, tmp_path / "run").rope_theta == 50.0
    theirs = transformers.DeepseekV3Config.from_pretrained(folder)
    assert theirs.rope_parameters["rope_theta"] == 50.0
    assert theirs.rope_parameters["rope_type"] == "default"


def test_nothing_is_left_of_a_copy_that_stops_half_way(checkpoint, tmp_path):
    def stopping(tensors):
        yield from list(tensors)[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(checkpoint(), tmp_path / "run", stopping)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_copy_there_and_back(checkpoint, tmp_path, capsys):
    source, run, back = checkpoint(), tmp_path / "runs/run", tmp_path / "back"
    main.main(["import-hf", str(source), "--out", str(run)])
    main.main(["export-hf", str(run), "--out", str(back)])
    assert tensors_in(back) == tensors_in(source)
    assert "3 layers, 8 experts, 46,864 parameters" in capsys.readouterr().err
    for arguments, message in (
        (["import-hf", str(source), "--out", str(run)], "exists; give a folder that does not"),
        (["import-hf", str(run), "--out", str(tmp_path / "x")], "does not describe a Moonlight"),
        (["export-hf", str(source), "--out", str(tmp_path / "x")], "has no sizes of a Moonlight"),
        (["export-hf", str(tmp_path), "--out", str(tmp_path / "x")], "there is no run in"),
    ):
        with pytest.raises(SystemExit) as stop:
            main.main(arguments)
        assert stop.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
