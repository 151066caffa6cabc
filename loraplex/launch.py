"""`loraplex serve`: start a shard and a router, keep them running, and stop them in order."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NoReturn

from .child import Child, Program, describe_exit, loraplex_command
from .probes import until_router_ready, until_shard_ready
from .router.config import RouterConfig
from .settings import to_flags
from .shard.config import ShardConfig

REFUSED = 2
"""Exit code of a child that refuses its configuration or its model: another try cannot help."""
_DRAIN_MARGIN = 10.0
"""Seconds that a router gets beyond its own drain timeout."""
_SHARD_PATIENCE = 10.0


class LaunchFailed(Exception):
    """The server cannot be started or kept up. `code` is the launcher's exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a dead shard is started again. Times are seconds."""

    deaths: int = 5
    """So many deaths in a row end the server."""
    window: float = 60.0
    """A death after so much good service begins a new row."""
    first_delay: float = 0.5
    max_delay: float = 10.0

    def delay(self, deaths: int) -> float:
        """How long to wait after the given number of deaths in a row; doubles each time."""
        return min(self.max_delay, self.first_delay * 2.0 ** (deaths - 1))


class Supervisor:
    """Owns the two children from start to stop.

    Args:
        shard, router: what to start; the router is started once the shard is ready.
        drain_timeout: seconds that the router may take to finish what runs.
        restarts: when to start a dead shard again, and when to give up.
        log: takes every line, the children's and ours; called from several threads.
        announce: called once, when both are ready.
    """

    def __init__(
        self,
        shard: Program,
        router: Program,
        *,
        drain_timeout: float,
        restarts: RestartPolicy,
        log: Callable[[str], None],
        announce: Callable[[], None],
    ) -> None:
        self._shard_program = shard
        self._router_program = router
        self._drain_timeout = drain_timeout
        self._restarts = restarts
        self._log = log
        self._announce = announce
        self._shard: Child | None = None
        self._router: Child | None = None
        self._shard_ready = asyncio.Event()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second signal ends the children at once.

        Raises:
            LaunchFailed: the shard refused or keeps dying, or the router died. Nothing is left running.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)
        stopping = asyncio.create_task(self._stopping.wait())
        keepers = {asyncio.create_task(self._keep_shard()), asyncio.create_task(self._keep_router())}
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
        for child in (self._router, self._shard):
            if child is not None:
                child.kill()

    async def _stop(self) -> None:
        if self._router is not None:
            await self._router.stop(self._drain_timeout + _DRAIN_MARGIN)
        if self._shard is not None:
            await self._shard.stop(_SHARD_PATIENCE)

    async def _keep_shard(self) -> NoReturn:
        deaths = 0
        while True:
            served = await self._run_shard_once()
            deaths = 1 if served >= self._restarts.window else deaths + 1
            await self._pause_after(deaths)

    async def _run_shard_once(self) -> float:
        """Seconds that the shard served before it died; 0 if it never became ready."""
        self._shard = child = Child(self._shard_program, self._log)
        started = time.monotonic()
        ready = await child.until_ready()
        ready_at = time.monotonic()
        if ready:
            if self._shard_ready.is_set():
                self._log(f"{child.program.label} is ready again after {ready_at - started:.1f} s")
            self._shard_ready.set()
        code = await asyncio.shield(child.exited)
        if not ready and code == REFUSED:
            raise LaunchFailed(REFUSED, f"{child.program.label} refused to start: {child.last_line}")
        self._log(f"{child.program.label} died ({describe_exit(code)})")
        return time.monotonic() - ready_at if ready else 0.0

    async def _pause_after(self, deaths: int) -> None:
        label = self._shard_program.label
        if deaths >= self._restarts.deaths:
            last_line = self._shard.last_line if self._shard is not None else ""
            raise LaunchFailed(
                1, f"{label} died {deaths} times in a row, giving up; its last line: {last_line}"
            )
        delay = self._restarts.delay(deaths)
        self._log(f"{label} starts again in {delay:.1f} s")
        await asyncio.sleep(delay)

    async def _keep_router(self) -> NoReturn:
        await self._shard_ready.wait()
        self._router = child = Child(self._router_program, self._log)
        ready = await child.until_ready()
        if ready:
            self._announce()
        code = await asyncio.shield(child.exited)
        if ready:
            raise LaunchFailed(1, f"router died ({describe_exit(code)}): {child.last_line}")
        raise LaunchFailed(code if code > 0 else 1, f"router did not start: {child.last_line}")


def serve(shard: ShardConfig, router: RouterConfig, restarts: RestartPolicy | None = None) -> int:
    """Run a server in the foreground until a signal ends it; answers 0.

    `shard.port` and `router.ranks` are chosen here, as are router ports given as 0.

    Raises:
        LaunchFailed: see `Supervisor.run`; also, a port is taken.
    """
    started = time.monotonic()
    shard, router = _with_ports(shard, router)
    if router.api_key_file is None and not _is_loopback(router.host):
        _warn(f"listening on {router.host} without --api-key-file: anyone who can reach it can use it")
    address, probe_host = router.ranks[0], _reachable(router.host)

    def announce() -> None:
        elapsed = time.monotonic() - started
        url = f"http://{_bracketed(probe_host)}:{router.port}"
        grpc = f"{_bracketed(probe_host)}:{router.grpc_port}"
        print(f"ready in {elapsed:.1f} s: {url} (gRPC: {grpc})", flush=True)

    shard_program = Program(
        label="shard 0",
        argv=loraplex_command("shard", *to_flags(shard)),
        until_ready=lambda: until_shard_ready(address),
    )
    router_program = Program(
        label="router",
        argv=loraplex_command("router", *to_flags(router)),
        until_ready=lambda: until_router_ready(probe_host, router.port),
    )

    async def supervise() -> None:
        await Supervisor(
            shard_program,
            router_program,
            drain_timeout=router.drain_timeout,
            restarts=restarts or RestartPolicy(),
            log=Log().write,
            announce=announce,
        ).run()

    asyncio.run(supervise())
    return 0


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


def _with_ports(shard: ShardConfig, router: RouterConfig) -> tuple[ShardConfig, RouterConfig]:
    """The configurations with every port chosen. The ports are held together while they are chosen,
    so that they differ, and let go before the children bind them."""
    with ExitStack() as held:
        port = held.enter_context(_bind(router.host, router.port, "--port")).getsockname()[1]
        grpc_port = held.enter_context(_bind(router.host, router.grpc_port, "--grpc-port")).getsockname()[1]
        shard_port = held.enter_context(_bind(shard.host, shard.port, "--port")).getsockname()[1]
    shard = dataclasses.replace(shard, port=shard_port)
    ranks = (f"{_bracketed(shard.host)}:{shard_port}",)
    return shard, dataclasses.replace(router, port=port, grpc_port=grpc_port, ranks=ranks)


def _bind(host: str, port: int, flag: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise LaunchFailed(
            1, f"cannot listen on {host}, port {port}: {reason}; choose another with --host or {flag}"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable(host: str) -> str:
    """An address at which a server that listens on `host` answers on this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _warn(message: str) -> None:
    print(f"loraplex: warning: {message}", file=sys.stderr, flush=True)
