"""`optax-muon plan`: table, numbers, picture, and one clear line for every wrong input."""

import collections
import io
import json
import math
import subprocess
import sys

import jax
import matplotlib.image
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon import View
from optax_muon.cli import main
from optax_muon.cli.plan import MODELS, PlanModel, tree
from optax_muon.cli.reports.plan import png
from optax_muon.cli.reports.plan_devices import bands
from optax_muon.models import abstract


@pytest.fixture(autouse=True)
def standard_promotion():
    """jax.nn.dot_product_attention, which a Llama's tree is traced through, promotes bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# Parameters of the published checkpoints, and how exactly they are stated: Llama's on Hugging Face,
# Moonlight's in its report as 15.96B.
PUBLISHED = {
    "llama3-1b": (1_235_814_400, 0),
    "llama3-8b": (8_030_261_248, 0),
    "llama3-8b-unrolled": (8_030_261_248, 0),
    "moonlight-16b-a3b": (15_960_000_000, 5_000_000),
}


def planned(model, platform="tpu", layout=None, **sizes):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    params = abstract.on_mesh(tree(model), mesh)
    return optax_muon.plan(params, layout=layout, platform=platform)


def refusal(capsys, *arguments):
    """The one line of an error that ends the command with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main.main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix("optax-muon: ").strip()


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_trees_have_the_published_number_of_parameters(model):
    leaves = jax.tree.leaves(tree(model))
    count, rounding = PUBLISHED[model]
    assert abs(sum(math.prod(leaf.shape) for leaf in leaves) - count) <= rounding


@pytest.mark.parametrize("model", MODELS)
def test_muon_takes_all_matrices_but_embedding_head_and_router(model):
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32"), tree(model))
    rows = optax_muon.label(params).rows
    left = {row.path for row in rows if row.optimizer == "adamw" and len(row.shape) > 1}
    left = {path for path in left if not path.endswith("norm/scale")}
    assert left <= {"embed/embedding", "lm_head/kernel", "moe_layers/router/kernel"}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_help_names_the_model(model):
    assert model in PlanModel.__doc__


@pytest.mark.parametrize("arguments", [["plan"], ["plan", "--help"]], ids=" ".join)
def test_who_reads_the_output_may_leave(arguments):
    command = [sys.executable, "-c", "from optax_muon.cli.main import main; main()"]
    running = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running.stdout.close()
    _, complaints = running.communicate()
    assert (running.returncode, complaints) == (1, "")


def test_an_unrolled_model_has_the_stacks_parameters_layer_by_layer():
    stacked, unrolled = tree("llama3-8b"), tree("llama3-8b-unrolled")
    assert len(unrolled["layers"]) == 32
    for one in unrolled["layers"].values():
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(stacked["layers"]), strict=True)
        assert all((32, *p.shape) == q.shape and (None, *p.spec) == tuple(q.spec) for p, q in pairs)


def test_the_table_is_the_plans(capsys):
    main.main(["plan", "--model", "llama3-8b", "--mesh", "fsdp=16,tensor=4"])
    assert capsys.readouterr().out == f"{planned('llama3-8b', fsdp=16, tensor=4)}\n"


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        (["--mesh", "fsdp=8"], {"fsdp": 8}),
        (["--mesh", "data=2, fsdp=4", "--platform", "cpu"], {"data": 2, "fsdp": 4}),
        (["--mesh", "fsdp=4,tensor=2", "--layout", "gather"], {"fsdp": 4, "tensor": 2}),
        (["--mesh", "fsdp=1"], {"fsdp": 1}),
    ],
)
def test_the_numbers_are_the_plans(options, plan, tmp_path):
    path = tmp_path / "plan.json"
    main.main(["plan", "--model", "llama3-1b", *options, "--json", str(path)])
    given = dict(zip(options[::2], options[1::2], strict=True))
    platform, layout = given.get("--platform", "tpu"), given.get("--layout")
    want = planned("llama3-1b", platform, layout, **plan).to_dict()
    assert json.loads(path.read_text()) == want


