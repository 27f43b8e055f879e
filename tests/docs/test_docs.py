"""The documentation: complete, runnable, and made by the scripts beside it.

Examples with prompts are doctests, collected from `docs/pages` itself.
"""

import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import inspect
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import jax
import pytest
import tyro
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import SECONDS, on_a_free_port, run_together

import optax_muon
from optax_muon.cli.commands import COMMANDS
from optax_muon.cli.main import main

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "pages"
SOURCES = [path for path in sorted(PAGES.rglob("*.md")) if "results" not in path.parts]
PLACES = [ROOT / "README.md", *(path for path in SOURCES if path.parent == PAGES)]
MESHES = PAGES / "meshes.md"
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
    subprocess.run(command, check=True, timeout=SECONDS)
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

    def run(port):
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
        return run_together([["-c", program]], [environment])

    codes, outputs = on_a_free_port(run)
    assert codes == [0], outputs[0]


def lines():
    """Every line of the blocks of shell, as typed, and the page it is on."""
    for path in PLACES:
        for kind, block in FENCED.findall(path.read_text()):
            if kind in ("console", "bash"):
                typed = block.replace("\\\n", " ").splitlines()
                if kind == "console":
                    typed = [line[2:] for line in typed if line.startswith("$ ")]
                for line in typed:
                    if words := shlex.split(line, comments=True):
                        yield words, path.name


def commands():
    """Every call of `optax-muon`: in blocks of shell, in the text, in tables, and in a Job."""
    for words, _ in lines():
        words = words[1:] if words[0] == "srun" else words
        if words[0] == "optax-muon":
            yield words[1 : words.index(">") if ">" in words else None]
    for path in PLACES:
        text = FENCED.sub("", path.read_text())
        said = [
            *re.findall(r"`optax-muon ([^\s`]+ [^`]*)`", text),
            *re.findall(r"^\| `([a-z-]+ [^`]*)`", text, re.MULTILINE),
        ]
        # What stands for something else is not typed.
        yield from (shlex.split(each) for each in said if not re.search(r"\.\.\.|[A-Z]{3}", each))
    for job in re.findall(r"command: \[optax-muon, (.*?)\]", MESHES.read_text(), re.DOTALL):
        yield [word.strip(' "\n') for word in re.split(r",\s+", job)]


COMMAND_LINES = sorted({shlex.join(words) for words in commands()})


def ends_at_once(words):
    """Whether a command trains nothing and reads nothing."""
    return words[0] in ("plan", "--tyro-print-completion") or "--plan" in words or "--help" in words


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_a_command_does_what_it_is_shown_for(command, capsys):
    """A command is read by its parser; one that trains nothing and reads nothing is run."""
    words = shlex.split(command)
    if not ends_at_once(words):
        assert callable(tyro.cli(COMMANDS, args=words))
        return
    try:
        with jax.numpy_dtype_promotion("standard"):  # as users have it
            main(words)
    except SystemExit as end:
        assert not end.code
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.parametrize(("words", "page"), list(lines()), ids=lambda value: str(value))
def test_a_line_of_shell_has_what_it_needs(words, page):
    """Its scripts and targets exist, and other tests run them; what installs is tested below."""
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        (script,) = (word for word in arguments if word.endswith(".py"))
        assert (ROOT / script if "/" in script else ROOT / "docs/examples" / script).exists()
    else:
        assert program in ("optax-muon", "srun", "pip", "hf", "mkdir", "export")


def imported(path):
    """The modules that the blocks of a page import, the programs that it shows included."""
    text = path.read_text()
    examples = doctest.DocTestParser().get_examples(text)
    sources = [
        "".join(example.source for example in examples),
        *(block for kind, block in FENCED.findall(text) if kind == "python" and ">>>" not in block),
        *((ROOT / file).read_text() for file in re.findall(r'--8<-- "(\S+\.py)"', text)),
    ]
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{each.name}" for each in node.names))


def brought(requirement):
    """The names of the distributions that a requirement installs, itself included."""
    found = set()

    def visit(requirement):
        requirement = Requirement(requirement)
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if (name, frozenset(extras)) in found:
            return
        found.add((name, frozenset(extras)))
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for needed in importlib.metadata.requires(name) or []:
                marker = Requirement(needed).marker
                if marker is None or any(marker.evaluate({"extra": e}) for e in extras):
                    visit(needed)

    visit(requirement)
    return {name for name, _ in found}


EXTRA_OF = {
    "optax_muon.checkpoint": "checkpoint",
    "optax_muon.models": "models",
    "optax_muon.compat.keras": "keras",
}
ELSEWHERE = {"maxtext": "maxtext", "levanter": "marin-levanter"}
"""Distributions of modules that are not installed with the tests."""


def installed(text):
    """What a page says to install: in lines of `pip install`, or as an extra by its name."""
    said = [
        *re.findall(r"pip install ([^`\n#]*)", text),
        *(f"optax-muon[{extra}]" for extra in re.findall(r"extra\s+`(\w+)`", text)),
    ]
    for word in (word for line in said for word in shlex.split(line) if word[0] != "-"):
        place = re.sub(r"^\S*/optax.muon(-[\d.]+-py3-none-any\.whl)?", "optax-muon", word)
        yield from brought(place)


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.stem)
def test_a_page_says_what_to_install(path):
    """Everything that its blocks import; the extra `train`, where commands are shown."""
    text = path.read_text()
    there = {*brought("optax-muon"), *installed(text)}
    distributions = importlib.metadata.packages_distributions()
    missing = set()
    for module in {module for module in imported(path)}:
        top = module.partition(".")[0]
        names = distributions.get(top, [ELSEWHERE.get(top, top)])
        if top not in sys.stdlib_module_names and not {*map(canonicalize_name, names)} & there:
            missing.add(module)
        if module in EXTRA_OF and not brought(f"optax-muon[{EXTRA_OF[module]}]") <= there:
            missing.add(module)
    if any(words[0] == "optax-muon" and page == path.name for words, page in lines()):
        missing |= {"tyro"} - there
    assert missing == set()


def test_the_version_is_cited():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {optax_muon.__version__}\n" in citation
    assert f"/optax_muon-{optax_muon.__version__}-py3" in (PAGES / "index.md").read_text()
