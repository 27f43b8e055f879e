"""What tests of several commands share."""

import pytest

from optax_muon.cli.main import main


def refused(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    return lines[0]