def test_the_picture_shows_something(tmp_path):
    path = tmp_path / "plan.png"
    main.main(["plan", "--model", "llama3-1b", "--mesh", "fsdp=8", "--png", str(path)])
    image = matplotlib.image.imread(path)
    assert image.shape[1] == 1800
    assert 0.01 < np.mean(image[..., :3].min(axis=-1) < 0.9) < 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "llama9"), ("'llama9'", "llama3-8b", "moonlight-16b-a3b")),
        (("--platform", "abacus"), ("'abacus'", "tpu, gpu, cpu")),
        (("--layout", "split"), ("'split'", "home, gather")),
        (("--mesh", ""), ("--mesh", "fsdp=16,tensor=4")),
        (("--mesh", "fsdp"), ("'fsdp'", "fsdp=16,tensor=4")),
        (("--mesh", "fsdp=0"), ("'fsdp=0'", "fsdp=16,tensor=4")),
        (("--mesh", "fsdp=-8"), ("'fsdp=-8'", "fsdp=16,tensor=4")),
        (("--mesh", "fsdp=4,fsdp=2"), ("'fsdp=4,fsdp=2'", "different")),
        (("--mesh", "fsdp=16,model=4"), ("'model'", "expert, fsdp, tensor, data")),
        (("--mesh", "fsdp=3"), ("fsdp", "do not divide over 3 devices")),
        (("--mesh", "data=100000"), ("65536",)),
        (("--png", "missing/plan.png"), ("missing/plan.png", "folder that exists")),
        (("--png", "plan.svg"), ("plan.svg", ".png")),
        (("--json", "plan.txt"), ("plan.txt", ".json")),
        (("--json", "a.json", "--png", "missing/plan.png"), ("missing/plan.png",)),
    ],
)
def test_a_wrong_input_is_one_line_and_nothing_is_written(
    arguments, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, *arguments)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_written_over(capsys, tmp_path):
    (tmp_path / "plan.png").mkdir()
    assert "give a file" in refusal(capsys, "--png", tmp_path / "plan.png")


def test_a_disk_that_refuses_is_one_line(capsys, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    line = refusal(capsys, "--mesh", "fsdp=8", "--json", tmp_path / "plan.json")
    assert line.endswith("plan.json: No space left on device")


MESHES = [
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 16, "tensor": 4},
    {"fsdp": 64, "tensor": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 1},
]


@pytest.mark.parametrize("layout", [None, "home", "gather"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_bands_account_for_every_matrix_and_every_byte(sizes, layout):
    plan = planned("llama3-1b", layout=layout, **sizes).to_dict()
    for band in bands(plan):
        homes = dict(zip(band.owner, zip(band.first, band.owned, strict=True), strict=True))
        owned = sorted(n for first, count in homes.values() for n in range(first, first + count))
        start = band.assignment["start"]
        assert owned == list(range(start, start + band.assignment["count"]))
        sent = band.traffic.inward + band.traffic.working + band.traffic.outward
        assert sent == band.assignment["wire"]
        # Only devices that share a matrix hear of each other while they work.
        assert bool(band.traffic.working) == (band.assignment["layout"] == "split")


def test_the_devices_of_a_home_are_as_many_as_share_it():
    for band in bands(planned("llama3-8b", fsdp=64, tensor=8).to_dict()):
        sizes = collections.Counter(band.owner.tolist())
        assert set(sizes.values()) == {math.prod(band.assignment["shared_by"].values())}


def test_experts_belong_to_the_devices_that_hold_them():
    mesh = AbstractMesh((4, 2), ("expert", "fsdp"))
    params = {"experts": jax.ShapeDtypeStruct((8, 64, 64), "float32")}
    views = {"experts": View(1, 2)}
    plan = optax_muon.plan(params, views=views, shardings=P("expert", "fsdp"), mesh=mesh)
    [band] = bands(plan.to_dict())
    assert band.owned.tolist() == [1] * 8
    assert band.first.tolist() == list(range(8))


def test_idle_devices_have_no_work():
    mesh = AbstractMesh((8,), ("fsdp",))
    params = {"kernel": jax.ShapeDtypeStruct((3, 64, 64), "float32")}
    plan = optax_muon.plan(
        params,
        orthogonalizer=lambda x: x,
        views={"kernel": View(1, 2)},
        shardings=P(None, "fsdp"),
        mesh=mesh,
    )
    [band] = bands(plan.to_dict())
    assert (band.busy > 0).tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_has_a_picture(sizes):
    picture = png(planned("llama3-1b", **sizes).to_dict(), "a title", dpi=40)
    image = matplotlib.image.imread(io.BytesIO(picture))
    assert np.ptp(image[..., :3]) > 0.8
