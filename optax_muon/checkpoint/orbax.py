"""Orbax arguments for a described state, and saving and restoring one path with them.

Orbax is imported lazily, only by save and restore: it imports Pallas, and most programs need
neither.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from optax_muon.checkpoint.description import check, describe
from optax_muon.extras import require_extra
from optax_muon.matrices.paths import named_leaves

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

DESCRIPTION = "description"
"""The item that holds the description; no item of a state may have this name."""


def _import_orbax() -> Any:
    """The module `orbax.checkpoint`.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    require_extra("checkpoint", "Saving and restoring")
    return importlib.import_module("orbax.checkpoint")


def save(
    path: str | Path, items: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> None:
    """Save a state and its description, completely or not at all.

    Args:
        path: A folder that does not exist.
        items: What is saved, by name, as `describe` takes it.
        settings: What must not change, as `describe` takes it.

    Raises:
        ValueError: The folder exists, an item has a name that cannot be saved (`"description"`, or
            one that is not a file name), or a leaf has been donated.
        TypeError: As `describe`.
    """
    ocp = _import_orbax()

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=save_args(items, settings))


def restore(
    path: str | Path, like: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Restore a state that `save` wrote, on any mesh.

    Args:
        path: The folder.
        like: What to read, by name: arrays or `ShapeDtypeStruct`s of the same shapes and dtypes,
            with the shardings that the result is to have. A leaf without one goes to the first
            device.
        settings: As they were saved; None does not compare them.

    Returns:
        The items of `like`, with the arrays of the checkpoint, bit for bit.

    Raises:
        ValueError: The state differs from the saved one (`check`), or files are missing or damaged.
    """
    ocp = _import_orbax()

    where = Path(path).absolute()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        with reading(where):
            saved = checkpointer.restore(where, args=description_args())[DESCRIPTION]
        check(saved, describe(like, settings), str(where))
        with reading(where):
            return restored_items(checkpointer.restore(where, args=restore_args(like)), like)


def save_args(
    items: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> ocp.args.Composite:
    """The `args` of `ocp.CheckpointManager.save`.

    Args:
        items: What is saved, by name, as `describe` takes it.
        settings: What must not change, as `describe` takes it.

    Raises:
        ValueError: An item has a name that cannot be saved (`"description"`, or one that is no name
            of a file), or a leaf has been donated.
        TypeError: As `describe`.
        ImportError: Orbax is not installed.

    >>> import jax.numpy as jnp
    >>> sorted(save_args({"params": {"up": jnp.ones((4, 8))}}, {"beta": 0.95}).keys())
    ['description', 'params']
    """
    ocp = _import_orbax()

    described = describe(items, settings)
    _check_items(items)
    trees = {name: ocp.args.StandardSave(tree) for name, tree in _trees(items).items()}
    description = ocp.args.JsonSave(described)
    return ocp.args.Composite(**trees, **{DESCRIPTION: description})


def description_args() -> ocp.args.Composite:
    """The `args` of `ocp.CheckpointManager.restore` that read only the item `description`.

    Raises:
        ImportError: Orbax is not installed.
    """
    ocp = _import_orbax()

    return ocp.args.Composite(**{DESCRIPTION: ocp.args.JsonRestore()})


def restore_args(like: Mapping[str, Any]) -> ocp.args.Composite:
    """The `args` of `ocp.CheckpointManager.restore` that read all of `like`, after `check`.

    Args:
        like: What to read, as `restore` takes it.

    Raises:
        ImportError: Orbax is not installed.
    """
    ocp = _import_orbax()

    trees = jax.tree.map(_abstract, _trees(like))
    return ocp.args.Composite(
        **{name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
    )


def restored_items(found: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """What orbax restored with `restore_args`, as the items that `save_args` was given.

    Args:
        found: What `ocp.CheckpointManager.restore` returned.
        like: The items that `restore_args` was given.
    """
    saved = _trees(like)

    def item(name: str) -> Any:
        tree = like[name]
        if not jax.tree.leaves(tree):
            return tree  # it has no arrays
        if _is_lone(tree):
            return found[name][0] if name in saved else _zeros(tree)
        if name not in saved:
            return jax.tree.map(_zeros, tree)
        if not any(map(_is_empty, jax.tree.leaves(tree))):
            return found[name]
        return jax.tree.map(lambda x, y: _zeros(x) if _is_empty(x) else y, tree, found[name])

    return {name: item(name) for name in like}


@contextlib.contextmanager
def reading(where: Path) -> Iterator[None]:
    """Raise one ValueError for every way in which orbax reports missing or damaged files.

    Args:
        where: The path that the message names.

    Raises:
        ValueError: Anything that was raised inside.
    """
    try:
        yield
    except Exception as error:  # orbax raises OSError, ValueError, KeyError and bare Exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{where} cannot be read; files are missing or damaged: {reason[0][:200]}"
        ) from error


def _check_items(items: Mapping[str, Any]) -> None:
    """Refuse what orbax would take and never give back, or refuse without a name."""
    for name, item in items.items():
        if name == DESCRIPTION:
            raise ValueError(f"An item is called {name!r}, the name of the description; rename it.")
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(f"An item is called {name!r}, which is not a file name; rename it.")
        for path, leaf in named_leaves(item).items():
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise ValueError(f"{name}/{path} has been donated or deleted; save it before that.")


def _trees(items: Mapping[str, Any]) -> dict[str, Any]:
    """The items as orbax can save them: those with numbers in them, and lone leaves in a list.

    Orbax refuses arrays of zero size. None stands for each; its shape is in the description.
    """
    trees = {
        name: [item] if jax.tree.leaves(item) and _is_lone(item) else item
        for name, item in items.items()
    }
    trees = jax.tree.map(lambda leaf: None if _is_empty(leaf) else leaf, trees)
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _is_empty(leaf: Any) -> bool:
    return 0 in getattr(leaf, "shape", ())


def _zeros(leaf: Any) -> Any:
    """An array of zero size like this one, or like this description of one."""
    like = _abstract(leaf)
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)


def _is_lone(item: Any) -> bool:
    """Whether an item is a single array rather than a tree."""
    return jax.tree.leaves(item)[0] is item


def _abstract(leaf: Any) -> Any:
    """A leaf as orbax restores it; on the first device if it has no sharding of its own."""
    if not hasattr(leaf, "shape"):
        return leaf  # a Python number
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, "sharding", None) or alone
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
