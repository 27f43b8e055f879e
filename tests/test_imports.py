"""Imports run downward only, and nothing private of another package is used."""

import ast
import collections
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "optax_muon"

# Each room, and the rooms of the house that it may look into. `optax_muon` alone is the face.
GROUND = {"compilers", "drawing", "errors", "extras", "hlo", "notebook", "platforms"}
BELOW = {
    **{room: set() for room in GROUND},
    "polar": {"platforms"},
    "matrices": {"notebook"},
    "sharding": {"drawing", "errors", "matrices", "notebook", "platforms"},
}
BELOW["planning"] = {"sharding", "matrices", "polar", "platforms"}
BELOW["transforms"] = {"planning", *BELOW["planning"]}
BELOW["muon"] = {"transforms", *BELOW["transforms"]}
BELOW["checkpoint"] = {"errors", "extras", "muon", *BELOW["muon"]}
BELOW["compat"] = {"extras", "muon", *BELOW["muon"]}
BELOW["__init__"] = {"checkpoint", "compat", *BELOW["compat"], *GROUND}

# The three upper wings see the public face of the library and each what is below it.
FACE = {"__init__", "checkpoint", "compat", *GROUND}
WINGS = {"models", "training", "cli"}
BELOW["models"] = FACE
BELOW["training"] = {"models", *FACE}
BELOW["cli"] = {"training", "models", *FACE}

# The rooms of pure mathematics and geometry: what they may use of the world outside.
OUTSIDE = {"polar": {"jax", "numpy"}, "matrices": {"jax", "numpy", "optax"}}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts)


def imported(source: str, module: str) -> Iterator[str]:
    """Every dotted name that the source imports, relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """`optax_muon.polar.exact` is of the room `polar`; a name of the face itself, `__init__`."""
    part = [*name.split("."), ""][1]
    return part if part in BELOW else "__init__"


def is_below_the_face(name: str) -> bool:
    """Whether a name of the library lies deeper than a public room and what it exports.

    `optax_muon.label` and `optax_muon.hlo.flops` are public, `optax_muon.checkpoint.orbax.save` is
    not.
    """
    return room_of(name) in FACE and len(name.split(".")) > 3


def upward(source: str, module: str) -> list[str]:
    """The imports of the source that its room may not make."""
    room = room_of(module)
    found = []
    for name in imported(source, module):
        top = name.split(".")[0]
        if top == PACKAGE:
            allowed = room_of(name) in {room, *BELOW[room]}
            if room in WINGS:
                allowed &= not is_below_the_face(name)
        else:
            allowed = room not in OUTSIDE or top in {*OUTSIDE[room], *sys.stdlib_module_names}
        if not allowed:
            found.append(name)
    return found


def private(source: str, module: str) -> list[str]:
    """The names of other packages' private modules that the source imports or reaches through."""
    names = [name for name in imported(source, module) if name.split(".")[0] != PACKAGE]
    hidden = [n for n in names if any(p[:1] == "_" and p[:2] != "__" for p in n.split("."))]
    reached = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr == "_src"
    ]
    return hidden + reached


SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_downward(path):
    assert upward(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_private_of_other_packages_is_used(path):
    assert private(path.read_text(), module_name(path)) == []


def test_every_room_has_its_floor():
    rooms = {path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py") for path in SOURCES}
    assert rooms <= set(BELOW)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("polar.exact", "from optax_muon.matrices import views"),
        ("polar.exact", "from ..matrices.views import View"),
        ("polar.exact", "import optax"),
        ("matrices.rules", "import optax_muon.polar.exact"),
        ("matrices.rules", "import flax"),
        ("sharding.buckets", "from optax_muon.polar import newton_schulz"),
        ("sharding.buckets", "from optax_muon import newton_schulz"),
        ("transforms.scale", "from optax_muon.muon import muon"),
        ("muon", "from optax_muon import compat"),
        ("compat", "def late():\n  from optax_muon.models import llama"),
        ("models.llama", "from optax_muon.training import loop"),
        ("training.loop", "from optax_muon.cli import main"),
        ("training.loop", "from optax_muon.sharding.plan import Plan"),
        ("training.loop", "from optax_muon.checkpoint.orbax import save"),
    ],
)
def test_an_upward_arrow_is_found(module, source):
    assert upward(source, f"{PACKAGE}.{module}")


@pytest.mark.parametrize(
    "source",
    [
        "from jax._src import core",
        "import optax._src.base",
        "from optax.contrib import _muon",
        "from optax.contrib._muon import MuonState",
        "import jax\njax._src.core",
    ],
)
def test_a_private_import_is_found(source):
    assert private(source, f"{PACKAGE}.compat")


def test_a_class_name_stands_once():
    """Nobody has to ask which of two classes of one name is meant."""
    found = collections.defaultdict(list)
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(module_name(path))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
