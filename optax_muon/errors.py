"""The errors of the training and command wings; `cli/main.py` prints each on one line of stderr."""


class UsageError(ValueError):
    """The request cannot be carried out; the message names what would be accepted."""


class CommandError(Exception):
    """A command ended early; the message says where and why."""


class Diverged(CommandError):
    """A loss is no longer finite."""


class Interrupted(CommandError):
    """The user pressed Ctrl-C."""
