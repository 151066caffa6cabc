"""From a source to a local directory that holds an adapter's config and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterNotFound, AdapterRejected
from .files import CHAT_TEMPLATE, TOKENIZER, FileLimits, is_regular
from .hub import HubFetcher
from .manifest import AdapterRequest, Source
from .progress import OnProgress, ProgressMeter
from .retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter on disk."""

    directory: Path
    revision: str
    """The commit, where the source has one."""
    warnings: tuple[str, ...]
    own_tokenizer: bool
    own_chat_template: bool


class Fetcher:
    """Resolves every kind of source."""

    def __init__(self, limits: FileLimits, retry: RetryPolicy) -> None:
        self._hub = HubFetcher(limits, retry)

    def fetch(self, request: AdapterRequest, on_progress: OnProgress) -> Fetched:
        """Bring the adapter to disk, blocking.

        `on_progress` is called at most ten times a second, and once for each file.

        Raises AdapterNotFound, AdapterRejected or AdapterFetchFailed.
        """
        match request.source:
            case Source.LOCAL:
                return _describe(_local_directory(request.id), "")
            case Source.HUB:
                meter = ProgressMeter(on_progress)
                snapshot = self._hub.fetch(request.id, request.revision, request.token, meter)
                return _describe(snapshot.directory, snapshot.commit, snapshot.warnings)
            case Source.S3:
                raise AdapterRejected("s3 sources are not served yet; copy it to the hub or to a directory")


def _local_directory(path: str) -> Path:
    if "\0" in path or not Path(path).is_dir():
        raise AdapterNotFound("there is no such directory on this host")
    return Path(path).resolve()


def _describe(directory: Path, revision: str, warnings: tuple[str, ...] = ()) -> Fetched:
    return Fetched(
        directory=directory,
        revision=revision,
        warnings=warnings,
        own_tokenizer=is_regular(directory / TOKENIZER),
        own_chat_template=is_regular(directory / CHAT_TEMPLATE),
    )
