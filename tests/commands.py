"""What the tests of several commands share."""

import pytest

from optax_muon.cli.main import main


def refused(capsys, *arguments):
    """The one line of stderr of a command that ends with exit code 2 and prints nothing else."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    return err.strip()
