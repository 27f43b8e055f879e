"""Odd options, files and folders: each is refused in one sentence, and nothing is written.

A row is what is typed, and what the sentence says. The commands run in a folder of odd things.
"""

import dataclasses
import json
import math
import shlex
import shutil

import jax
import numpy as np
import pytest
from commands import refused

from optax_muon.cli import finetune, train
from optax_muon.cli.main import main
from optax_muon.errors import UsageError
from optax_muon.models.llama import LlamaConfig
from optax_muon.models.moonlight import CONFIGS, MoonlightConfig
from optax_muon.models.safetensors_io import folder_at_once
from optax_muon.training import sweep
from optax_muon.training.checkpoints import Checkpoints, RetentionPolicy
from optax_muon.training.config import TrainConfig
from optax_muon.training.initialize import initial_state
from optax_muon.training.optimizers import HyperParams, Trial, optimizer, transformation
from optax_muon.training.presets import PRESETS
from optax_muon.training.run_config import RunConfig
from optax_muon.training.run_folder import Journal, RunFolder

pytestmark = pytest.mark.usefixtures("standard_promotion")

TINY = PRESETS["tiny"]
CONFIG = TrainConfig(TINY.model, 8, 4, seed=0, eval_every=2, eval_sequences=1)
SIZES = dataclasses.asdict(TINY.model)
STEP = {"trial": "muon", "step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "seconds": 1.0}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder of odd files, odd runs, and one good run."""
    root = tmp_path_factory.mktemp("workspace")
    (root / "empty").mkdir()
    (root / "file").write_text("text")
    (root / "empty.txt").write_text("")
    (root / "text").mkdir()
    for i in range(40):
        (root / f"text/m{i}.py").write_text("".join(f"x{j} = {i * j}\n" for j in range(40)))
    write_arrays(root)
    write_pairs(root)
    for name, content in {
        "broken": "{",
        "list": "[]",
        "nothing": "{}",
        "no-trials": '{"trials": 3, "training": {"model": {}}}',
        "nameless": '{"trials": [{}], "training": 5}',
        "no-heads": json.dumps({"model": {**SIZES, "num_attention_heads": 0}}),
        "words": json.dumps({"model": {**SIZES, "hidden_size": "wide"}}),
        "half-moon": '{"model": {"hidden_size": 8}}',
        "hub": '{"model_type": "deepseek_v3", "hidden_size": 8}',
        "import": json.dumps({"model": SIZES, "huggingface": {}}),
        "swept": json.dumps({"training": {"model": SIZES}, "fingerprint": ""}),
    }.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(content)
    (root / "bytes").mkdir()
    (root / "bytes/config.json").write_bytes(b"\xff\xfe")
    write_run(root)
    for copy in ("around", "around/inner"):
        shutil.copytree(root / "run", root / copy)
    (root / "link").symlink_to("run")
    return root


def write_arrays(root):
    for name, array in {
        "float": np.zeros(5000, np.float32),
        "complex": np.zeros(5000, np.complex64),
        "table": np.zeros((100, 100), np.int32),
        "none": np.zeros(0, np.int32),
        "bool": np.zeros(5000, bool),
        "large": np.full(5000, 300, np.int32),
        "negative": np.full(5000, -1, np.int64),
        "scalar": np.int32(3),
        "objects": np.array([None] * 5000),
    }.items():
        np.save(root / f"{name}.npy", array)
    (root / "text.npy").write_text("no array")


def write_pairs(root):
    pairs = [json.dumps({"prompt": f"p{i}", "completion": f"c{i}"}) for i in range(40)]
    (root / "good.jsonl").write_text("\n".join(pairs))
    (root / "one.jsonl").write_text(pairs[0])
    (root / "half.jsonl").write_text("\n".join([*pairs, '{"prompt": "x"']))
    (root / "null.jsonl").write_text("null\n")
    (root / "number.jsonl").write_text('{"prompt": 1, "completion": "x"}\n')


def write_run(root):
    """What a run of one step of `tiny` leaves, and one that has not saved yet."""
    trial = Trial(optimizer("muon"), HyperParams(0.02, 0.1))
    run = RunConfig("tiny", "text", "", CONFIG, (trial,), save_every=2)
    folder = RunFolder(root / "run")
    folder.create_or_resume(run.to_json(), resume=False, overwrite=False)
    with Checkpoints(folder.checkpoints("muon")) as checkpoints:
        checkpoints.save(1, initial_state(CONFIG, transformation(trial, CONFIG)))
    untrained = RunFolder(root / "untrained")
    untrained.create_or_resume(run.to_json(), resume=False, overwrite=False)


TRAIN = "train --model tiny --data text"
SWEEP = "sweep --model tiny --data text"
FINETUNE = "finetune --from run --data good.jsonl"
MOON = "train --model moonlight-tiny --data text"
NO_RUN = "there is no run in"

OPTIONS = {
    f"{TRAIN} --steps 0": "--steps is 0; it must be at least 1",
    f"{TRAIN} --steps -3": "--steps is -3; it must be at least 1",
    f"{TRAIN} --batch 0": "--batch is 0; it must be at least 1",
    f"{TRAIN} --batch -8": "--batch is -8; it must be at least 1",
    f"{TRAIN} --context 0": "--context is 0; it must be at least 1",
    f"{TRAIN} --eval-every 0": "--eval-every is 0; it must be at least 1",
    f"{TRAIN} --save-every 0": "--save-every is 0; it must be at least 1",
    f"{TRAIN} --save-every -20": "--save-every is -20; it must be at least 1",
    f"{TRAIN} --keep-every 0": "--keep-every is 0; it must be at least 1",
    f"{TRAIN} --keep-every -100": "--keep-every is -100; it must be at least 1",
    f"{TRAIN} --seed -1": "--seed is -1; it must be at least 0",
    f"{TRAIN} --seed {2**63}": f"--seed is {2**63}; it must be at most {2**63 - 1}",
    f"{TRAIN} --steps {10**30}": "it must be at most",
    f"{TRAIN} --accumulate 0": "--accumulate is 0; it must be at least 1",
    f"{TRAIN} --accumulate 3": "does not divide into 3 micro-batches",
    f"{TRAIN} --profile 0": "--profile is 0; it must be at least 1",
    f"{TRAIN} --profile -1": "--profile is -1; it must be at least 1",
    f"{TRAIN} --mesh ''": "--mesh  has ''; it takes axes and sizes",
    f"{TRAIN} --mesh data=0": "--mesh data=0 has 'data=0'",
    f"{TRAIN} --mesh data=8,": "has ''; it takes axes",
    f"{TRAIN} --mesh data=3": "--mesh data=3 needs 3 devices, there are 8",
    f"{TRAIN} --mesh data=8,data=1": "has 'data=1'",
    f"{TRAIN} --schedule three-stage --steps 2": "needs at least 4",
    f"{TRAIN} --resume --overwrite": "are mutually exclusive",
    f"{TRAIN} --distributed": "--distributed needs --mesh",
    f"{TRAIN} --resume": NO_RUN,
    f"{TRAIN} --name .": "--name is '.', it must name a folder inside --runs runs",
    f"{TRAIN} --name ..": "--name is '..', it must name a folder inside --runs runs",
    f"{TRAIN} --name ../elsewhere": "it must name a folder inside --runs runs",
    f"{TRAIN} --name /nowhere": "it must name a folder inside --runs runs",
    f"{TRAIN} --name {'x' * 300}": "File name too long",
    f"{TRAIN} --runs file": "cannot make file/tiny",
    f"{TRAIN} --runs . --name empty": "exists; --resume continues it",
    f"{TRAIN} --runs . --name empty --overwrite": NO_RUN,
    f"{TRAIN} --model ''": "unknown model ''; there are",
    f"{TRAIN} --optimizers": "no optimizer is named",
    f"{TRAIN} --optimizers ''": "unknown optimizer ''",
    f"{MOON} --bias-update-speed nan": "--bias-update-speed is nan; it must be at least 0 and",
    f"{MOON} --bias-update-speed inf": "--bias-update-speed is inf; it must be at least 0 and",
    f"{MOON} --bias-update-speed -1": "--bias-update-speed is -1.0; it must be at least 0",
    f"{MOON} --qk-clip nan": "--qk-clip is nan; it must be positive",
    f"{MOON} --qk-clip inf": "--qk-clip is inf; it must be positive and finite",
    f"{MOON} --qk-clip 0": "--qk-clip is 0; it must be positive",
}

NUMBERS = {
    f"{TRAIN} --set muon.lr=nan": "lr is nan; it must be positive",
    f"{TRAIN} --set muon.lr=inf": "lr is inf; it must be positive and finite",
    f"{TRAIN} --set muon.lr=0": "lr is 0; it must be positive",
    f"{TRAIN} --set muon.weight_decay=nan": "weight_decay is nan; it must be at least 0",
    f"{TRAIN} --set muon.weight_decay=inf": "weight_decay is inf; it must be at least 0",
    f"{TRAIN} --set muon.weight_decay=-1": "weight_decay is -1; it must be at least 0",
    f"{TRAIN} --set muon.lr=": "is not OPTIMIZER.HYPERPARAMETER=NUMBER",
    f"{TRAIN} --set ''": "is not OPTIMIZER.HYPERPARAMETER=NUMBER",
    f"{TRAIN} --set muon.lr=1 muon.lr=2": "--set has muon.lr twice; give it once",
    f"{TRAIN} --set muon.speed=1": "muon has no hyperparameter 'speed'; it has lr, weight_decay",
    f"{TRAIN} --set sgd.lr=1": "unknown optimizer 'sgd'",
    f"{TRAIN} --set adamw.adamw_lr=1": "adamw has no hyperparameter 'adamw_lr'; it has lr, weight_",
    f"{SWEEP} --steps 0": "--steps is 0; it must be at least 1",
    f"{SWEEP} --weight-decay nan": "weight_decay is nan; it must be at least 0",
    f"{SWEEP} --weight-decay -1": "weight_decay is -1; it must be at least 0",
    f"{SWEEP} --weight-decay": "there is nothing to run",
    f"{SWEEP} --optimizers": "there is nothing to run",
    f"{SWEEP} --weight-decay 0.1 0.1": "decay 0.1 is asked for twice; give each value once",
    f"{SWEEP} --set muon.lr=1e-3,1e-3,2e-3": "muon lr 0.001 decay 0.1 is asked for twice",
    f"{SWEEP} --set muon.lr=1e-3,2e-3,inf": "lr is inf; it must be positive and finite",
    f"{SWEEP} --set adamw.adamw_lr=1e-3": (
        "--set has adamw.adamw_lr; sweep takes adamw.lr, muon.lr, muon.adamw_lr, and --weight-decay"
    ),
    f"{SWEEP} --out file": "--out file exists and is not a sweep; give another folder",
    f"{SWEEP} --out empty": "--out empty exists and is not a sweep; give another folder",
    f"{SWEEP} --out run": "or another --out",
    f"{SWEEP} --out file/x": "cannot make file/x",
    f"{FINETUNE} --lr nan": "lr is nan; it must be positive and finite",
    f"{FINETUNE} --lr -1": "lr is -1; it must be positive and finite",
    f"{FINETUNE} --weight-decay inf": "weight_decay is inf; it must be at least 0",
    f"{FINETUNE} --epochs 0": "--epochs is 0; it must be at least 1",
    f"{FINETUNE} --batch 0": "--batch is 0; it must be at least 1",
    f"{FINETUNE} --eval-every -1": "--eval-every is -1; it must be at least 1",
    f"{FINETUNE} --seed -1": "--seed is -1; it must be at least 0",
    f"{FINETUNE} --profile 0": "--profile is 0; it must be at least 1",
    f"{FINETUNE} --name ..": "it must name a folder inside --runs runs",
    "sample --runs . --run run --length 0": "--length is 0; it must be at least 1",
    "sample --runs . --run run --length -5": "--length is -5; it must be at least 1",
    "sample --runs . --run run --temperature nan": "--temperature is nan; it must be at least 0",
    "sample --runs . --run run --temperature inf": "--temperature is inf; it must be at least 0",
    "sample --runs . --run run --temperature -1": "--temperature is -1.0; it must be at least 0",
    "sample --runs . --run run --prompt \udcff": "--prompt is '\\udcff'; it must be text in UTF-8",
    "sample --runs . --run run --seed -1": "--seed is -1; it must be at least 0",
    "plan --mesh ''": "--mesh is ''; write different axes and sizes",
    "plan --mesh fsdp=0": "--mesh is 'fsdp=0'; write different axes and sizes",
    "plan --mesh fsdp=7": "which do not divide over 7 devices",
    "plan --model ''": "unknown model ''",
    "plan --png missing/x.png": "give a file in a folder that exists",
    "plan --json empty": "its name must end in .json",
}

DATA = {
    "empty.txt": "the text is too short for one sequence: 1 bytes in the training part",
    "empty": "no file matches 'empty/**'; --data takes a file, a folder or a glob",
    "missing": "no file matches 'missing'",
    "''": "no file matches ''",
    "[": "no file matches '['",
    "/dev/null": "no file matches '/dev/null'",
    "text.npy": "cannot read text.npy",
    "float.npy": "float.npy is float32 [5000]; tokens are integers along one axis",
    "complex.npy": "complex.npy is complex64 [5000]; tokens are integers along one axis",
    "table.npy": "table.npy is int32 [100, 100]; tokens are integers along one axis",
    "bool.npy": "bool.npy is bool [5000]; tokens are integers along one axis",
    "scalar.npy": "scalar.npy is int32 []; tokens are integers along one axis",
    "objects.npy": "cannot read objects.npy",
    "none.npy": "the text is too short for one sequence: 0 tokens in the training part",
    "large.npy": "--data has a token 300; the model's vocabulary is 0 to 255",
    "negative.npy": "--data has a token -1; the model's vocabulary is 0 to 255",
    "missing.npy": "cannot read missing.npy",
}

PAIRS = {
    "empty.txt": "has 0 prompts; at least two are needed",
    "one.jsonl": "has 1 prompts; at least two are needed",
    "half.jsonl": "half.jsonl, line 41 is not JSON",
    "null.jsonl": 'null.jsonl, line 1 has no text "prompt"',
    "number.jsonl": 'number.jsonl, line 1 has no text "prompt"',
    "missing.jsonl": "--data missing.jsonl cannot be read",
    "empty": "--data empty cannot be read",
}

RUNS = {
    "missing": NO_RUN,
    "empty": NO_RUN,
    "file": NO_RUN,
    "broken": "cannot read broken/config.json",
    "bytes": "cannot read bytes/config.json",
    "list": "list/config.json holds a list; it must be a JSON object",
}
"""For every command that takes a run."""

FOLDERS = {
    **{f"{TRAIN} --from {run}": said for run, said in RUNS.items()},
    **{f"finetune --data good.jsonl --from {run}": said for run, said in RUNS.items()},
    **{f"sample --runs . --run {run}": said for run, said in RUNS.items()},
    **{f"spectra {run}": said for run, said in RUNS.items()},
    **{f"export-hf {run} --out new": said for run, said in RUNS.items()},
    f"{TRAIN} --from nothing": "those of none of these models",
    f"{TRAIN} --from nameless": "nameless/config.json has no sizes of a model under training",
    f"{TRAIN} --from no-heads": "num_attention_heads is 0; it must be a whole number of at least 1",
    f"{TRAIN} --from words": "hidden_size is 'wide'; it must be a whole number",
    f"{FINETUNE} --trial adamw": "run has no trial 'adamw'; it has muon",
    f"{FINETUNE} --optimizers": "no optimizer is named",
    "finetune --from untrained --data good.jsonl": "untrained has no checkpoint of muon",
    "sample --runs . --run untrained": "untrained has no checkpoint of muon",
    "sample --runs . --run run --trial adamw": "run has no trial 'adamw'; it has muon",
    "sample --runs . --run no-trials": "has no list of trials with their names",
    "sample --runs . --run nameless": "has no list of trials with their names",
    "sample --runs . --run half-moon": "half-moon/config.json has no sizes of a Moonlight",
    "spectra no-trials": "has no list of trials with their names",
    "spectra nameless": "has no list of trials with their names",
    "spectra nothing": "nothing/config.json has no sizes of a Moonlight",
    "spectra untrained": "untrained has no checkpoint of muon",
    "export-hf nameless --out new": "has no sizes of a model under training",
    "export-hf nothing --out new": "nothing/config.json has no sizes of a Moonlight",
    "export-hf run --out new": "run trained a Llama, which has no Hugging Face layout",
    "export-hf run --out empty": "empty exists; give a folder that does not",
    "import-hf missing --out new": "cannot read missing/config.json",
    "import-hf broken --out new": "cannot read broken/config.json",
    "import-hf list --out new": "list/config.json holds a list; it must be a JSON object",
    "import-hf nothing --out new": "config.json does not describe a Moonlight: hidden_size",
    "import-hf file --out new": "cannot read file/config.json",
}

OVERWRITE = {
    f"{command} --runs . --name {name} --from {source} --overwrite": (
        f"--overwrite would delete {name}, and --from {source} is that folder, in it or around it"
    )
    for command in (TRAIN, "finetune --data good.jsonl")
    for name, source in (
        ("run", "run"),
        ("run", "link"),
        ("link", "run"),
        ("around", "around/inner"),
        ("around/inner", "around"),
    )
} | {
    f"{TRAIN} --runs . --name {name} --overwrite": (
        f"{name} is no run of train or finetune, and --overwrite deletes nothing else"
    )
    for name in ("nothing", "no-trials", "nameless", "hub", "import", "swept")
}
"""What `--overwrite` must not delete."""

ROWS = {
    **OPTIONS,
    **NUMBERS,
    **{f"train --model tiny --data {data}": said for data, said in DATA.items()},
    **{f"finetune --from run --data {data}": said for data, said in PAIRS.items()},
    **FOLDERS,
    **OVERWRITE,
}


def contents(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize(("command", "sentence"), ROWS.items(), ids=ROWS.keys())
def test_it_is_refused_in_a_sentence_and_nothing_is_written(
    command, sentence, workspace, monkeypatch, capsys
):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(train, "train_all", None)
    monkeypatch.setattr(finetune, "train_all", None)
    monkeypatch.setattr(sweep, "run_all", None)
    before = contents(workspace)
    assert sentence in refused(capsys, *shlex.split(command))
    assert contents(workspace) == before


# ---- files that cannot be read or written --------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/data/x.py"), "/data/x.py: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("a reason alone"), "a reason alone"),
    ],
)
def test_an_error_of_the_system_is_a_sentence(error, said, workspace, monkeypatch, capsys):
    def failing(*arguments, **options):
        raise error

    monkeypatch.chdir(workspace)
    monkeypatch.setattr(train, "load_corpus", failing)
    assert refused(capsys, *shlex.split(TRAIN)) == f"optax-muon: {said}"


