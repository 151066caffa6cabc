"""How the launcher tells that a child is ready. Nothing here goes through a proxy."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from .proto.credentials import Credentials

_PAUSE = 0.05
"""Seconds between two tries."""
_PATIENCE = 5.0
"""Seconds that one try may take."""


async def until_shard_ready(address: str, credentials: Credentials | None = None) -> None:
    """Return once `grpc.health.v1` at host:port answers SERVING; over TLS with credentials."""
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from .proto.transport import open_channel

    options = [
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 200),
    ]
    request = health_pb2.HealthCheckRequest()
    async with open_channel(address, options, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                reply = await stub.Check(request, timeout=_PATIENCE)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise
            else:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_PAUSE)


async def until_router_ready(host: str, port: int) -> None:
    """Return once GET /health/ready answers 200."""
    while True:
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                if await _status(host, port, "/health/ready") == 200:
                    return
        await asyncio.sleep(_PAUSE)


async def _status(host: str, port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        version, _, rest = (await reader.readuntil(b"\r\n")).partition(b" ")
        return int(rest[:3]) if version.startswith(b"HTTP/") and rest[:3].isdigit() else 0
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
