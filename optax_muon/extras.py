"""What the optional parts of the package need, and the one line that says what is missing.

The optimizer itself needs jax, numpy and optax. Everything else comes with an extra; the extras are
defined in `pyproject.toml`.
"""

from __future__ import annotations

import importlib.util

__all__ = ["MissingExtraError", "require_extra"]

EXTRAS = {
    "checkpoint": ("orbax.checkpoint",),
    "keras": ("keras",),
    "models": ("flax", "safetensors"),
    "parquet": ("pyarrow",),
    "tensorboard": ("tensorboard",),
    "tokenize": ("jinja2", "tokenizers"),
    "trackio": ("trackio",),
    "train": (
        *("flax", "orbax.checkpoint", "safetensors"),
        *("matplotlib", "packaging", "PIL", "rich", "scipy", "tyro"),
    ),
    "wandb": ("wandb",),
}
"""The modules that each extra installs."""


class MissingExtraError(ImportError):
    """A part of the package is used without the packages of its extra."""


def require_extra(extra: str, user: str) -> None:
    """Check that the packages of an extra are installed.

    Args:
        extra: A key of `EXTRAS`.
        user: Who needs them, as the message names it.

    Raises:
        MissingExtraError: One of them is missing; the message names it and the extra.

    >>> require_extra("models", "optax_muon.models")
    """
    missing = [name for name in EXTRAS[extra] if not _is_installed(name)]
    if missing:
        raise MissingExtraError(
            f"{user} needs {', '.join(missing)}; install optax-muon with its extra {extra!r}: "
            f"optax-muon[{extra}]"
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
