"""A folder of a hub repository in the cache of `huggingface_hub`: found, verified, and remembered by name."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

from ...errors import AdapterFetchFailed, AdapterNotFound
from ..files import COMPANIONS, CONFIG, WEIGHTS_NAMES, file_sha256, git_blob_id
from ..manifest import Snapshot

SHA256 = re.compile(r"[0-9a-f]{64}")

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_SUBFOLDER = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95}){0,7}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CachedFolder:
    """A repository's folder at a revision, as far as it is on disk."""

    cache: Path
    repo: str
    revision: str
    """A commit or a moving name; empty: the default branch."""
    subfolder: str = ""
    """Empty: the repository's top level."""

    def __post_init__(self) -> None:
        """Raises AdapterNotFound for what can be neither a revision nor a folder."""
        _check(self.revision, _REVISION, "revision")
        _check(self.subfolder, _SUBFOLDER, "folder")

    def path(self, name: str) -> str:
        """Of a file in this folder, from the repository's top level."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def is_complete(self) -> bool:
        """Whether the config and a weights file are on disk."""
        return self._find(CONFIG) is not None and any(self._find(name) for name in WEIGHTS_NAMES)

    def directory(self) -> Path:
        """Where the folder's files lie. Raises AdapterFetchFailed without a config there."""
        config = self._find(CONFIG)
        if config is None:
            raise AdapterFetchFailed(f"{CONFIG} has vanished from the cache; try again")
        return config.parent

    def snapshot(self, why: str) -> Snapshot:
        """The copy on disk, verified by the checksums that name its blobs; `why` the hub is not asked."""
        if not self.is_complete():
            raise AdapterNotFound(f"it is not on disk at this revision, and {why}")
        for name in (CONFIG, *WEIGHTS_NAMES, *COMPANIONS):
            path = self._find(name)
            if path is not None and path.is_symlink() and not matches(path, path.readlink().name):
                raise AdapterFetchFailed(f"the copy of {name} on disk is damaged, and {why}")
        directory = self.directory()
        commit = directory.parents[self.subfolder.count("/")].name if self.subfolder else directory.name
        return Snapshot(directory, commit, (f"served from the copy on disk: {why}",))

    def remember(self, commit: str) -> None:
        """Note in the cache which commit the revision meant, so that it can be found without the hub."""
        if self.revision == commit:
            return
        folder = self.cache / repo_folder_name(repo_id=self.repo, repo_type="model")
        ref = folder / "refs" / (self.revision or constants.DEFAULT_REVISION)
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)

    def _find(self, name: str) -> Path | None:
        revision = self.revision or None
        try:
            found = try_to_load_from_cache(
                self.repo, self.path(name), cache_dir=self.cache, revision=revision
            )
        except HFValidationError as error:
            raise AdapterNotFound("this is not the name of a hub repository") from error
        return Path(found) if isinstance(found, str) else None


def _check(value: str, pattern: re.Pattern[str], what: str) -> None:
    if value and (not pattern.fullmatch(value) or ".." in value):
        raise AdapterNotFound(f"{value[:100]!r} is not a {what}")


def cache_of(token: str) -> Path:
    """The hub's cache; files fetched with a caller's own token lie apart, out of reach of everybody else."""
    if not token:
        return Path(constants.HF_HUB_CACHE)
    return Path(constants.HF_HOME) / "loraplex" / hashlib.sha256(token.encode()).hexdigest()


def matches(path: Path, checksum: str) -> bool:
    """Whether a file has this SHA-256, or this id as a git blob."""
    actual = file_sha256(path) if SHA256.fullmatch(checksum) else git_blob_id(path)
    return actual == checksum
