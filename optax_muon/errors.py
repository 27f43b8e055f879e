"""The errors of the training and command wings; `cli/main.py` prints each on one line of stderr.

The library raises ValueError and TypeError. `shortened` keeps a message about many things readable.
"""

from collections.abc import Sequence

SHOWN = 20
"""Lines that a message lists; the rest are counted."""


def shortened(lines: Sequence[str]) -> list[str]:
    """The first `SHOWN` lines, and how many there are beyond them.

    >>> shortened([str(i) for i in range(2000)])[-2:]
    ['19', 'and 1980 more']
    """
    rest = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


class UsageError(ValueError):
    """The request cannot be carried out; the message names what would be accepted."""


class CommandError(Exception):
    """A command ended early; the message says where and why."""


class Diverged(CommandError):
    """A loss is no longer finite."""


class Interrupted(CommandError):
    """The user pressed Ctrl-C."""


class Unhealthy(CommandError):
    """A check of this machine fails."""
