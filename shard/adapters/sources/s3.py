"""Fetching adapters from S3: the expected objects below one prefix, verified, into a cache of our own."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected
from ..directory_cache import DirectoryCache
from ..files import COMPANIONS, CONFIG, PICKLE_REFUSED, PICKLED_WEIGHTS, WEIGHTS, WEIGHTS_NAMES, FileLimits
from ..manifest import AdapterRequest, Snapshot
from ..progress import ProgressMeter
from .retry import RetryPolicy, TransientFailure, call_with_retry
from .s3_client import S3Client, S3Object

_ADDRESS = re.compile(
    r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<prefix>[A-Za-z0-9._:@+~/-]{1,900})"
)
_REVISION = re.compile(r"[0-9a-f]{40}")


class S3Fetcher:
    """Brings the adapter files below a prefix to disk; fetches them again only when an ETag has changed."""

    def __init__(self, limits: FileLimits, retry: RetryPolicy, cache: DirectoryCache) -> None:
        self._limits = limits
        self._retry = retry
        self._cache = cache
        self._connecting = threading.Lock()
        self._client: S3Client | None = None

    def fetch(self, request: AdapterRequest, meter: ProgressMeter) -> Snapshot:
        """Download `s3://bucket/prefix` unless what is there now is on disk.

        Its revision is a hash of the objects' ETags.

        Raises AdapterNotFound where S3 denies it or has another revision by now, AdapterRejected where it
        holds no adapter, AdapterFetchFailed where S3 does not deliver.
        """
        bucket, prefix = _parse(request.id)
        client = self._connected()
        place = hashlib.sha256(f"{client.endpoint} {request.id}".encode()).hexdigest()
        if request.revision and (known := self._find(place, request.revision)):
            return known
        objects = self._choose(client, bucket, prefix)
        revision = _revision(objects)
        if request.revision not in ("", revision):
            raise AdapterNotFound(
                f"revision {request.revision[:64]!r} is no longer there; now it is {revision}"
            )
        meter.total = sum(item.size for item in objects)
        if known := self._find(place, revision):
            meter.finish_file(meter.total)
            return known

        def fill(directory: Path) -> None:
            for item in objects:
                self._bring(client, item, directory / item.name, meter)

        return Snapshot(self._cache.put(f"{place}/{revision}", fill), revision)

    def _connected(self) -> S3Client:
        with self._connecting:
            if self._client is None:
                self._client = S3Client()
            return self._client

    def _find(self, place: str, revision: str) -> Snapshot | None:
        directory = self._cache.find(f"{place}/{revision}") if _REVISION.fullmatch(revision) else None
        return Snapshot(directory, revision) if directory is not None else None

    def _choose(self, client: S3Client, bucket: str, prefix: str) -> Sequence[S3Object]:
        """The adapter's objects: config, weights, companions. Nothing is listed, only looked for by name."""

        def head(name: str) -> S3Object | None:
            return call_with_retry(lambda: client.head(bucket, f"{prefix}/{name}"), self._retry)

        config = head(CONFIG)
        if config is None:
            raise AdapterNotFound(
                f"there is no {CONFIG} at this prefix, or the credentials of the environment do not open it"
            )
        weights = next(filter(None, map(head, WEIGHTS_NAMES)), None)
        if weights is None:
            pickled = head(PICKLED_WEIGHTS) is not None
            raise AdapterRejected(
                PICKLE_REFUSED if pickled else f"there is no {WEIGHTS} at this prefix; save the adapter again"
            )
        objects = [config, weights, *filter(None, map(head, COMPANIONS))]
        for item in objects:
            self._limits.check(item.name, item.size)
        return objects

    def _bring(self, client: S3Client, item: S3Object, target: Path, meter: ProgressMeter) -> None:
        """Write one verified object to `target`. A damaged one is fetched once more."""
        for _ in range(2):
            target.write_bytes(b"")
            call_with_retry(lambda: _append(client, item, target, meter), self._retry)
            if not item.md5 or _md5(target) == item.md5:
                meter.finish_file(item.size)
                return
        raise AdapterFetchFailed(
            f"{item.name} arrived damaged twice: its checksum is not the one that S3 lists"
        )


def _append(client: S3Client, item: S3Object, target: Path, meter: ProgressMeter) -> None:
    """Complete `target`, which may hold the beginning of the object already."""
    there = target.stat().st_size
    begin, chunks = client.read(item, there if there < item.size else 0)
    meter.restart_file()
    meter.advance(begin)
    with target.open("r+b") as file:
        file.truncate(begin)
        file.seek(begin)
        for chunk in chunks:
            file.write(chunk)
            meter.advance(len(chunk))
            if file.tell() > item.size:
                raise AdapterFetchFailed(f"{item.name} is longer than S3 said")
        if file.tell() < item.size:
            raise TransientFailure(AdapterFetchFailed("S3 cut the download short"))


def _parse(address: str) -> tuple[str, str]:
    """Bucket and prefix. Raises AdapterNotFound for what is no `s3://bucket/prefix`."""
    match = _ADDRESS.fullmatch(address)
    if match is None or any(
        segment in ("", ".") or ".." in segment for segment in match["prefix"].split("/")
    ):
        raise AdapterNotFound("this is not an S3 address such as s3://bucket/prefix")
    return match["bucket"], match["prefix"]


def _revision(objects: Sequence[S3Object]) -> str:
    """40 hex digits that stand for these objects' contents."""
    listed = msgspec.json.encode([(item.name, item.etag, item.size) for item in objects])
    return hashlib.sha256(listed).hexdigest()[:40]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
