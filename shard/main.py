"""One shard process: load the model, serve it, and leave in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from .. import __version__
from ..proto import shard_pb2 as pb
from ..proto import shard_pb2_grpc
from .adapters.host_cache import HostCache
from .adapters.own_tokenizer import BaseText
from .adapters.pool import AdapterPool
from .adapters.store import AdapterStore
from .adapters.worker import AdapterWorker
from .config import ShardConfig
from .device import DeviceThread
from .engine import StepEngine
from .errors import ModelRefused
from .load import LoadedModel, load_model
from .rows import RowTable
from .sampling import Sampler
from .sequencer import Sequencer
from .service import ShardService, watch_health

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
MESSAGE_LIMIT = 64 * 1024 * 1024
STALLED_AFTER = 120.0
"""Seconds after which an unfinished command makes the shard unhealthy. The router's own deadlines are
sharper: they know how much work a step holds."""

EXIT_REFUSED = 2
EXIT_FATAL = 3

SERVICE = pb.DESCRIPTOR.services_by_name["Shard"].full_name

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


def run(config: ShardConfig, load: Callable[[ShardConfig], LoadedModel] = load_model) -> int:
    """Serve until told to stop; answers the exit code. `load` builds the model: the one replaceable part."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        loaded = load(config)
    except (ModelRefused, ValueError) as error:
        print(f"loraplex shard: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return asyncio.run(_serve(config, loaded))


async def _serve(config: ShardConfig, loaded: LoadedModel) -> int:
    stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def finish(code: int, reason: str) -> None:
        if not stop.done():
            log.log(logging.INFO if code == 0 else logging.ERROR, "stopping: %s", reason)
            stop.set_result(code)

    _stop_on_signals(finish)
    thread = DeviceThread()
    thread.start()
    text = BaseText(loaded.tokenizer.tokenizer_json, loaded.tokenizer.chat_template)
    worker = AdapterWorker(loaded.layout, loaded.base, text)
    store = AdapterStore(worker, HostCache(config.host_adapter_memory))
    service = _wire(config, loaded, thread, store, lambda reason: finish(EXIT_FATAL, reason))
    health = health_aio.HealthServicer()
    server = _build_server(service, health)
    try:
        port = server.add_insecure_port(f"{config.host}:{config.port}")
    except RuntimeError:
        print(
            f"loraplex shard: cannot listen on {config.host}:{config.port}; is the port taken?",
            file=sys.stderr,
        )
        return EXIT_REFUSED
    await store.start()
    await server.start()
    log.info("serving %s on %s:%d (%s, %s)", config.model, config.host, port, loaded.device, loaded.dtype)
    watcher = asyncio.create_task(watch_health(thread, _reporter(health), limit=STALLED_AFTER))
    code = await stop
    watcher.cancel()
    await server.stop(grace=1.0 if code == 0 else 0.2)
    await store.stop()
    return code


def _wire(
    config: ShardConfig,
    loaded: LoadedModel,
    thread: DeviceThread,
    store: AdapterStore,
    on_fatal: Callable[[str], None],
) -> ShardService:
    """The service and, behind it, what the device thread works on."""
    pool = AdapterPool(
        loaded.sites, slots=config.max_adapters, budget=config.adapter_memory, device=loaded.device
    )
    engine = StepEngine(
        loaded.model,
        loaded.kv,
        RowTable(config.max_num_seqs, -(-loaded.max_model_len // loaded.kv.block_size)),
        Sampler(),
        device=loaded.device,
        slot_is_resident=lambda slot: pool.digest_of(slot) is not None,
    )
    return ShardService(
        info=describe(config, loaded),
        tokenizer=loaded.tokenizer,
        thread=thread,
        sequencer=Sequencer(thread, engine),
        store=store,
        pool=pool,
        on_fatal=on_fatal,
    )


def _build_server(service: ShardService, health: health_aio.HealthServicer) -> grpc.aio.Server:
    """The shard's service with health and reflection. It has no port yet, and is not started."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    shard_pb2_grpc.add_ShardServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((SERVICE, SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server


def _reporter(health: health_aio.HealthServicer) -> Callable[[bool], Awaitable[None]]:
    async def report(healthy: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", SERVICE):
            await health.set(name, status)

    return report


def describe(config: ShardConfig, loaded: LoadedModel) -> pb.InfoReply:
    """What this rank tells the router about itself."""
    full = pb.KvGroup(
        layers=loaded.kv.layers,
        kind=pb.KvGroup.FULL,
        block_bytes=loaded.block_bytes,
        block_count=loaded.kv.blocks,
        block_size=loaded.kv.block_size,
    )
    return pb.InfoReply(
        protocol_version=PROTOCOL_VERSION,
        version=__version__,
        model=config.model,
        model_digest=loaded.digest,
        architecture=loaded.architecture,
        device=str(loaded.device),
        dtype=loaded.dtype,
        rank=0,
        world_size=1,
        kv_groups=[full],
        adapter_bytes=config.adapter_memory,
        adapter_slots=config.max_adapters,
        max_rank=config.max_rank,
        max_model_len=loaded.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens,
        vocab_size=loaded.vocab_size,
        weight_bytes=loaded.weight_bytes,
    )


def _stop_on_signals(finish: Callable[[int, str], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, finish, 0, signal.Signals(number).name)
