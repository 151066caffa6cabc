"""Fetching adapters through `huggingface_hub` into its cache, with every checksum verified."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import repo_folder_name

from ..errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected, ShardError
from .files import (
    COMPANIONS,
    CONFIG,
    PICKLED_WEIGHTS,
    WEIGHTS,
    FileLimits,
    file_sha256,
    git_blob_id,
)
from .progress import ProgressMeter
from .retry import RetryPolicy, TransientFailure, call_with_retry

Result = TypeVar("Result")

# The HTTP library under huggingface_hub differs between its versions; its base error is this one's parent.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_ID = re.compile(r"[0-9a-f]{40}")
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED_STATUS = frozenset({401, 403, 404})


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it."""

    name: str
    size: int
    checksum: str
    """SHA-256 of a large file, git's blob id of a small one."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository's adapter files in the cache, at one commit."""

    directory: Path
    commit: str
    warnings: tuple[str, ...] = ()


class HubFetcher:
    """Brings the adapter files of a hub repository to disk. Holds no state between calls."""

    def __init__(self, limits: FileLimits, retry: RetryPolicy) -> None:
        self._limits = limits
        self._retry = retry

    def fetch(self, repo: str, revision: str, token: str, meter: ProgressMeter) -> Snapshot:
        """Download what is missing of `repo` at `revision` (empty: the default branch) and verify all of it.

        Raises AdapterNotFound where the hub denies it, AdapterRejected where it holds no adapter,
        AdapterFetchFailed where the hub does not deliver.
        """
        if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise AdapterNotFound(f"{revision[:100]!r} is not a revision")
        cache = _cache_of(token)
        if constants.HF_HUB_OFFLINE:
            return self._from_cache(cache, repo, revision, "the hub is switched off (HF_HUB_OFFLINE)")
        try:
            commit, listing = self._attempt(lambda: self._list(repo, revision, token))
        except AdapterFetchFailed as error:
            # What the operator's own token brought here may be served while the hub is away.
            if token or not self._is_cached(cache, repo, revision):
                raise
            return self._from_cache(cache, repo, revision, f"the hub could not be asked: {error}")
        files = self._choose(listing)
        meter.total = sum(file.size for file in files)
        for file in files:
            self._bring(cache, repo, commit, token, file, meter)
        _remember_ref(cache, repo, revision, commit)
        return Snapshot(_cached_file(cache, repo, commit, CONFIG).parent, commit)

    def _list(self, repo: str, revision: str, token: str) -> tuple[str, list[RemoteFile]]:
        """Ask the hub for the commit that `revision` means now, and for its files."""
        info = HfApi().model_info(
            repo,
            revision=revision or None,
            files_metadata=True,
            token=token or None,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        if not info.sha or not _GIT_ID.fullmatch(info.sha):
            raise AdapterFetchFailed("the hub did not say which commit this is")
        return info.sha, [_remote_file(sibling) for sibling in info.siblings or []]

    def _choose(self, listing: list[RemoteFile]) -> list[RemoteFile]:
        by_name = {file.name: file for file in listing}
        for required in (CONFIG, WEIGHTS):
            if required not in by_name:
                remedy = "; save it as safetensors" if PICKLED_WEIGHTS in by_name else ""
                raise AdapterRejected(f"the repository has no {required} at its top level{remedy}")
        files = [by_name[name] for name in (CONFIG, WEIGHTS, *COMPANIONS) if name in by_name]
        for file in files:
            if file.size > self._limits.of(file.name):
                raise AdapterRejected(
                    f"{file.name} has {file.size} bytes; at most {self._limits.of(file.name)} are fetched"
                )
            if not _SHA256.fullmatch(file.checksum) and not _GIT_ID.fullmatch(file.checksum):
                raise AdapterFetchFailed(f"the hub gives no checksum for {file.name}")
        return files

    def _bring(
        self, cache: Path, repo: str, commit: str, token: str, file: RemoteFile, meter: ProgressMeter
    ) -> None:
        """Have one verified file in the cache. A damaged one is deleted and fetched once more."""

        def download() -> Path:
            meter.restart_file()
            return Path(
                hf_hub_download(
                    repo,
                    file.name,
                    revision=commit,
                    cache_dir=cache,
                    token=token or None,
                    tqdm_class=_progress_class(meter),
                )
            )

        for _ in range(2):
            path = self._attempt(download)
            if _matches(path, file.checksum):
                meter.finish_file(file.size)
                return
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise AdapterFetchFailed(
            f"{file.name} arrived damaged twice: its checksum is not the one the hub lists"
        )

    def _attempt(self, operation: Callable[[], Result]) -> Result:
        """Run one exchange with the hub, with retries, its errors turned into ours."""

        def translated() -> Result:
            try:
                return operation()
            except HFValidationError as error:
                raise AdapterNotFound("this is not the name of a hub repository") from error
            except (_HttpError, OSError, ValueError) as error:
                raise _translate(error) from error

        return call_with_retry(translated, self._retry)

    def _is_cached(self, cache: Path, repo: str, revision: str) -> bool:
        return all(_find_cached(cache, repo, revision, name) for name in (CONFIG, WEIGHTS))

    def _from_cache(self, cache: Path, repo: str, revision: str, why: str) -> Snapshot:
        """The copy on disk, verified by the checksums that name its blobs."""
        for name in (CONFIG, WEIGHTS, *COMPANIONS):
            path = _find_cached(cache, repo, revision, name)
            if path is None and name in (CONFIG, WEIGHTS):
                raise AdapterNotFound(f"it is not on disk at this revision, and {why}")
            if path is not None and path.is_symlink() and not _matches(path, path.readlink().name):
                raise AdapterFetchFailed(f"the copy of {name} on disk is damaged, and {why}")
        directory = _cached_file(cache, repo, revision, CONFIG).parent
        return Snapshot(directory, directory.name, (f"served from the copy on disk: {why}",))


def _remote_file(sibling: Any) -> RemoteFile:
    checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return RemoteFile(sibling.rfilename, sibling.size or 0, checksum or "")


def _cache_of(token: str) -> Path:
    """The hub's cache; files fetched with a caller's own token lie apart, out of reach of everybody else."""
    if not token:
        return Path(constants.HF_HUB_CACHE)
    return Path(constants.HF_HOME) / "loraplex" / hashlib.sha256(token.encode()).hexdigest()


def _matches(path: Path, checksum: str) -> bool:
    actual = file_sha256(path) if _SHA256.fullmatch(checksum) else git_blob_id(path)
    return actual == checksum


def _find_cached(cache: Path, repo: str, revision: str, name: str) -> Path | None:
    try:
        found = try_to_load_from_cache(repo, name, cache_dir=cache, revision=revision or None)
    except HFValidationError as error:
        raise AdapterNotFound("this is not the name of a hub repository") from error
    return Path(found) if isinstance(found, str) else None


def _cached_file(cache: Path, repo: str, revision: str, name: str) -> Path:
    path = _find_cached(cache, repo, revision, name)
    if path is None:
        raise AdapterFetchFailed(f"{name} has vanished from the cache; try again")
    return path


def _remember_ref(cache: Path, repo: str, revision: str, commit: str) -> None:
    """Note in the cache which commit a moving name meant, so that it can be found without the hub."""
    if revision == commit:
        return
    ref = (
        cache
        / repo_folder_name(repo_id=repo, repo_type="model")
        / "refs"
        / (revision or constants.DEFAULT_REVISION)
    )
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)