def test_a_closed_pipe_is_no_error_of_a_file(monkeypatch, capfd):
    def closed(*arguments, **options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("optax_muon.cli.main._command", closed)
    monkeypatch.setattr("os.dup2", lambda *files: None)
    with pytest.raises(SystemExit) as end:
        main(["plan"])
    assert end.value.code == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a/b/c", "a"])
def test_a_folder_that_is_not_finished_leaves_no_parents(name, tmp_path):
    with pytest.raises(KeyboardInterrupt), folder_at_once(tmp_path / name) as draft:
        (draft / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with folder_at_once(tmp_path / name) as draft:
        (draft / "file").write_text("whole")
    assert (tmp_path / name / "file").read_text() == "whole"


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", "null", "3", "{", '{"trial": "muon"}', json.dumps({**STEP, "speed": 1})],
)
def test_a_line_of_the_journal_that_is_none_is_named(line, tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    text = f"{json.dumps(STEP)}\n{line}\n"
    journal.path.write_text(text)
    for action in (lambda: journal.read("muon"), lambda: journal.truncate("muon", 0)):
        with pytest.raises(UsageError, match=r"metrics.jsonl, line 2 is not a step of a run"):
            action()
    assert journal.path.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "optimizer,lr\nmuon,1\n",
        "optimizer,lr,weight_decay,val_loss\nmuon,fast,0.1,2\n",
        "optimizer,lr,weight_decay,val_loss\nmuon,1\n",
    ],
)
def test_a_line_of_a_sweep_that_is_none_is_named(text, tmp_path):
    (tmp_path / "sweep.csv").write_text(text)
    with pytest.raises(UsageError, match=r"sweep.csv, line 2 is not a point of a sweep"):
        sweep.SweepTable(tmp_path / "sweep.csv").read()


@pytest.mark.parametrize("text", ["", ",".join(sweep.SweepTable.FIELDS) + "\n"])
def test_an_empty_sweep_has_no_points_and_takes_some(text, tmp_path):
    """A process that was killed may leave a file of nothing."""
    table = sweep.SweepTable(tmp_path / "sweep.csv")
    table.path.write_text(text)
    assert table.read() == []
    points = [sweep.Point("muon", 0.01, 0.1, loss) for loss in (2.5, 2.4)]
    for point in points:
        table.append(point)
    assert table.read() == points


# ---- numbers in configs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch", "steps", "eval_every", "eval_sequences"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_run_of_nothing_is_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value}; it must be at least 1"):
        dataclasses.replace(CONFIG, **{name: value})


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(LlamaConfig) if f.type == "int"])
@pytest.mark.parametrize("value", [0, -8, 2.0, "8", True, None, math.nan])
def test_a_size_of_a_llama_is_a_whole_number(field, value):
    with pytest.raises(ValueError, match=rf"{field.name} is .*; it must be a whole number"):
        dataclasses.replace(TINY.model, **{field.name: value})


