"""One shard group as the engine sees it, and its gRPC form, which connects again after every loss."""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import grpc.aio

from ..proto import shard_pb2
from ..proto.credentials import Credentials
from .connection import Connection, Deadlines
from .errors import AdapterFetchFailed, InternalError, RanksDiffer, RouterError, ShardLost
from .rpc_errors import cause_of, typed

if TYPE_CHECKING:
    from ..proto.shard_pb2_grpc import ShardAsyncStub

log = logging.getLogger(__name__)


class GroupEvents(Protocol):
    """Who hears of a group. Called on the event loop; never blocks, never raises."""

    def group_ready(self, epoch: int, info: shard_pb2.InfoReply) -> None: ...

    def step_answered(self, result: shard_pb2.StepResult) -> None:
        """Answers come in seq order; a step's parts follow each other, the last one has `last`."""
        ...

    def group_draining(self, epoch: int) -> None:
        """The group is about to stop: it shall get no new work, and be released once it has none left."""
        ...

    def group_lost(self, epoch: int, error: RouterError) -> None: ...


class ShardGroup(Protocol):
    """One copy of the model. Every call but `send`, `abandon` and `release` may raise a typed error."""

    def start(self, events: GroupEvents) -> None:
        """Connect, and connect again after every loss, until closed."""
        ...

    def send(self, plan: shard_pb2.StepPlan) -> None:
        """Queue a plan for every rank. One whose epoch is over is dropped."""
        ...

    def abandon(self, epoch: int, reason: str) -> None:
        """End the epoch from this side: the group cannot be trusted any more."""
        ...

    def release(self, epoch: int) -> None:
        """End the epoch in order: nothing runs there, and nothing will. No loss is reported."""
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


def new_epochs() -> Iterator[int]:
    """Numbers that grow, over restarts of the router too. The groups of one router share one iterator, so
    that no two of them have an epoch in common."""
    last = 0
    while True:
        last = max(last + 1, time.time_ns())
        yield last


class GrpcShardGroup:
    """`ShardGroup` over gRPC.

    Args:
        addresses: host:port of every rank, rank 0 first. Rank 0's answers count; the others' must agree.
        deadlines: for every unary call and every step.
        credentials: for mutual TLS; without them the connection is plain.
        epochs: a number for each connection, which no other group has.
    """

    def __init__(
        self,
        addresses: tuple[str, ...],
        deadlines: Deadlines | None = None,
        credentials: Credentials | None = None,
        epochs: Iterator[int] | None = None,
    ) -> None:
        self.weight_bytes: tuple[int, ...] = ()
        """Of each rank's part of the model, as it said last."""
        self.addresses = addresses
        self.trouble = ""
        """Why the last try to connect failed; empty after one that succeeded."""
        self.ranks_differ = asyncio.Event()
        """Set once all ranks have answered, but do not form a group that this router can drive."""
        self._deadlines = deadlines or Deadlines()
        self._credentials = credentials
        self._epochs = epochs or new_epochs()
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

    def release(self, epoch: int) -> None:
        connection = self._connection
        if connection is not None and connection.epoch == epoch and not connection.released.done():
            connection.released.set_result(None)

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
            async for event in self._download_on(stub, same):
                manifest.rank_bytes.extend(event.manifest.rank_bytes)
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
        name, pause = self.addresses[0], 0.05
        while True:
            epoch = next(self._epochs)
            connection = Connection(
                epoch,
                self.addresses,
                self._deadlines,
                events.step_answered,
                self._credentials,
                partial(events.group_draining, epoch),
            )
            try:
                infos = await connection.open()
                self.trouble = ""
                self.weight_bytes = tuple(info.weight_bytes for info in infos)
                info = infos[0]
                log.info(
                    "shard group ready: %s on %s at %s, epoch %d",
                    info.model,
                    info.device,
                    name,
                    connection.epoch,
                )
                self._connection = connection
                events.group_ready(connection.epoch, info)
                await asyncio.wait((connection.lost, connection.released), return_when=FIRST_COMPLETED)
                self._connection = None
                if connection.lost.done():
                    log.error("shard group at %s lost, epoch %d: %s", name, epoch, connection.lost.result())
                    lost = ShardLost("The model's process failed during this request.", retry_after=5.0)
                    events.group_lost(epoch, lost)
                else:
                    log.info("shard group at %s released, epoch %d", name, epoch)
                pause = 0.05
            except RouterError as error:
                self._note(error)
            finally:
                self._connection = None
                await connection.close()
            await asyncio.sleep(pause)
            pause = min(self._deadlines.reconnect, pause * 2)

    def _note(self, error: RouterError) -> None:
        trouble = cause_of(error)
        if trouble != self.trouble:
            log.info("shard group not reachable yet: %s", trouble)
        self.trouble = trouble
        if isinstance(error, RanksDiffer):
            self.ranks_differ.set()
