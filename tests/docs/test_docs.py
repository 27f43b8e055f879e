"""The documentation: complete, runnable, and made by the scripts beside it.

Examples with prompts are doctests, collected from `docs/pages` itself.
"""

import ast
import importlib
import inspect
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import tomllib

import pytest
import tyro

import optax_muon
from optax_muon.cli.commands import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "pages"
SOURCES = [path for path in sorted(PAGES.rglob("*.md")) if "results" not in path.parts]
FACES = ["", "checkpoint", "compat", "models", "polar", "hlo"]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(*kinds):
    """Every fenced block of these kinds, as pytest parameters named by page and place."""
    for path in SOURCES:
        for i, found in enumerate(FENCED.finditer(path.read_text())):
            if found[1] in kinds:
                name = f"{path.relative_to(PAGES).with_suffix('')}-{i}"
                yield pytest.param(found[2], id=name)


def referenced():
    """The dotted name of every entry of the reference."""
    for path in sorted((PAGES / "api").glob("*.md")):
        yield from re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)


def resolved(name):
    """The value of a dotted name whose last part lies in a module."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def public(face):
    """The names of a face and their values."""
    module = importlib.import_module(f"optax_muon.{face}".rstrip("."))
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("face", FACES)
def test_the_reference_has_every_public_name(face):
    listed = {(name.rsplit(".", 1)[1], id(resolved(name))) for name in referenced()}
    asked = {n: v for n, v in public(face).items() if not inspect.ismodule(v) and n[0] != "_"}
    assert asked
    assert [name for name, value in asked.items() if (name, id(value)) not in listed] == []


def says_something(name):
    """Whether a name has a docstring, or the string below its assignment that stands for one."""
    module, _, attribute = name.rpartition(".")
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == attribute:
            return bool(ast.get_docstring(node))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == attribute for t in targets):
                return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


def test_every_name_of_the_reference_is_documented():
    assert [name for name in referenced() if not says_something(name)] == []


def test_every_page_has_its_place():
    def files(nav):
        for entry in nav:
            (value,) = entry.values()
            yield from [value] if isinstance(value, str) else files(value)

    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(files(nav)) == sorted(str(path.relative_to(PAGES)) for path in SOURCES)


def test_every_picture_says_what_it_shows():
    shown = [
        (re.sub(r"\s+", " ", alt), file)
        for path in SOURCES
        for alt, file in re.findall(r"!\[([^\]]*)\]\(figures/(\w+)\.svg\)", path.read_text())
    ]
    assert all(len(alt) > 80 for alt, _ in shown)
    assert {file for _, file in shown} == {path.stem for path in PAGES.glob("figures/*.svg")}


def test_every_picture_of_a_result_says_what_it_shows():
    files = [ROOT / "README.md", *sorted((ROOT / "benchmarks/results").rglob("*.md"))]
    shown = [
        (file.name, alt)
        for file in files
        for alt in re.findall(r"!\[([^\]]*)\]\([^)]*\.png\)", file.read_text())
    ]
    assert shown
    assert [each for each in shown if len(each[1]) < 40] == []


def quotations():
    """Every paragraph or row of a table with decimals that links to results, and their texts."""
    for path in SOURCES:
        for passage in re.split(r"\n\n|\n(?=\|)|\n(?=- )", path.read_text()):
            files = re.findall(r"\(results/([\w/]+\.md)\)", passage)
            decimals = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]|B |M )", passage)
            if files and decimals:
                texts = " ".join((ROOT / "benchmarks/results" / file).read_text() for file in files)
                name = f"{path.relative_to(PAGES).with_suffix('')}: {' '.join(files)}"
                yield pytest.param(decimals, texts, id=name)


@pytest.mark.parametrize(("decimals", "results"), list(quotations()))
def test_a_quoted_number_is_a_result(decimals, results):
    """To the digits that are quoted; the results are measured again from time to time."""
    measured = [float(number) for number in re.findall(r"\d+\.\d+", results)]

    def stands(number):
        unit = 10.0 ** -len(number.partition(".")[2])
        return any(abs(float(number) - value) <= 0.51 * unit for value in measured)

    assert [number for number in decimals if not stands(number)] == []


def test_the_script_of_the_pictures_draws_those_that_are_shown(tmp_path):
    command = [sys.executable, ROOT / "docs/figures.py", "forms", "--out", tmp_path]
    subprocess.run(command, check=True, timeout=120)
    assert "GFLOP" in (tmp_path / "forms.svg").read_text()


def test_every_example_is_run():
    """A block of Python is a doctest, or a program of its own, below."""
    kinds = {match[1] for path in SOURCES for match in FENCED.finditer(path.read_text())}
    assert kinds <= {"pycon", "python", "console", "bash", "yaml"}


# `test_framework_recipes.py` runs the recipes for other frameworks, where those are installed.
PROGRAMS = [block for block in blocks("python") if not block.id.startswith("frameworks")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs(program):
    """As the only task of SLURM, with 64 devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "64",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=os.environ | environment, check=True, timeout=120)


def commands():
    """Every call of `optax-muon` in the blocks of shell, without what stands before it."""
    for block in blocks("console", "bash"):
        (text,) = block.values
        for line in text.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:\$ |srun )(optax-muon .*)", line):
                yield found[1]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_is_understood(command, capsys):
    arguments = shlex.split(command)[1:]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as end:
            tyro.cli(COMMANDS, args=arguments)
        assert end.value.code == 0
    else:
        assert callable(tyro.cli(COMMANDS, args=arguments))


def test_the_version_is_cited():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {optax_muon.__version__}\n" in citation
