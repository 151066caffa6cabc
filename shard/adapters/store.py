"""Adapters on this host: fetched once however many ask, kept in memory, parsed again from disk if need be."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import AdapterNotFound, AdapterRejected
from .files import FileLimits
from .host_cache import HostCache
from .manifest import AdapterManifest, AdapterRequest
from .merging.recipe import PartPlace
from .norms import GroupNorms
from .own_tokenizer import OwnTokenizer, read_own_tokenizer
from .progress import OnProgress
from .weights import PackedAdapter
from .worker import AdapterWorker

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a digest lies on disk, what its first request called it, and whether it has a text side."""

    name: str
    directory: Path
    own_tokenizer: bool
    own_chat_template: bool


@dataclass(slots=True)
class _Flight(Generic[Result]):
    """Work in progress that several callers wait for."""

    task: asyncio.Task[Result]
    listeners: list[OnProgress] = field(default_factory=list)


class AdapterStore:
    """Owns the worker and the host-memory tier. Used from one event loop."""

    def __init__(self, worker: AdapterWorker, cache: HostCache, norms: GroupNorms | None = None) -> None:
        """`norms`: of a rank among several."""
        self._worker = worker
        self._cache = cache
        self._norms = norms
        self._origins: dict[str, _Origin] = {}
        self._downloads: dict[Hashable, _Flight[AdapterManifest]] = {}
        self._packs: dict[Hashable, _Flight[PackedAdapter]] = {}

    async def start(self) -> None:
        """Start the worker ahead of the first request."""
        await self._worker.start()

    async def stop(self) -> None:
        """End the worker; whoever still waits gets AdapterFetchFailed."""
        await self._worker.stop()
        downloads = [flight.task for flight in self._downloads.values()]
        packs = [flight.task for flight in self._packs.values()]
        await asyncio.gather(*downloads, *packs, return_exceptions=True)

    async def download(self, request: AdapterRequest, on_progress: OnProgress) -> AdapterManifest:
        """Fetch, verify and parse an adapter; equal requests share one fetch, and its progress.

        Once begun a fetch goes on, even if all who asked for it have left.

        Raises AdapterNotFound, AdapterRejected (also for a digest other than expected), AdapterFetchFailed.
        """
        key = request.key()
        flight = self._downloads.get(key)
        if flight is None:
            flight = _launch(self._downloads, key, self._download(request))
        flight.listeners.append(on_progress)
        try:
            manifest = await asyncio.shield(flight.task)
        finally:
            flight.listeners.remove(on_progress)
        if request.expect_digest and manifest.digest != request.expect_digest:
            raise AdapterRejected(
                f"adapter {request.id!r}: digest {request.expect_digest} was expected, this host arrived at "
                f"{manifest.digest}; the source has changed between hosts"
            )
        return manifest

    async def host_weights(self, digest: str) -> PackedAdapter:
        """A downloaded adapter, ready to be served: from host memory or parsed again from its files.

        Raises AdapterNotFound for a digest that was never downloaded here, AdapterRejected where its files
        have changed since, and what `GroupNorms.complete` raises.
        """
        flight = self._packs.get(digest)
        if flight is None:
            flight = _launch(self._packs, digest, self._ready(digest))
        return await asyncio.shield(flight.task)

    async def own_tokenizer(self, digest: str) -> OwnTokenizer:
        """The tokenizer and chat template of a downloaded adapter, where they differ from the base's.

        Raises AdapterNotFound for a digest that was never downloaded here, AdapterRejected where its files
        cannot be read any more.
        """
        origin = self._origin(digest)
        own = await asyncio.to_thread(read_own_tokenizer, origin.directory, FileLimits())
        return replace(
            own,
            tokenizer_json=own.tokenizer_json if origin.own_tokenizer else b"",
            chat_template=own.chat_template if origin.own_chat_template else "",
        )

    async def _download(self, request: AdapterRequest) -> AdapterManifest:
        def report(done: int, total: int) -> None:
            for listener in tuple(self._downloads[request.key()].listeners):
                listener(done, total)

        downloaded = await self._worker.download(request, report, self._parts(request))
        digest = downloaded.manifest.digest
        self._origins[digest] = _Origin(
            request.id,
            downloaded.directory,
            downloaded.manifest.own_tokenizer,
            downloaded.manifest.own_chat_template,
        )
        self._cache.put(digest, downloaded.packed)
        return downloaded.manifest

    async def _ready(self, digest: str) -> PackedAdapter:
        packed = known = self._cache.get(digest)
        if packed is None:
            origin = self._origin(digest)
            packed = await self._worker.pack(origin.name, origin.directory, digest)
        if self._norms is not None:
            packed = await self._norms.complete(digest, packed)
        if packed is not known:
            self._cache.put(digest, packed)
        return packed

    def _parts(self, request: AdapterRequest) -> tuple[PartPlace, ...]:
        """Where the parts of a merged adapter lie. Raises AdapterNotFound naming one that is not here."""
        parts = request.merge.parts if request.merge is not None else ()
        try:
            origins = [self._origin(part.digest) for part in parts]
        except AdapterNotFound as error:
            raise AdapterNotFound(f"adapter {request.id!r} is made of others: {error}") from error
        return tuple(PartPlace(origin.name, str(origin.directory)) for origin in origins)

    def _origin(self, digest: str) -> _Origin:
        if (origin := self._origins.get(digest)) is None:
            raise AdapterNotFound(f"no adapter with digest {digest[:64]!r} was downloaded to this host")
        return origin


def _launch(
    flights: dict[Hashable, _Flight[Result]], key: Hashable, work: Coroutine[Any, Any, Result]
) -> _Flight[Result]:
    """Start `work` as the flight of `key`, which ends with it."""

    def land(task: asyncio.Task[Result]) -> None:
        del flights[key]
        if not task.cancelled():
            task.exception()  # seen: nobody may be left to await it

    flight = flights[key] = _Flight(asyncio.create_task(work))
    flight.task.add_done_callback(land)
    return flight
