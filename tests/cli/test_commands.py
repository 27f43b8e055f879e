"""All commands: one page has them, their help speaks to newcomers, shells complete them."""

import pathlib
import re
import shutil
import subprocess
import typing

import pytest

from optax_muon.cli.commands import COMMANDS
from optax_muon.cli.main import main
from optax_muon.extras import EXTRAS
from optax_muon.training.trackers import TRACKERS

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pages" / "commands.md").read_text()


def subcommands():
    """The name of each command and its class."""
    for each in typing.get_args(COMMANDS):
        kind, conf = typing.get_args(each)
        yield conf.name, kind


def test_the_page_has_every_command_and_none_that_is_not_there():
    names = {name for name, _ in subcommands()}
    headings = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
    assert {name for heading in headings for name in heading.split(" and ")} == names
    assert names == set(re.findall(r"^\$ optax-muon ([a-z]\S*)", PAGE, re.MULTILINE))


def test_the_page_has_every_tracker_and_its_extra():
    for name in TRACKERS:
        assert f"| `{name}` | `{name}` |" in PAGE
        assert EXTRAS[name]


@pytest.mark.parametrize(("name", "kind"), [*subcommands()])
def test_every_command_and_option_says_what_it_is(name, kind, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    said = " ".join(re.sub("[│╭╰╮╯─]", " ", capsys.readouterr().out).split())
    first = kind.__doc__.strip().splitlines()[0]
    assert first in said and len(first) > 20
    assert not re.search(r"\b(TODO|FIXME)\b", said)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_the_commands(shell, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["--tyro-print-completion", shell])
    script = capsys.readouterr().out
    assert end.value.code in (0, None)
    for name, _ in subcommands():
        assert name in script
    assert "--train-vocab" in script
    if found := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        assert subprocess.run([found, "-n", tmp_path / "script"], check=False).returncode == 0
