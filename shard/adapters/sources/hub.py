"""Fetching adapters through `huggingface_hub` into its cache, with every checksum verified."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from ...errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected, ShardError
from ..files import (
    COMPANIONS,
    CONFIG,
    PICKLE_REFUSED,
    PICKLED_WEIGHTS,
    WEIGHTS,
    WEIGHTS_NAMES,
    FileLimits,
)
from ..manifest import AdapterRequest, Snapshot
from ..progress import ProgressMeter
from .hub_cache import SHA256, CachedFolder, cache_of, matches
from .local import refuse_parent
from .retry import RetryPolicy, TransientFailure, call_with_retry

Result = TypeVar("Result")

# The HTTP library under huggingface_hub differs between its versions; its base error is this one's parent.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]

_GIT_ID = re.compile(r"[0-9a-f]{40}")
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED_STATUS = frozenset({401, 403, 404})


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it."""

    path: str
    """From the repository's top level."""
    size: int
    checksum: str
    """SHA-256 of a large file, git's blob id of a small one."""


class HubFetcher:
    """Brings the adapter files of a hub repository to disk. Holds no state between calls."""

    def __init__(self, limits: FileLimits, retry: RetryPolicy) -> None:
        self._limits = limits
        self._retry = retry

    def fetch(self, request: AdapterRequest, meter: ProgressMeter) -> Snapshot:
        """Download what is missing of the repository's folder at the revision asked for; verify all of it.

        Raises AdapterNotFound where the hub denies it, AdapterRejected where it holds no adapter,
        AdapterFetchFailed where the hub does not deliver.
        """
        folder = CachedFolder(cache_of(request.token), request.id, request.revision, request.subfolder)
        if constants.HF_HUB_OFFLINE:
            return folder.snapshot("the hub is switched off (HF_HUB_OFFLINE)")
        try:
            commit, listing = self._attempt(lambda: self._list(folder, request.token))
        except AdapterFetchFailed as error:
            # What the operator's own token brought here may be served while the hub is away.
            if request.token or not folder.is_complete():
                raise
            return folder.snapshot(f"the hub could not be asked: {error}")
        pinned = replace(folder, revision=commit)
        files = self._choose(folder, listing)
        meter.total = sum(file.size for file in files)
        for file in files:
            self._bring(pinned, file, request.token, meter)
        folder.remember(commit)
        return Snapshot(pinned.directory(), commit)

    def _list(self, folder: CachedFolder, token: str) -> tuple[str, list[RemoteFile]]:
        """Ask the hub for the commit that the revision means now, and for the repository's files."""
        info = HfApi().model_info(
            folder.repo,
            revision=folder.revision or None,
            files_metadata=True,
            token=token or None,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        if not info.sha or not _GIT_ID.fullmatch(info.sha):
            raise AdapterFetchFailed("the hub did not say which commit this is")
        return info.sha, [_remote_file(sibling) for sibling in info.siblings or []]

    def _choose(self, folder: CachedFolder, listing: list[RemoteFile]) -> list[RemoteFile]:
        """The adapter's files in the folder: config, weights and companions."""
        prefix = folder.path("")
        inside = {file.path.removeprefix(prefix): file for file in listing if file.path.startswith(prefix)}
        if folder.subfolder and not inside:
            raise AdapterNotFound(f"the repository has no folder {folder.subfolder!r} at this revision")
        names = [CONFIG, _weights_name(folder, inside), *(name for name in COMPANIONS if name in inside)]
        for name in names:
            self._limits.check(name, inside[name].size)
            checksum = inside[name].checksum
            if not SHA256.fullmatch(checksum) and not _GIT_ID.fullmatch(checksum):
                raise AdapterFetchFailed(f"the hub gives no checksum for {name}")
        return [inside[name] for name in names]

    def _bring(self, folder: CachedFolder, file: RemoteFile, token: str, meter: ProgressMeter) -> None:
        """Have one verified file in the cache. A damaged one is deleted and fetched once more."""

        def download() -> Path:
            meter.restart_file()
            return Path(
                hf_hub_download(
                    folder.repo,
                    file.path,
                    revision=folder.revision,
                    cache_dir=folder.cache,
                    token=token or None,
                    tqdm_class=_progress_class(meter),
                )
            )

        for _ in range(2):
            path = self._attempt(download)
            if matches(path, file.checksum):
                meter.finish_file(file.size)
                return
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise AdapterFetchFailed(
            f"{path.name} arrived damaged twice: its checksum is not the one the hub lists"
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


def _weights_name(folder: CachedFolder, names: Collection[str]) -> str:
    """What the weights file among these is called. Raises AdapterRejected where they are no adapter."""
    where = f"in {folder.subfolder}" if folder.subfolder else "at its top level"
    if CONFIG not in names:
        subfolders = [name.removesuffix(f"/{CONFIG}") for name in names if name.endswith(f"/{CONFIG}")]
        refuse_parent(subfolders, f"{folder.repo}/{folder.subfolder}".rstrip("/"))
        raise AdapterRejected(f"the repository has no {CONFIG} {where}")
    for name in WEIGHTS_NAMES:
        if name in names:
            return name
    if PICKLED_WEIGHTS in names:
        raise AdapterRejected(PICKLE_REFUSED)
    raise AdapterRejected(f"the repository has no {WEIGHTS} {where}")


def _remote_file(sibling: Any) -> RemoteFile:
    checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return RemoteFile(sibling.rfilename, sibling.size or 0, checksum or "")


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