def _progress_class(meter: ProgressMeter) -> type:
    """A silent stand-in for the progress bar that `huggingface_hub` makes for each download."""

    class Bar:
        def __init__(self, **_options: object) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_error: object) -> None:
            pass

        def update(self, count: int) -> None:
            meter.advance(count)

        def close(self) -> None:
            pass

    return Bar


def _translate(error: Exception) -> Exception:
    """What an exchange with the hub failed of: a typed error for good, or a TransientFailure."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return _translate_status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return AdapterNotFound("it is not on disk, and the hub is switched off (HF_HUB_OFFLINE)")
    if isinstance(error, FileMetadataError):
        return AdapterFetchFailed("what answers there is not a hub; check HF_ENDPOINT and the proxy settings")
    if isinstance(error, _HttpError):
        return TransientFailure(AdapterFetchFailed(f"the hub could not be reached ({type(error).__name__})"))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return AdapterFetchFailed(f"the hub's cache cannot be written: {error.strerror}")
    if isinstance(error, OSError):
        return TransientFailure(AdapterFetchFailed("the hub cut the download short"))
    return AdapterFetchFailed(f"what the hub answered cannot be read ({type(error).__name__})")


def _translate_status(error: HfHubHTTPError) -> Exception:
    status = error.response.status_code
    if status in _DENIED_STATUS:
        return AdapterNotFound(
            f"the hub answered {status}: no such repository or revision, or it is private or "
            "gated and the token (the request's own, else HF_TOKEN) does not open it"
        )
    failed: ShardError = AdapterFetchFailed(f"the hub answered {status}")
    if status in _TRANSIENT_STATUS:
        return TransientFailure(failed, _retry_after(error))
    return failed


def _retry_after(error: HfHubHTTPError) -> float | None:
    value = error.response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d{1,9}", value) else None
