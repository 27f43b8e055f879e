"""The console script `optax-muon`: reads a command, runs it, and answers trouble with one line.

Exit codes: 0 done, 1 a loss diverged or who read the output has gone (`| head`), 2 what was asked
for cannot be done, 130 stopped by Ctrl-C (after saving). The commands themselves are in `table.py`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence

from optax_muon.errors import CommandError, Interrupted, UsageError
from optax_muon.extras import MissingExtraError, require_extra


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` are `sys.argv[1:]` when None."""
    try:
        try:
            _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # here, where it may fail
    except BrokenPipeError:
        # As rich does it. Python flushes once more when it ends, which must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    try:
        require_extra("train", "The command")
        _command(arguments)()
    except MissingExtraError as missing:
        sys.stderr.write(f"optax-muon: {missing}\n")
        sys.exit(UsageError.exit_code)
    except CommandError as stop:
        sys.stderr.write(f"optax-muon: {stop}{_way_on(stop, arguments)}\n")
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("optax-muon: interrupted\n")
        sys.exit(Interrupted.exit_code)


def _command(arguments: list[str]) -> Callable[[], None]:
    """The command of these arguments; imported here because it needs the extra."""
    import tyro

    from optax_muon.cli.reports.tables import COMMANDS

    command: Callable[[], None] = tyro.cli(COMMANDS, prog="optax-muon", args=arguments)
    return command


def _way_on(stop: CommandError, arguments: list[str]) -> str:
    """How to go on after Ctrl-C."""
    if not isinstance(stop, Interrupted):
        return ""
    kept = [word for word in arguments if word not in ("--overwrite", "--resume")]
    resume = ["--resume"] if kept[:1] in (["train"], ["finetune"]) else []
    return f"; go on with: {shlex.join(['optax-muon', *kept, *resume])}"
