"""What a user installs: typed, complete, with every public name documented."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys
import types
import zipfile

import pytest

import optax_muon

ROOT = pathlib.Path(__file__).parent.parent
FACES = ["optax_muon", "optax_muon.compat"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        "wheel",
        "--directory",
        folder,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.parametrize("face", FACES)
def test_every_name_of_a_face_exists_once(face):
    module = importlib.import_module(face)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("face", FACES)
def test_every_public_function_and_class_is_documented(face):
    module = importlib.import_module(face)
    values = {name: getattr(module, name) for name in module.__all__}
    spoken = {n: v for n, v in values.items() if isinstance(v, types.FunctionType | type)}
    assert spoken
    assert [name for name, value in spoken.items() if not inspect.getdoc(value)] == []


def test_the_wheel_is_typed_and_holds_the_package_alone(wheel):
    names = wheel.namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "optax_muon").rglob("*.py")}
    assert modules | {"optax_muon/py.typed"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"optax_muon", f"optax_muon-{optax_muon.__version__}.dist-info"}


def test_the_wheel_carries_its_license_and_command(wheel):
    info = f"optax_muon-{optax_muon.__version__}.dist-info"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert b"optax-muon = optax_muon.cli.main:main" in wheel.read(f"{info}/entry_points.txt")


def test_the_core_needs_jax_numpy_and_optax_only(wheel):
    metadata = wheel.read(f"optax_muon-{optax_muon.__version__}.dist-info/METADATA").decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    core = {line.split()[1].split(">")[0] for line in required if "extra ==" not in line}
    assert core == {"jax", "numpy", "optax"}


# A finder in front of all others hides what only the extras install.
WITHOUT_EXTRAS = """
import sys

HIDDEN = {"flax", "keras", "matplotlib", "orbax", "rich", "safetensors", "tyro"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


def without_extras(code):
    """Run the code in a process that has the core packages alone; returns the finished process."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_optimizer_runs_with_the_core_packages_alone():
    done = without_extras("""
import jax.numpy as jnp
import optax_muon

params = {"embed": jnp.ones((16, 4)), "up": jnp.ones((4, 8))}
tx = optax_muon.muon(3e-4)
updates, state = tx.update(params, tx.init(params), params)
for name in optax_muon.__all__:
    getattr(optax_muon, name)
print(optax_muon.label(params), optax_muon.plan(params))
assert "<table" in optax_muon.label(params)._repr_html_()
assert "<svg" in optax_muon.plan(params)._repr_html_()
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "user", "missing", "extra"),
    [
        ("import optax_muon.models.llama", "optax_muon.models", "flax, safetensors", "models"),
        ("import optax_muon.training.loop", "optax_muon.training", "flax, orbax", "train"),
        (
            "import optax_muon; optax_muon.checkpoint.save('/nowhere', {})",
            "Saving and restoring",
            "orbax.checkpoint",
            "checkpoint",
        ),
        ("import optax_muon.compat.keras", "optax_muon.compat.keras", "keras", "keras"),
        ("from optax_muon.cli.main import main; main(['train'])", "The command", "flax", "train"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(code, user, missing, extra):
    done = without_extras(code)
    assert done.returncode != 0
    line = done.stderr.strip().splitlines()[-1]
    assert f"{user} needs {missing}" in line
    assert line.endswith(f"install optax-muon with its extra {extra!r}: optax-muon[{extra}]")


BINARY = ("'rb'", "'wb'", "'r+b'", "'w+b'")


def names_no_encoding(call):
    """Whether a call opens a text in whatever encoding the machine's locale has."""
    function = ast.unparse(call.func)
    if function in ("Image.open", "os.open", "TRACKERS[name].open"):  # no texts
        return False
    if function.endswith(".open") and any(mode in ast.unparse(call) for mode in BINARY):
        return False
    is_text = function == "open" or function.endswith((".open", ".read_text", ".write_text"))
    return is_text and "encoding" not in {word.arg for word in call.keywords}


def test_every_text_names_its_encoding():
    """What was written in UTF-8 is read as UTF-8 under every locale."""
    for path in sorted((ROOT / "optax_muon").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        lines = [call.lineno for call in calls if names_no_encoding(call)]
        assert not lines, f"{path.relative_to(ROOT)}, lines {lines}"
