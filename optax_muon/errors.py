"""The ways a command ends early: one line for the user, and an exit code (`cli/main.py`)."""

import contextlib
from collections.abc import Iterator


class CommandError(Exception):
    """Ends the command: the message is printed on one line of stderr."""

    exit_code = 1


class UsageError(CommandError, ValueError):
    """What was asked for cannot be done; the message says what would be accepted."""

    exit_code = 2


class Diverged(CommandError):
    """A loss is no longer finite."""


class Interrupted(CommandError):
    """The user pressed Ctrl-C; the code is the shell's own for SIGINT, 128 + 2."""

    exit_code = 130


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Raise the `ValueError`s of models as `UsageError`s: what they refuse came from the user."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
