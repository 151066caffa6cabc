"""`loraplex serve`: start shards and a router, keep them running, and stop them in order."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NoReturn

from .child import Child, Program, describe_exit, loraplex_command
from .handshake import rehearse
from .keeper import REFUSED, GroupKeeper, LaunchFailed, RestartPolicy
from .ports import hold_port, listen
from .probes import until_router_ready, until_shard_ready
from .proto.credentials import Credentials, is_loopback, read_credentials
from .router.config import RouterConfig
from .settings import to_flags
from .shard.config import ShardConfig

_DRAIN_MARGIN = 10.0
"""Seconds that a router gets beyond its own drain timeout."""
_SHARD_PATIENCE = 10.0


class Supervisor:
    """Owns the shard groups and the router from start to stop.

    Args:
        groups: keep the groups of ranks running.
        router: what to start once every group is ready.
        drain_timeout: seconds that the router may take to finish what runs.
        log: takes every line, the children's and ours; called from several threads.
        announce: called once, when all are ready.
    """

    def __init__(
        self,
        groups: Sequence[GroupKeeper],
        router: Program,
        *,
        drain_timeout: float,
        log: Callable[[str], None],
        announce: Callable[[], None],
    ) -> None:
        self._groups = groups
        self._router_program = router
        self._drain_timeout = drain_timeout
        self._log = log
        self._announce = announce
        self._router: Child | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second signal ends the children at once.

        Raises:
            LaunchFailed: a group refused or keeps dying, or the router died. Nothing is left running.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)
        stopping = asyncio.create_task(self._stopping.wait())
        keepers = {asyncio.create_task(group.keep()) for group in self._groups}
        keepers.add(asyncio.create_task(self._keep_router()))
        try:
            done, _ = await asyncio.wait({stopping, *keepers}, return_when=asyncio.FIRST_COMPLETED)
            for task in done & keepers:
                task.result()
        finally:
            for task in (stopping, *keepers):
                task.cancel()
            await self._stop()

    def _on_signal(self) -> None:
        if not self._stopping.is_set():
            self._log("stopping: running requests may finish; a second signal ends them")
            self._stopping.set()
            return
        if self._router is not None:
            self._router.kill()
        for group in self._groups:
            group.kill()

    async def _stop(self) -> None:
        if self._router is not None:
            await self._router.stop(self._drain_timeout + _DRAIN_MARGIN)
        await asyncio.gather(*(group.stop(_SHARD_PATIENCE) for group in self._groups))

    async def _keep_router(self) -> NoReturn:
        for group in self._groups:
            await group.ready.wait()
        self._router = child = Child(self._router_program, self._log)
        ready = await child.until_ready()
        if ready:
            self._announce()
        code = await asyncio.shield(child.exited)
        if ready:
            raise LaunchFailed(1, f"router died ({describe_exit(code)}): {child.last_line}")
        raise LaunchFailed(code if code > 0 else 1, f"router did not start: {child.last_line}")


def serve(
    shard: ShardConfig,
    router: RouterConfig,
    *,
    tp: int = 1,
    replicas: int = 1,
    restarts: RestartPolicy | None = None,
) -> int:
    """Run a server in the foreground until a signal ends it; answers 0.

    Ports that are 0, and every rank's address, are chosen here.

    Args:
        shard: of every rank, but for what tells them apart.
        tp: ranks that hold one copy of the model between them.
        replicas: groups of as many ranks, each with a copy of its own.

    Raises:
        LaunchFailed: see `Supervisor.run`; also, a port is taken, or the certificates will not do.
    """
    started = time.monotonic()
    credentials = _credentials(shard, router)
    router, ports = _with_ports(router, shard.host, tp * replicas)
    groups = [ports[first : first + tp] for first in range(0, len(ports), tp)]
    host = _bracketed(shard.host)
    router = dataclasses.replace(
        router, groups=tuple(tuple(f"{host}:{port}" for port in group) for group in groups)
    )
    if router.api_key_file is None and not is_loopback(router.host):
        _warn(f"listening on {router.host} without --api-key-file: anyone who can reach it can use it")
    probe_host = _reachable(router.host)

    def announce() -> None:
        elapsed = time.monotonic() - started
        url = f"http://{_bracketed(probe_host)}:{router.port}"
        grpc = f"{_bracketed(probe_host)}:{router.grpc_port}"
        print(f"ready in {elapsed:.1f} s: {url} (gRPC: {grpc})", flush=True)

    router_program = Program(
        label="router",
        argv=loraplex_command("router", *to_flags(router)),
        until_ready=lambda: until_router_ready(probe_host, router.port),
    )

    async def supervise() -> None:
        log = Log().write
        keepers: list[GroupKeeper] = []
        for index in range(replicas):
            programs = partial(rank_programs, shard, groups, index, credentials)
            keepers.append(GroupKeeper(programs, restarts or RestartPolicy(), log, among=keepers))
        await Supervisor(
            keepers, router_program, drain_timeout=router.drain_timeout, log=log, announce=announce
        ).run()

    asyncio.run(supervise())
    return 0


def _credentials(shard: ShardConfig, router: RouterConfig) -> Credentials | None:
    """For both sides, after a look that they will trust each other."""
    try:
        credentials = read_credentials(router, router.tls_name)
        rehearse(router, router.tls_name or shard.host)
    except ValueError as error:
        raise LaunchFailed(REFUSED, str(error)) from None
    return credentials


def rank_programs(
    shard: ShardConfig,
    groups: Sequence[Sequence[int]],
    index: int,
    credentials: Credentials | None = None,
) -> list[Program]:
    """One program for each rank of a group. `groups`: the ports at which every group's ranks listen."""
    before, total = sum(map(len, groups[:index])), sum(map(len, groups))
    prefix = f"group {index} " if len(groups) > 1 else ""
    return [
        Program(
            label=f"{prefix}shard {config.rank}",
            argv=loraplex_command("shard", *to_flags(config)),
            until_ready=partial(until_shard_ready, f"{_bracketed(config.host)}:{config.port}", credentials),
            environment=_device_of(config, before + config.rank, total),
        )
        for config in rank_configs(shard, groups, index)
    ]


