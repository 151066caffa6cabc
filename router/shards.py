"""One shard group as the engine sees it, and its gRPC form, which connects again after every loss."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol, cast

import grpc.aio

from ..proto import shard_pb2
from .connection import Connection, Deadlines
from .errors import AdapterFetchFailed, InternalError, RouterError, ShardLost
from .rpc_errors import typed

if TYPE_CHECKING:
    from ..proto.shard_pb2_grpc import ShardAsyncStub

log = logging.getLogger(__name__)


class GroupEvents(Protocol):
    """Who hears of a group. Called on the event loop; never blocks, never raises."""

    def group_ready(self, epoch: int, info: shard_pb2.InfoReply) -> None: ...

    def step_answered(self, result: shard_pb2.StepResult) -> None:
        """Answers come in seq order; a step's parts follow each other, the last one has `last`."""
        ...

    def group_lost(self, epoch: int, error: RouterError) -> None: ...


class ShardGroup(Protocol):
    """One copy of the model. Every call but `send` and `abandon` may raise a typed error."""

    def start(self, events: GroupEvents) -> None:
        """Connect, and connect again after every loss, until closed."""
        ...

    def send(self, plan: shard_pb2.StepPlan) -> None:
        """Queue a plan for every rank. One whose epoch is over is dropped."""
        ...

    def abandon(self, epoch: int, reason: str) -> None:
        """End the epoch from this side: the group cannot be trusted any more."""
        ...

    async def tokenizer(self, adapter_digest: str = "") -> shard_pb2.TokenizerReply: ...

    def download(
        self, request: shard_pb2.DownloadAdapterRequest
    ) -> AsyncIterator[shard_pb2.DownloadAdapterEvent]:
        """Fetch an adapter on every host; progress, then one manifest."""
        ...

    async def load(self, digest: str, slot: int) -> shard_pb2.LoadAdapterReply: ...

    async def unload(self, slot: int) -> shard_pb2.UnloadAdapterReply: ...

    async def close(self) -> None: ...


class GrpcShardGroup:
    """`ShardGroup` over gRPC.

    Args:
        addresses: host:port of every rank, rank 0 first. Rank 0's answers count; the others' must agree.
        deadlines: for every unary call and every step.
    """

    def __init__(self, addresses: tuple[str, ...], deadlines: Deadlines | None = None) -> None:
        self._addresses = addresses
        self._deadlines = deadlines or Deadlines()
        self._epoch = 0
        self._connection: Connection | None = None
        self._runner: asyncio.Task[None] | None = None

    def start(self, events: GroupEvents) -> None:
        self._runner = asyncio.create_task(self._run(events), name="shard-group")

    def send(self, plan: shard_pb2.StepPlan) -> None:
        connection = self._connection
        if connection is not None and connection.epoch == plan.epoch:
            connection.send(plan)

    def abandon(self, epoch: int, reason: str) -> None:
        connection = self._connection
        if connection is not None and connection.epoch == epoch:
            connection.lose(reason)

    async def tokenizer(self, adapter_digest: str = "") -> shard_pb2.TokenizerReply:
        request = shard_pb2.TokenizerRequest(adapter_digest=adapter_digest)
        stub = self._connected().stubs[0]
        return await typed(stub.Tokenizer(request, timeout=self._deadlines.tokenizer))

    async def download(
        self, request: shard_pb2.DownloadAdapterRequest
    ) -> AsyncIterator[shard_pb2.DownloadAdapterEvent]:
        """Rank 0 fetches first; the other ranks must then arrive at the digest that it found."""
        first, *others = self._connected().stubs
        manifest: shard_pb2.AdapterManifest | None = None
        async for event in self._download_on(first, request):
            if event.HasField("manifest"):
                manifest = event.manifest
            else:
                yield event
        if manifest is None:
            raise InternalError("A shard ended a download without a manifest.")
        same = shard_pb2.DownloadAdapterRequest()
        same.CopyFrom(request)
        same.expect_digest, same.revision = manifest.digest, manifest.revision or request.revision
        for stub in others:
            async for _ in self._download_on(stub, same):
                pass
        yield shard_pb2.DownloadAdapterEvent(manifest=manifest)

    async def load(self, digest: str, slot: int) -> shard_pb2.LoadAdapterReply:
        request = shard_pb2.LoadAdapterRequest(digest=digest, slot=slot)
        calls = [typed(s.LoadAdapter(request, timeout=self._deadlines.load)) for s in self._connected().stubs]
        replies = await asyncio.gather(*calls)
        return max(replies, key=lambda reply: reply.bytes)

    async def unload(self, slot: int) -> shard_pb2.UnloadAdapterReply:
        request = shard_pb2.UnloadAdapterRequest(slot=slot)
        calls = [
            typed(s.UnloadAdapter(request, timeout=self._deadlines.unload)) for s in self._connected().stubs
        ]
        return (await asyncio.gather(*calls))[0]

    async def close(self) -> None:
        """End the streams and stop connecting. Reports no loss."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
            self._runner = None

    def _connected(self) -> Connection:
        if self._connection is None:
            raise ShardLost("The model's process is being restarted.", retry_after=5.0)
        return self._connection

    async def _download_on(
        self, stub: ShardAsyncStub, request: shard_pb2.DownloadAdapterRequest
    ) -> AsyncIterator[shard_pb2.DownloadAdapterEvent]:
        call = stub.DownloadAdapter(request)
        try:
            while True:
                async with asyncio.timeout(self._deadlines.download_silence):
                    event = await typed(call.read())
                if event is grpc.aio.EOF:
                    return
                yield cast(shard_pb2.DownloadAdapterEvent, event)
        except TimeoutError as error:
            raise AdapterFetchFailed("The adapter's source stopped delivering.") from error
        finally:
            call.cancel()

    async def _run(self, events: GroupEvents) -> None:
        """Connect, serve until lost, again; each failure in a row waits longer before the next try."""
        pause = 0.05
        while True:
            self._epoch = max(self._epoch + 1, time.time_ns())
            connection = Connection(self._epoch, self._addresses, self._deadlines, events.step_answered)
            try:
                info = await connection.open()
                log.info("shard group ready: %s on %s, epoch %d", info.model, info.device, connection.epoch)
                self._connection = connection
                events.group_ready(connection.epoch, info)
                reason = await asyncio.shield(connection.lost)  # else our own end would look like a loss
                self._connection = None
                log.error("shard group lost, epoch %d: %s", connection.epoch, reason)
                lost = ShardLost("The model's process failed during this request.", retry_after=5.0)
                events.group_lost(connection.epoch, lost)
                pause = 0.05
            except RouterError as error:
                log.info("shard group not reachable yet: %s", error.message)
            finally:
                self._connection = None
                await connection.close()
            await asyncio.sleep(pause)
            pause = min(self._deadlines.reconnect, pause * 2)
