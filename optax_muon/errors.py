"""The ways a command ends early: one line for the user, and an exit code (`commands/cli.py`)."""


class CommandError(Exception):
    """Ends the command: the message is printed on one line of stderr."""

    exit_code = 1


class UsageError(CommandError):
    """What was asked for cannot be done; the message says what would be accepted."""

    exit_code = 2


class Diverged(CommandError):
    """A loss is no longer finite."""


class Interrupted(CommandError):
    """The user pressed Ctrl-C; the code is the shell's own for SIGINT, 128 + 2."""

    exit_code = 130
