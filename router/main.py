"""One router process: the only place where its parts meet, and its life from start to drained."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import grpc
import uvloop
from prometheus_client import CollectorRegistry

from .. import __version__
from ..proto.credentials import Credentials, read_credentials
from .auth import ApiKeys
from .config import RouterConfig
from .engine import Engine
from .errors import RouterError
from .frontend import Frontend
from .grpc_api import GrpcServices, build_server
from .metrics import Metrics
from .rest.app import RestServer, RestServices, build_app
from .rest.lorax import ServerFacts, ShardGroup
from .shards import GrpcShardGroup, new_epochs
from .startup import REFUSED, StartFailed, until_ready
from .tokenizer import Tokenizer
from .tokenizers import Tokenizers

log = logging.getLogger(__name__)

GRPC_GRACE = 1.0
"""Seconds that RPCs which are already answered get to leave the wire."""

T = TypeVar("T")


class _Stopped(Exception):
    """A signal came while the router was still waiting to become ready."""


def run(config: RouterConfig) -> int:
    """Serve until told to stop, then drain; answers the exit code."""
    try:
        keys = ApiKeys.from_file(Path(config.api_key_file)) if config.api_key_file else ApiKeys()
        credentials = read_credentials(config, config.tls_name)
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Router(config, keys, credentials).live())


def _refuse(message: str, code: int = REFUSED) -> int:
    print(f"loraplex router: {message}", file=sys.stderr)
    return code


class _Router:
    """Wires the parts, serves, drains."""

    def __init__(self, config: RouterConfig, keys: ApiKeys, credentials: Credentials | None) -> None:
        self._config = config
        self._keys = keys
        self._registry = CollectorRegistry()
        epochs = new_epochs()
        self._shards = tuple(
            GrpcShardGroup(ranks, credentials=credentials, epochs=epochs) for ranks in config.groups
        )
        self._engine = Engine(config, self._shards, Metrics(self._registry))
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def live(self) -> int:
        """Wait for the shards, serve until the first signal, drain until done or the second."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._engine.start()
        try:
            await self._unless_stopped(self._until_ready())
            base = Tokenizer.from_reply(await self._unless_stopped(self._engine.tokenizer()))
            own = self._config.adapter_tokenizers
            async with aclosing(Tokenizers(base, self._engine.tokenizer, own=own)) as tokenizers:
                return await self._serve(Frontend(self._engine, tokenizers))
        except _Stopped:
            return 0
        except StartFailed as error:
            return _refuse(str(error), error.code)
        except (RouterError, ValueError) as error:
            return _refuse(f"the shard's tokenizer cannot be used: {error}")
        finally:
            await self._engine.close()

    async def _until_ready(self) -> None:
        await until_ready(self._engine.wait_ready(), self._shards, self._config.connect_timeout)

    async def _serve(self, frontend: Frontend) -> int:
        config = self._config
        rest = RestServer(build_app(self._rest_services(frontend)))
        rpc = build_server(self._grpc_services(frontend))
        try:
            try:
                port = await rest.start(config.host, config.port)
            except OSError as error:
                return _refuse(f"cannot listen on {config.host}:{config.port}: {error.strerror}")
            try:
                grpc_port = rpc.add_insecure_port(f"{config.host}:{config.grpc_port}")
            except RuntimeError:
                return _refuse(f"cannot listen on {config.host}:{config.grpc_port}; is the port taken?")
            await rpc.start()
            log.info("REST on %s:%d, gRPC on %s:%d", config.host, port, config.host, grpc_port)
            await self._stop.wait()
            await self._drain()
            return 0
        finally:
            await _shut_down(rest, rpc)

    async def _drain(self) -> None:
        log.info("draining for at most %g s", self._config.drain_timeout)
        drained = asyncio.create_task(self._engine.drain(self._config.drain_timeout))
        at_once = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait((drained, at_once), return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, at_once):
            task.cancel()

    def _on_signal(self) -> None:
        (self._stop_now if self._stop.is_set() else self._stop).set()

    async def _unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises _Stopped if a signal comes first."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            raise _Stopped
        return await task

    def _rest_services(self, frontend: Frontend) -> RestServices:
        return RestServices(
            engine=self._engine,
            frontend=frontend,
            keys=self._keys,
            registry=self._registry,
            facts=ServerFacts(
                version=__version__,
                groups=self._groups,
                max_queued_requests=self._config.max_queued_requests,
            ),
            max_body_bytes=self._config.max_body_bytes,
        )

    def _grpc_services(self, frontend: Frontend) -> GrpcServices:
        return GrpcServices(
            engine=self._engine,
            frontend=frontend,
            keys=self._keys,
            version=__version__,
            max_message_bytes=self._config.max_body_bytes,
        )

    def _groups(self) -> list[ShardGroup]:
        return [
            ShardGroup(
                tp=len(ranks),
                ready=self._engine.group_ready(index),
                weight_bytes=self._shards[index].weight_bytes,
            )
            for index, ranks in enumerate(self._config.groups)
        ]


async def _shut_down(rest: RestServer, rpc: grpc.aio.Server) -> None:
    await rpc.stop(GRPC_GRACE)
    await rest.stop()
