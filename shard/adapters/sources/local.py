"""Adapters in directories of this host: which directory holds one, and where its files may really lie."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ...errors import AdapterNotFound, AdapterRejected
from ..files import COMPANIONS, CONFIG, WEIGHTS_NAMES, is_regular

_SUBFOLDERS_NAMED = 5
_SUBFOLDERS_LOOKED_AT = 1000


def local_directory(path: str, root: str) -> Path:
    """The directory `path`, for the adapter at its top level; what else lies in it does not matter.

    Where `root` is given, the directory and the adapter's files in it must resolve below it.

    Raises AdapterNotFound without such a directory, AdapterRejected where only its sub-folders hold adapters
    or where a file is a link out of `root`.
    """
    if not os.path.isdir(path):  # unlike Path.is_dir, false for a path that no file system takes
        raise AdapterNotFound("there is no such directory on this host")
    directory = Path(path).resolve()
    if root:
        _check_below(directory, Path(root).resolve())
    if not os.path.lexists(directory / CONFIG):
        refuse_parent(_subfolders(directory), path)
    return directory


def refuse_parent(subfolders: Iterable[str], parent: str) -> None:
    """Raises AdapterRejected if a place without an adapter has sub-folders with one: says what to name."""
    names = sorted(subfolders)
    if not names:
        return
    more = f" and {len(names) - _SUBFOLDERS_NAMED} more" if len(names) > _SUBFOLDERS_NAMED else ""
    raise AdapterRejected(
        f"there is no {CONFIG} at its top level, but its sub-folders hold adapters "
        f"({', '.join(names[:_SUBFOLDERS_NAMED])}{more}); name one of them, such as {parent}/{names[0]}"
    )


def _subfolders(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        names = [entry.name for entry, _ in zip(entries, range(_SUBFOLDERS_LOOKED_AT), strict=False)]
    return [name for name in names if is_regular(directory / name / CONFIG)]


def _check_below(directory: Path, root: Path) -> None:
    """Both resolved. A snapshot in the hub's cache may link to its repository's blobs, wherever `root` is."""
    allowed = (root, *_blobs_of(directory))
    for name in ("", CONFIG, *WEIGHTS_NAMES, *COMPANIONS):
        target = Path(os.path.realpath(directory / name))
        if not any(target.is_relative_to(place) for place in allowed):
            raise AdapterRejected(
                f"{name or 'its directory'} is a link that leads out of the allowed directories; "
                "put the file itself below them"
            )


def _blobs_of(directory: Path) -> list[Path]:
    """`models--org--name/blobs`, for a directory at or below `models--org--name/snapshots/COMMIT`."""
    return [
        path.parent.parent / "blobs"
        for path in (directory, *directory.parents)
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    ]