@pytest.mark.parametrize(
    "field", [f for f in dataclasses.fields(MoonlightConfig) if f.type in ("int", "float")]
)
def test_a_number_of_a_moonlight_is_one(field):
    for value in (-1, math.nan, "8"):
        if field.type == "float" and value == -1:
            continue
        with pytest.raises(ValueError, match=rf"{field.name} is {value!r}; it must be"):
            dataclasses.replace(CONFIGS["moonlight-tiny"], **{field.name: value})


def test_sizes_of_numpy_are_whole_numbers():
    assert dataclasses.replace(TINY.model, num_hidden_layers=np.int64(3)).num_hidden_layers == 3


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("decay", [0.1, math.nan])
def test_a_rate_that_no_optimizer_runs_at_is_refused(lr, decay):
    with pytest.raises(UsageError, match=f"lr is {lr:g}; it must be positive and finite"):
        HyperParams(lr, decay)
    with pytest.raises(UsageError, match=f"adamw_lr is {lr:g}; it must be positive and finite"):
        HyperParams(0.1, 0.1, adamw_lr=lr)


@pytest.mark.parametrize("number", [0, -1])
def test_keeping_no_checkpoint_is_refused(number):
    for name in ("last", "every"):
        with pytest.raises(UsageError, match=f"{name} is {number}; it must be at least 1"):
            RetentionPolicy(**{name: number})


def test_eight_devices_are_there():
    """The rows about meshes count them."""
    assert jax.device_count() == 8
