"""`optax-muon spectra`: the entropies of the paper, of every matrix, by group and step."""

import csv
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import safetensors.numpy

from optax_muon import label
from optax_muon.cli.main import main
from optax_muon.matrices.paths import named_leaves
from optax_muon.models import llama, moonlight, safetensors_io
from optax_muon.training import spectra as spectra_module
from optax_muon.training.checkpoints import Checkpoints
from optax_muon.training.loop import State
from optax_muon.training.run_folder import RunFolder
from optax_muon.training.spectra import (
    GROUPS,
    SpectraTrial,
    Spectrum,
    group_of,
    rows,
    spectra,
    views,
)

LLAMA = llama.LlamaConfig(width=16, depth=2, heads=2, kv_heads=1, mlp=24, context=8)
MOONLIGHT = dataclasses.replace(
    moonlight.CONFIGS["moonlight-tiny"], width=32, depth=3, mlp=40, expert_mlp=24, q_rank=12
)


def normal(shapes):
    """Parameters of these shapes, standard normal."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: random.standard_normal(s.shape, np.float32), shapes)


@functools.cache
def llama_params():
    model, tokens = llama.Llama(LLAMA), jnp.zeros([1, 1], jnp.int32)
    return normal(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


@functools.cache
def moonlight_params():
    model = moonlight.Moonlight(MOONLIGHT)
    return normal(jax.eval_shape(lambda key: moonlight.init(model, key), jax.random.key(0)))


MODELS = pytest.mark.parametrize("make", [llama_params, moonlight_params])


ENTRANTS = (
    SpectraTrial("adamw", "AdamW", "adamw"),
    SpectraTrial("muon-carried", "Muon, AdamW lr", "muon"),
    SpectraTrial("muon-tuned", "Muon, own lr", "muon"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three trials with two checkpoints each; Muon's matrices are flatter."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    trials = [dataclasses.asdict(trial) for trial in ENTRANTS]
    folder.config.write_text(json.dumps({"trials": trials}))
    for number, trial in enumerate(ENTRANTS):
        with Checkpoints(folder.checkpoints(trial.name)) as checkpoints:
            for step in (10, 20):
                params = flattened(llama_params(), number * step / 100)
                checkpoints.save(step, State(params, {"count": jnp.zeros([], jnp.int32)}))
    return folder.path


def flattened(params, by):
    """Matrices so far on their way to their orthogonal factor; 1 is there."""

    def flat(leaf):
        if leaf.ndim < 3:
            return jnp.asarray(leaf)
        u, s, v = np.linalg.svd(leaf, full_matrices=False)
        return jnp.asarray((u * s[..., None, :] ** np.float32(1 - by)) @ v)

    return jax.tree.map(flat, params)


def table_of(path):
    with (path / "spectra.csv").open() as file:
        return list(csv.DictReader(file))


def naive(matrix):
    """Entropy and stable rank of one matrix, in float64."""
    squares = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    share = squares / squares.sum()
    return -(share * np.log(share)).sum() / np.log(len(share)), squares.sum() / squares.max()


def refused(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    return lines[0]


# Which matrices there are


@MODELS
def test_every_matrix_of_muons_and_the_router_has_a_group_and_nothing_else_has(make):
    params = make()
    muons = {row.path for row in label(params).rows if row.blocks}
    routers = {path for path in named_leaves(params) if path.endswith("router/kernel")}
    assert {path for path in named_leaves(params) if group_of(path)} == muons | routers
    assert set(views(params)) == muons | routers


def test_moonlight_has_all_groups_and_llama_those_without_experts():
    assert {group_of(path) for path in views(moonlight_params())} == set(GROUPS)
    assert {group_of(path) for path in views(llama_params())} == {"AttnQO", "AttnKV", "Dense"}


def test_layers_and_experts_count_one_by_one():
    found = spectra(moonlight_params())
    counts = {s.path: s.values.shape for s in found}
    assert counts["moe_layers/experts/up_proj"] == (2 * 8, 24)
    assert counts["moe_layers/router/kernel"] == (2, 8)
    assert counts["dense_layers/attn/q_a_proj/kernel"] == (1, 12)


def test_a_matrix_of_no_group_is_named():
    with pytest.raises(spectra_module.UsageError, match="strange/kernel is of no group"):
        views({"strange": {"kernel": jnp.ones([4, 8])}})


# Their numbers


@MODELS
def test_entropy_and_stable_rank_are_those_of_a_float64_svd_of_each_matrix(make, monkeypatch):
    monkeypatch.setattr(spectra_module, "CHUNK_BYTES", 10_000)  # a few matrices at once
    params = make()
    leaves = named_leaves(params)
    for spectrum in spectra(params):
        leaf = np.asarray(leaves[spectrum.path])
        matrices = leaf.reshape(-1, *leaf.shape[-2:])
        truth = np.array([naive(matrix) for matrix in matrices])
        # float32: singular values good to 1e-6 of the largest, 50 of them in a sum.
        np.testing.assert_allclose(spectrum.entropy, truth[:, 0], atol=1e-5)
        np.testing.assert_allclose(spectrum.stable_rank, truth[:, 1], rtol=1e-5)
        values = np.linalg.svd(matrices.astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(spectrum.values, values / values[:, :1], atol=1e-5)


def test_bfloat16_and_a_zero_matrix_have_finite_numbers():
    stack = jnp.stack([jnp.eye(4, 8), jnp.zeros([4, 8])]).astype(jnp.bfloat16)
    [spectrum] = spectra({"layers": {"mlp": {"up_proj": {"kernel": stack}}}})
    assert spectrum.entropy.tolist() == [1, 0]
    assert spectrum.values.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_a_matrix_is_decomposed_once():
    compiled = spectra_module._decompose.lower(jnp.ones([3, 8, 12])).compile()
    assert compiled.as_text().count("custom-call(") == 1


def test_higher_counts_matrices_of_the_same_step_against_adamw():
    def spectrum(trial, step, *entropy):
        numbers = np.array(entropy, np.float32)
        return Spectrum(trial, step, "Dense", "mlp/up_proj/kernel", None, numbers, numbers)

    trials = [SpectraTrial("muon", "Muon", "muon"), SpectraTrial("adamw", "AdamW", "adamw")]
    found = [
        spectrum("adamw", 10, 0.5, 0.5, 0.5),
        spectrum("muon", 10, 0.6, 0.5, 0.4),
        spectrum("muon", 20, 0.9, 0.9, 0.9),
    ]
    assert [(row.trial, row.step, row.higher) for row in rows(trials, found)] == [
        ("muon", 10, 1),
        ("muon", 20, None),
        ("adamw", 10, None),
    ]


# The command


def test_the_table_holds_every_kept_checkpoint_of_every_contestant(run, tmp_path, capsys):
    main(["spectra", str(run), "--out", str(tmp_path / "found")])
    lines = table_of(tmp_path / "found")
    groups = {"AttnQO": 4, "AttnKV": 4, "Dense": 6}
    assert [(line["trial"], line["step"], line["group"]) for line in lines] == [
        (e.name, step, group) for e in ENTRANTS for step in ("10", "20") for group in groups
    ]
    assert all(int(line["matrices"]) == groups[line["group"]] for line in lines)
    shown = capsys.readouterr().out
    for trial in ENTRANTS[1:]:
        assert f"{trial.title}: 28 of 28 matrices (100.0%)" in " ".join(shown.split())


def test_the_numbers_of_a_checkpoint_are_those_of_its_parameters(run):
    main(["spectra", str(run)])
    with Checkpoints(RunFolder(run).checkpoints("adamw")) as checkpoints:
        leaves = named_leaves(checkpoints.params(20))
    truth = [
        naive(matrix)[0]
        for name in ("gate_proj", "up_proj", "down_proj")
        for matrix in np.asarray(leaves[f"layers/mlp/{name}/kernel"])
    ]
    [line] = [
        line
        for line in table_of(run)
        if (line["trial"], line["step"], line["group"]) == ("adamw", "20", "Dense")
    ]
    assert float(line["entropy"]) == pytest.approx(np.mean(truth), abs=1e-5)
    assert float(line["entropy_upper"]) == pytest.approx(np.quantile(truth, 0.75), abs=1e-5)


def test_the_pictures_show_something(run):
    main(["spectra", str(run)])
    for name in ("spectra.png", "singular_values.png"):
        picture = matplotlib.image.imread(run / name)
        assert picture.shape[0] > 300
        assert (picture[..., :3] < 0.9).any(axis=-1).mean() > 0.01


def test_a_contestant_without_a_checkpoint_is_left_out(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "part")
    shutil.rmtree(RunFolder(tmp_path / "part").checkpoints("adamw"))
    main(["spectra", str(tmp_path / "part")])
    assert {line["trial"] for line in table_of(tmp_path / "part")} == {
        "muon-carried",
        "muon-tuned",
    }
    assert "AdamW at" not in capsys.readouterr().out


def test_an_imported_checkpoint_has_one_point(tmp_path, capsys):
    params = {path: np.asarray(leaf) for path, leaf in named_leaves(moonlight_params()).items()}
    path = tmp_path / "imported"
    with safetensors_io.folder_at_once(path) as draft:
        (draft / "config.json").write_text(json.dumps({"model": dataclasses.asdict(MOONLIGHT)}))
        safetensors.numpy.save_file(params, draft / "params.safetensors")
    main(["spectra", str(path)])
    lines = table_of(path)
    assert [line["group"] for line in lines] == list(GROUPS)
    assert {(line["trial"], line["step"], line["higher"]) for line in lines} == {
        ("imported", "0", "")
    }
    assert "AdamW" not in capsys.readouterr().out


def test_without_a_run_or_a_checkpoint_it_says_so(tmp_path, capsys):
    assert "there is no run in" in refused(capsys, "spectra", str(tmp_path / "nothing"))
    config = {"trials": [{"name": "adamw", "title": "AdamW", "optimizer": "adamw"}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "has no checkpoint of adamw" in refused(capsys, "spectra", str(tmp_path))
