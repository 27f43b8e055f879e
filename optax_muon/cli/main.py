"""The console script `optax-muon`: runs a command, and prints an error on one line.

Exit codes: 0 done; 1 a loss diverged, a check of `doctor` fails, or the reader of the output has
closed it (`| head`); 2 the request cannot be carried out; 130 stopped by Ctrl-C (after saving). The
commands are listed in `commands.py`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence

from optax_muon.errors import CommandError, Diverged, Interrupted, Unhealthy, UsageError
from optax_muon.extras import MissingExtraError, require_extra

EXIT_CODES = {
    Diverged: 1,
    Unhealthy: 1,
    MissingExtraError: 2,
    UsageError: 2,
    Interrupted: 130,
}
"""By the kind of error; 130 is the shell's own for SIGINT, 128 + 2."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` are `sys.argv[1:]` when None."""
    try:
        try:
            _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # here, where a failure is caught
    except BrokenPipeError:
        # As rich does it: Python flushes once more when it exits, which must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    try:
        require_extra("train", "The command")
        _command(arguments)()
    except (CommandError, UsageError, MissingExtraError) as error:
        sys.stderr.write(f"optax-muon: {error}{_resume_hint(error, arguments)}\n")
        sys.exit(EXIT_CODES[type(error)])
    except BrokenPipeError:
        raise  # `main` ends quietly
    except OSError as error:  # a file that cannot be read or written, or a full disk
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"optax-muon: {where}{error.strerror or error}\n")
        sys.exit(EXIT_CODES[UsageError])
    except KeyboardInterrupt:
        sys.stderr.write("optax-muon: interrupted\n")
        sys.exit(EXIT_CODES[Interrupted])


def _command(arguments: list[str]) -> Callable[[], None]:
    """The command of these arguments; imported here because it needs the extra."""
    import tyro

    from optax_muon.cli.commands import COMMANDS

    command: Callable[[], None] = tyro.cli(
        COMMANDS,
        prog="optax-muon",
        description="Train language models with Muon, inspect them, and plan Muon on a mesh.",
        args=arguments,
    )
    return command


def _resume_hint(error: Exception, arguments: list[str]) -> str:
    """How to resume after Ctrl-C."""
    if not isinstance(error, Interrupted):
        return ""
    kept = [word for word in arguments if word not in ("--overwrite", "--resume")]
    resume = ["--resume"] if kept[:1] in (["train"], ["finetune"]) else []
    return f"; resume with: {shlex.join(['optax-muon', *kept, *resume])}"
