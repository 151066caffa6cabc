"""Directories of files that are there in full or not at all, checked each time before they are used."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..errors import AdapterFetchFailed
from .files import file_sha256

_SUMS = ".sha256.json"
_Sums = dict[str, str]
"""File name to SHA-256."""


class DirectoryCache:
    """Directories by key below `root`. Processes may share it; holds no state of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, key: str) -> Path | None:
        """The directory of `key` if it is there and undamaged. A damaged one is deleted."""
        directory = self._root / key
        if not directory.is_dir():
            return None
        if _is_intact(directory):
            return directory
        shutil.rmtree(directory, ignore_errors=True)
        return None

    def put(self, key: str, fill: Callable[[Path], None]) -> Path:
        """Have `fill` write files into a new directory, and keep it as that of `key`.

        Raises AdapterFetchFailed where it cannot be written, and what `fill` raises; nothing is left then.
        """
        directory = self._root / key
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".", dir=directory.parent))
            try:
                fill(building)
                sums = {path.name: file_sha256(path) for path in building.iterdir()}
                (building / _SUMS).write_bytes(msgspec.json.encode(sums))
                _publish(building, directory)
            finally:
                shutil.rmtree(building, ignore_errors=True)
        except OSError as error:
            raise AdapterFetchFailed(f"the cache of adapters cannot be written: {error.strerror}") from error
        return directory


def _publish(building: Path, directory: Path) -> None:
    """Give a finished directory its name, unless another process was first."""
    try:
        os.rename(building, directory)
    except OSError:
        if not _is_intact(directory):
            raise


def _is_intact(directory: Path) -> bool:
    try:
        sums = msgspec.json.decode((directory / _SUMS).read_bytes(), type=_Sums)
        return all(file_sha256(directory / name) == digest for name, digest in sums.items())
    except (OSError, msgspec.DecodeError):
        return False
