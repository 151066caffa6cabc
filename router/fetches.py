"""Fetching, loading and unloading adapters: each a task of its own, which reports to the loop's inbox."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from ..proto import shard_pb2
from .downloads import Download
from .errors import InternalError, RouterError
from .messages import (
    Fetched,
    FetchFailed,
    FetchProgressed,
    Loaded,
    LoadFailed,
    Message,
    Unloaded,
    UnloadFailed,
)
from .shards import ShardGroup
from .versions import read_manifest

log = logging.getLogger(__name__)


class AdapterTasks:
    """Runs a group's adapter commands beside the loop. Each ends in exactly one message, unless cancelled."""

    def __init__(self, group: ShardGroup, post: Callable[[Message], None]) -> None:
        self._group = group
        self._post = post
        self._tasks: set[asyncio.Task[None]] = set()

    def fetch(self, key: str, epoch: int, downloads: Sequence[Download]) -> None:
        """Run the downloads one after the other; the last one's manifest is the adapter's."""
        self._spawn(self._fetch(key, epoch, downloads), lambda error: FetchFailed(key, epoch, error))

    def load(self, key: str, epoch: int, digest: str, slot: int) -> None:
        self._spawn(self._load(key, epoch, digest, slot), lambda error: LoadFailed(key, epoch, error))

    def unload(self, key: str, epoch: int, slot: int) -> None:
        self._spawn(self._unload(key, epoch, slot), lambda error: UnloadFailed(key, epoch, error))

    def cancel(self) -> None:
        """Drop everything under way: the group is gone, or the router stops."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        self.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Awaitable[Message], failed: Callable[[RouterError], Message]) -> None:
        task = asyncio.create_task(self._report(work, failed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report(self, work: Awaitable[Message], failed: Callable[[RouterError], Message]) -> None:
        try:
            message = await work
        except RouterError as error:
            message = failed(error)
        except Exception:  # the task's outermost edge: whoever waits must hear of a bug too
            log.exception("an adapter command failed in the router")
            message = failed(InternalError("The router failed at an adapter command."))
        self._post(message)

    async def _fetch(self, key: str, epoch: int, downloads: Sequence[Download]) -> Message:
        started = time.monotonic()
        for download in downloads:
            try:
                manifest = await self._download(key, epoch, download.request)
            except RouterError as error:
                if not download.part:
                    raise
                raise type(error)(f"its part {download.part}: {error.message}") from error
        return Fetched(key, epoch, read_manifest(manifest), time.monotonic() - started)

    async def _download(
        self, key: str, epoch: int, request: shard_pb2.DownloadAdapterRequest
    ) -> shard_pb2.AdapterManifest:
        async with aclosing(self._group.download(request)) as events:  # type: ignore[type-var]
            async for event in events:
                if event.HasField("manifest"):
                    manifest: shard_pb2.AdapterManifest = event.manifest
                    return manifest
                self._post(FetchProgressed(key, epoch, event.progress))
        raise InternalError("A shard ended a download without a manifest.")

    async def _load(self, key: str, epoch: int, digest: str, slot: int) -> Message:
        started = time.monotonic()
        reply = await self._group.load(digest, slot)
        return Loaded(key, epoch, reply, time.monotonic() - started)

    async def _unload(self, key: str, epoch: int, slot: int) -> Message:
        await self._group.unload(slot)
        return Unloaded(key, epoch)
