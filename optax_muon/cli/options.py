"""What several commands refuse alike."""

from __future__ import annotations

from optax_muon.errors import UsageError


def at_least(least: float, name: str, value: float | None) -> None:
    """Refuse an option that is too small; None is an option that is absent.

    Raises:
        UsageError: with the option as it is typed.

    >>> at_least(1, "eval_every", 20)
    """
    if value is not None and value < least:
        option = name.replace("_", "-")
        raise UsageError(f"--{option} is {value}, it must be at least {least}")


def not_both(*, resume: bool, overwrite: bool) -> None:
    """Refuse to go on with a run and to delete it.

    Raises:
        UsageError: when both are asked for.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
