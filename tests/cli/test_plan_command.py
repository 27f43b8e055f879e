"""`optax-muon plan`: table, numbers, picture, and one clear line for every wrong input."""

import collections
import io
import json
import math
import subprocess
import sys

import jax
import matplotlib.image
import pytest
from commands import refused
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import optax_muon
from optax_muon import View
from optax_muon.cli import main
from optax_muon.cli.plan import MODELS, PlanModel, tree
from optax_muon.cli.reports.plan import png
from optax_muon.drawing import Words
from optax_muon.models import abstract
from optax_muon.sharding import plan_devices

# A Llama's tree is traced through jax.nn.dot_product_attention.
pytestmark = pytest.mark.usefixtures("standard_promotion")

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
    """The error of `optax-muon plan`, without the name of the program."""
    return refused(capsys, "plan", *arguments).removeprefix("optax-muon: ")


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
    assert running.returncode == 1
    assert "Traceback" not in complaints and "BrokenPipe" not in complaints


def test_an_unrolled_model_has_the_stacks_parameters_layer_by_layer():
    stacked, unrolled = tree("llama3-8b"), tree("llama3-8b-unrolled")
    assert len(unrolled["layers"]) == 32
    for one in unrolled["layers"].values():
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(stacked["layers"]), strict=True)
        assert all((32, *p.shape) == q.shape and (None, *p.spec) == tuple(q.spec) for p, q in pairs)


def test_the_table_is_the_plans(capsys):
    main.main(["plan", "--model", "llama3-8b", "--mesh", "fsdp=16,tensor=4"])
    assert capsys.readouterr().out == f"{planned('llama3-8b', fsdp=16, tensor=4)}\n"


def written(tmp_path, *options):
    """The numbers that the command writes."""
    path = tmp_path / "plan.json"
    main.main(["plan", "--model", "llama3-1b", *options, "--json", str(path)])
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", ["home", "gather"])
def test_the_file_covers_all_matrices_of_the_model(layout, tmp_path):
    data = written(tmp_path, "--mesh", "data=2, fsdp=4", "--layout", layout)
    assert data["mesh"] == {"data": 2, "fsdp": 4}
    # 16 layers of 2048: q and o, k and v of 512, gate, up and down of 8192.
    entries = 16 * 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)
    assert sum(b["matrices"] * b["rows"] * b["cols"] for b in data["buckets"]) == entries
    assert {a["layout"] for b in data["buckets"] for a in b["assignments"]} == {layout}


def test_gathering_receives_everything_before_the_work(tmp_path):
    data = written(tmp_path, "--mesh", "fsdp=4,tensor=2", "--layout", "gather")
    # In bfloat16, 7 of 8 tiles of every matrix.
    entries = 16 * 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)
    assert data["received_bytes"] == data["received_inward_bytes"] == 2 * entries * 7 // 8
    assert data["received_working_bytes"] == data["received_outward_bytes"] == 0


@pytest.mark.parametrize(("platform", "dtype"), [("tpu", "bfloat16"), ("cpu", "float32")])
def test_the_platform_decides_the_dtype(platform, dtype, tmp_path):
    assert written(tmp_path, "--mesh", "fsdp=2", "--platform", platform)["dtype"] == dtype


def test_the_picture_is_written(tmp_path):
    path = tmp_path / "plan.png"
    main.main(["plan", "--model", "llama3-1b", "--mesh", "fsdp=8", "--png", str(path)])
    assert matplotlib.image.imread(path).shape[1] == 12 * 150


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


def bands(plan):
    return plan_devices.bands(plan.mesh_axes, plan.buckets)


MESHES = [
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 16, "tensor": 4},
    {"fsdp": 64, "tensor": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 1},
]


@pytest.mark.parametrize("layout", [None, "home", "gather"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_bands_account_for_every_matrix(sizes, layout):
    for band in bands(planned("llama3-1b", layout=layout, **sizes)):
        homes = dict(zip(band.owner, zip(band.first, band.owned, strict=True), strict=True))
        owned = sorted(n for first, count in homes.values() for n in range(first, first + count))
        start = band.assignment.start
        assert owned == list(range(start, start + band.assignment.count))


@pytest.mark.parametrize("layout", [None, "home", "gather"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_only_devices_that_share_a_matrix_receive_anything_while_they_work(sizes, layout):
    for band in bands(planned("llama3-1b", layout=layout, **sizes)):
        working = band.assignment.cost.traffic.working.total
        assert bool(working) == (band.assignment.layout == "split")


def test_as_many_devices_have_a_home_as_share_it():
    for band in bands(planned("llama3-8b", fsdp=64, tensor=8)):
        sizes = collections.Counter(band.owner.tolist())
        assert set(sizes.values()) == {band.assignment.sharing}


def test_experts_belong_to_the_devices_that_hold_them():
    mesh = AbstractMesh((4, 2), ("expert", "fsdp"))
    params = {"experts": jax.ShapeDtypeStruct((8, 64, 64), "float32")}
    views = {"experts": View(1, 2)}
    plan = optax_muon.plan(params, views=views, shardings=P("expert", "fsdp"), mesh=mesh)
    [band] = bands(plan)
    assert band.owned.tolist() == [1] * 8
    assert band.first.tolist() == list(range(8))


def three_matrices_on_eight_devices():
    mesh = AbstractMesh((8,), ("fsdp",))
    params = {"kernel": jax.ShapeDtypeStruct((3, 64, 64), "float32")}
    return optax_muon.plan(
        params,
        orthogonalizer=lambda x: x,
        views={"kernel": View(1, 2)},
        shardings=P(None, "fsdp"),
        mesh=mesh,
    )


def test_idle_devices_have_no_work():
    [band] = bands(three_matrices_on_eight_devices())
    assert (band.busy > 0).tolist() == [True] * 3 + [False] * 5


def texts(picture):
    """All words of a picture."""
    return [shape.text for shape in picture.shapes if isinstance(shape, Words) and shape.text]


def test_the_picture_names_owners_and_idle_devices():
    found = texts(three_matrices_on_eight_devices().picture("a title"))
    assert "a title on 8 devices: fsdp 8" in found
    assert "3 x (64 x 64)" in found
    assert "home: 8 homes, 1 each, 5 idle" in found
    cells = [text for text in found if text == "0" or text.startswith("1\nno. ")]
    assert cells[:8] == ["1\nno. 0", "1\nno. 1", "1\nno. 2", *"00000"]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_picture_has_a_band_for_every_assignment(sizes):
    plan = planned("llama3-1b", **sizes)
    found = texts(plan.picture())
    for bucket in plan.buckets:
        heading = f"({bucket.bucket.rows} x {bucket.bucket.cols})"
        assert sum(text.endswith(heading) for text in found) >= len(bucket.assignments)
    assert "a balanced\nshare" in found


def test_the_picture_is_as_wide_as_asked_for():
    image = matplotlib.image.imread(io.BytesIO(png(planned("llama3-1b", fsdp=4), dpi=40)))
    assert image.shape[1] == 12 * 40