def rank_configs(shard: ShardConfig, groups: Sequence[Sequence[int]], index: int) -> list[ShardConfig]:
    """The configuration of each rank of a group. The ranks of all groups share the processor."""
    ports = groups[index]
    before, total = sum(map(len, groups[:index])), sum(map(len, groups))
    if total == 1:
        return [dataclasses.replace(shard, port=ports[0])]
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // total)
    own = [tuple(cores[place * share : (place + 1) * share]) for place in range(before, before + len(ports))]
    master = _meeting_point(shard.host) if len(ports) > 1 else ""
    return [
        dataclasses.replace(
            shard,
            port=port,
            rank=rank,
            world_size=len(ports),
            master=master,
            threads=shard.threads or share,
            cores=own[rank] if shard.device != "cuda" else (),
        )
        for rank, port in enumerate(ports)
    ]


def _meeting_point(host: str) -> str:
    """Where the ranks of a group find each other: a port that is free now."""
    with _bind(host, 0, "--host") as held:
        return f"{_bracketed(host)}:{held.getsockname()[1]}"


def _device_of(config: ShardConfig, place: int, total: int) -> dict[str, str]:
    """Which GPU a rank sees: one of its own where there are several ranks, counted over all groups."""
    if total == 1 or config.device == "cpu":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(number) for number in range(total)] if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": devices[place]} if place < len(devices) else {}


class Log:
    """Lines of several threads on stderr, each written whole.

    When stderr is closed from outside, lines are dropped: the server outlives its reader.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = True

    def write(self, line: str) -> None:
        with self._lock:
            if not self._open:
                return
            try:
                print(line, file=sys.stderr, flush=True)
            except BrokenPipeError:
                self._open = False


def _with_ports(router: RouterConfig, shard_host: str, shards: int) -> tuple[RouterConfig, list[int]]:
    """The router with its ports chosen, and a port for each shard. They are held together while they are
    chosen, so that they differ, and let go before the children bind them."""
    with ExitStack() as held:
        port = held.enter_context(_bind(router.host, router.port, "--port")).getsockname()[1]
        grpc_port = held.enter_context(_bind(router.host, router.grpc_port, "--grpc-port")).getsockname()[1]
        ports = [held.enter_context(_bind(shard_host, 0, "--host")).getsockname()[1] for _ in range(shards)]
    return dataclasses.replace(router, port=port, grpc_port=grpc_port), ports


def _bind(host: str, port: int, flag: str) -> socket.socket:
    try:
        return listen(host, port) if port else hold_port(host)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise LaunchFailed(
            1, f"cannot listen on {host}, port {port}: {reason}; choose another with --host or {flag}"
        ) from None


def _reachable(host: str) -> str:
    """An address at which a server that listens on `host` answers on this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _warn(message: str) -> None:
    print(f"loraplex: warning: {message}", file=sys.stderr, flush=True)
