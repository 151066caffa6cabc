"""Fetching, loading and unloading adapters: each a task of its own, which reports to the loop's inbox."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from ..proto import shard_pb2
from .adapters import Adapter
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
from .sources import SourceKind

log = logging.getLogger(__name__)

_SOURCES = {
    SourceKind.HUB: shard_pb2.DownloadAdapterRequest.HUB,
    SourceKind.LOCAL: shard_pb2.DownloadAdapterRequest.LOCAL,
}


class AdapterTasks:
    """Runs a group's adapter commands beside the loop. Each ends in exactly one message, unless cancelled."""

    def __init__(self, group: ShardGroup, post: Callable[[Message], None]) -> None:
        self._group = group
        self._post = post
        self._tasks: set[asyncio.Task[None]] = set()

    def fetch(self, adapter: Adapter, epoch: int) -> None:
        request = shard_pb2.DownloadAdapterRequest(
            source=_SOURCES[adapter.source.kind],
            id=adapter.source.id,
            revision=adapter.source.revision,
            token=adapter.token,
        )
        key = adapter.key
        self._spawn(self._fetch(key, epoch, request), lambda error: FetchFailed(key, epoch, error))

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

    async def _fetch(self, key: str, epoch: int, request: shard_pb2.DownloadAdapterRequest) -> Message:
        started = time.monotonic()
        async with aclosing(self._group.download(request)) as events:  # type: ignore[type-var]
            async for event in events:
                if event.HasField("manifest"):
                    return Fetched(key, epoch, event.manifest, time.monotonic() - started)
                self._post(FetchProgressed(key, epoch, event.progress))
        raise InternalError("A shard ended a download without a manifest.")

    async def _load(self, key: str, epoch: int, digest: str, slot: int) -> Message:
        started = time.monotonic()
        reply = await self._group.load(digest, slot)
        return Loaded(key, epoch, reply, time.monotonic() - started)

    async def _unload(self, key: str, epoch: int, slot: int) -> Message:
        await self._group.unload(slot)
        return Unloaded(key, epoch)
