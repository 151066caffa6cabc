"""The fake shard behind a real gRPC server on loopback, with the faults of a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_status import rpc_status

from loraplex.proto import shard_pb2, shard_pb2_grpc
from loraplex.proto.credentials import Credentials
from loraplex.proto.transport import listen

from .shard import FakeDevice, make_info

SERVER_OPTIONS = (
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


@dataclass
class FakeServicer(shard_pb2_grpc.ShardServicer):
    """One rank. Steps run in seq order, whichever RPC they come by; a new decode stream is a new epoch."""

    info: shard_pb2.InfoReply = field(default_factory=make_info)
    silent: bool = False
    """Steps are taken and never answered."""
    wrong_epoch: bool = False
    prefills: int = 0
    decodes: int = 0
    refusal: tuple[grpc.StatusCode, str, str] | None = None
    """Code, ErrorInfo reason and message for the next adapter command."""
    digests: list[str] = field(default_factory=list)
    farewells: int = 0

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.device = FakeDevice(self.info)
        self._turn = asyncio.Condition()

    async def _run(self, plan: shard_pb2.StepPlan) -> shard_pb2.StepResult:
        async with self._turn:
            await self._turn.wait_for(lambda: self.device.last_seq == plan.seq - 1 and not self.silent)
            result = self.device.run(plan)
            self._turn.notify_all()
        if self.wrong_epoch:
            result.epoch += 1
        return result

    async def Info(self, request: Any, context: Any) -> shard_pb2.InfoReply:
        return self.info

    async def Tokenizer(self, request: Any, context: Any) -> shard_pb2.TokenizerReply:
        return shard_pb2.TokenizerReply(tokenizer_json=b"{}", bos_id=7)

    async def DownloadAdapter(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._refuse(context)
        yield shard_pb2.DownloadAdapterEvent(progress=shard_pb2.DownloadProgress(bytes_done=1, bytes_total=2))
        self.digests.append(request.expect_digest)
        manifest = shard_pb2.AdapterManifest(digest="d1", revision="abc", rank_bytes=[10])
        yield shard_pb2.DownloadAdapterEvent(manifest=manifest)

    async def LoadAdapter(self, request: Any, context: Any) -> shard_pb2.LoadAdapterReply:
        await self._refuse(context)
        self.device.slots[request.slot] = request.digest
        return shard_pb2.LoadAdapterReply(bytes=10 + self.info.rank)

    async def UnloadAdapter(self, request: Any, context: Any) -> shard_pb2.UnloadAdapterReply:
        await self._refuse(context)
        del self.device.slots[request.slot]
        return shard_pb2.UnloadAdapterReply(bytes=10)

    async def Prefill(self, request: Any, context: Any) -> AsyncIterator[shard_pb2.StepResult]:
        self.prefills += 1
        result = await self._run(request)
        first = shard_pb2.StepResult(epoch=result.epoch, seq=result.seq)
        yield first
        yield result

    async def Decode(self, requests: Any, context: Any) -> AsyncIterator[shard_pb2.StepResult]:
        self._begin()
        async for plan in requests:
            if plan.farewell:
                self.farewells += 1
                return
            self.decodes += 1
            yield await self._run(plan)

    async def _refuse(self, context: Any) -> None:
        if self.refusal is None:
            return
        code, reason, message = self.refusal
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="loraplex"))
        status = status_pb2.Status(code=code.value[0], message=message, details=[detail] if reason else [])
        await context.abort_with_status(rpc_status.to_status(status))


class FakeServer:
    """A rank's process: can be stopped at once and started again on the same port."""

    def __init__(self, servicer: FakeServicer, credentials: Credentials | None = None) -> None:
        self.servicer = servicer
        self._credentials = credentials
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health_aio.HealthServicer()
        await self.take_work(True)
        shard_pb2_grpc.add_ShardServicer_to_server(self.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = listen(self._server, "127.0.0.1", self.port, self._credentials)
        await self._server.start()

    async def take_work(self, ready: bool) -> None:
        """Say whether new work is welcome."""
        status = (
            health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await self._health.set("readiness", status)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None


@asynccontextmanager
async def fake_server(
    servicer: FakeServicer | None = None, credentials: Credentials | None = None
) -> AsyncIterator[FakeServer]:
    server = FakeServer(servicer or FakeServicer(), credentials)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
