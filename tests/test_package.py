"""What a user installs: typed, complete, with every public name documented."""

import ast
import importlib
import importlib.metadata
import inspect
import itertools
import pathlib
import subprocess
import sys
import tomllib
import types
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import SECONDS

import optax_muon
from optax_muon import extras

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


@pytest.fixture(scope="module")
def distributions():
    """A function from a module to those it may come from; to its name if it is not installed."""
    installed = importlib.metadata.packages_distributions()

    def of(module):
        top = module.split(".")[0]
        return {canonicalize_name(name) for name in installed.get(top, [top])}

    return of


def required(*names):
    """The distributions of extras, or without any those of the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["optional-dependencies"][name] for name in names]
    needs = map(Requirement, itertools.chain(*(lists or [project["dependencies"]])))
    return {canonicalize_name(need.name) for need in needs} - {"optax-muon"}


def test_every_import_is_declared(distributions):
    declared = required() | required(*extras.EXTRAS)
    for path in sorted((ROOT / "optax_muon").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
            for top in tops - {"optax_muon"}:
                assert declared & distributions(top), f"{path} imports {top}"


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_what_is_looked_for_is_what_the_extra_installs(extra, distributions):
    needed = required(extra, *(["models", "checkpoint"] if extra == "train" else []))
    found = [distributions(module) for module in extras.EXTRAS[extra]]
    assert all(names & needed for names in found)
    assert needed <= set().union(*found)


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
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)


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
