"""One shard process: load the model, serve it, and leave in order."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from .. import __version__
from ..proto import shard_pb2 as pb
from ..proto import shard_pb2_grpc
from ..proto.credentials import Credentials, read_credentials
from ..proto.transport import listen
from .adapters.host_cache import HostCache
from .adapters.loading import AdapterLoading
from .adapters.norms import GroupNorms
from .adapters.own_tokenizer import BaseText
from .adapters.pool import AdapterPool
from .adapters.store import AdapterStore
from .adapters.upload import uploader_for
from .adapters.worker import AdapterWorker
from .config import ShardConfig
from .device import DeviceThread
from .engine import StepEngine
from .errors import ModelRefused, RanksLost
from .graphs import with_graphs
from .load import LoadedModel, load_model
from .parallel.ranks import ProcessGroup
from .parallel.sampling import GroupSampler
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
READINESS = "readiness"
"""What the health service calls the question whether a router shall give this shard new work."""

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
    if config.cores:
        os.sched_setaffinity(0, config.cores)
    try:
        credentials = read_credentials(config)
    except ValueError as error:
        return _refuse(str(error))
    thread = DeviceThread()
    thread.start()
    try:
        loaded = thread.run(lambda: _load(config, load))
    except (ModelRefused, ValueError, RanksLost) as error:
        thread.stop()
        return _refuse(str(error), EXIT_FATAL if isinstance(error, RanksLost) else EXIT_REFUSED)
    # Every thread that computes in parallel has a team of its own. With more of them than processors, OpenMP
    # lets them sleep at each of a step's barriers, which doubles a step of a small model.
    torch.set_num_threads(1)
    _settle()
    return asyncio.run(_serve(config, loaded, thread, credentials))


def _refuse(reason: str, code: int = EXIT_REFUSED) -> int:
    print(f"loraplex shard: {reason}", file=sys.stderr)
    return code


def _settle() -> None:
    """After the load: give back what only the load needed, and have collections pass over what will stay."""
    gc.collect()
    gc.freeze()
    with suppress(AttributeError):  # of the GNU C library alone
        ctypes.CDLL(None).malloc_trim(0)


def _load(config: ShardConfig, load: Callable[[ShardConfig], LoadedModel]) -> LoadedModel:
    """On the device thread, whose number of threads this sets: the one that computes later."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    return load(config)


async def _serve(
    config: ShardConfig, loaded: LoadedModel, thread: DeviceThread, credentials: Credentials | None
) -> int:
    stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop_now = asyncio.Event()

    def finish(code: int, reason: str) -> None:
        if not stop.done():
            log.log(logging.INFO if code == 0 else logging.ERROR, "stopping: %s", reason)
            stop.set_result(code)
        else:
            stop_now.set()

    _stop_on_signals(finish)
    text = BaseText(loaded.tokenizer.tokenizer_json, loaded.tokenizer.chat_template)
    worker = AdapterWorker(loaded.layout, loaded.base, text, pin=loaded.device.type == "cuda")
    ranks = loaded.ranks
    norms = GroupNorms(ranks.rank, ranks.size, ranks.board) if isinstance(ranks, ProcessGroup) else None
    store = AdapterStore(worker, HostCache(config.host_adapter_memory), norms)
    service = _wire(config, loaded, thread, store, lambda reason: finish(EXIT_FATAL, reason))
    health = health_aio.HealthServicer()
    server = _build_server(service, health)
    try:
        port = listen(server, config.host, config.port, credentials)
    except RuntimeError:
        return _refuse(f"cannot listen on {config.host}:{config.port}; is the port taken?", EXIT_FATAL)
    await health.set(READINESS, health_pb2.HealthCheckResponse.SERVING)
    await store.start()
    await server.start()
    what = f"{loaded.device}, {loaded.dtype}, {'TLS' if credentials else 'plaintext'}"
    log.info("serving %s on %s:%d (%s)", config.model, config.host, port, what)
    watcher = asyncio.create_task(watch_health(thread, _reporter(health), limit=STALLED_AFTER))
    code = await stop
    if code == 0:
        await health.set(READINESS, health_pb2.HealthCheckResponse.NOT_SERVING)
        await _first_of(service.left.wait(), stop_now.wait(), timeout=config.drain_timeout)
    watcher.cancel()
    await server.stop(grace=1.0 if code == 0 else 0.2)
    await store.stop()
    return code


async def _first_of(*waits: Coroutine[Any, Any, object], timeout: float) -> None:
    """Return once one of them has ended, or the time is over."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _wire(
    config: ShardConfig,
    loaded: LoadedModel,
    thread: DeviceThread,
    store: AdapterStore,
    on_fatal: Callable[[str], None],
) -> ShardService:
    """The service and, behind it, what the device thread works on."""
    pool = AdapterPool(loaded.sites, slots=config.max_adapters, budget=config.adapter_memory)
    engine = StepEngine(
        with_graphs(loaded.model, loaded.graphs, pool.are_plain),
        loaded.kv,
        RowTable(config.max_num_seqs, -(-loaded.max_model_len // loaded.kv.block_size)),
        Sampler() if loaded.ranks.size == 1 else GroupSampler(Sampler(), loaded.ranks),
        slot_is_resident=lambda slot: pool.digest_of(slot) is not None,
    )
    return ShardService(
        info=describe(config, loaded),
        tokenizer=loaded.tokenizer,
        sequencer=Sequencer(thread, engine),
        store=store,
        loading=AdapterLoading(thread, pool, uploader_for(loaded.device)),
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
        rank=loaded.ranks.rank,
        world_size=loaded.ranks.size,
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
