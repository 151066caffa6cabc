"""One run of a child process: its process group, its log and its lifeline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution
from pathlib import Path

from . import lifeline

_LINE_LIMIT = 65536
"""Bytes of one log line; a longer one is cut into several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to start, and how to tell that it is ready."""

    label: str
    """Prefix of its log lines, such as `shard 0`."""
    argv: tuple[str, ...]
    until_ready: Callable[[], Awaitable[None]]
    """Returns once the program answers; cancelled when it exits first."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside this process's own."""


def loraplex_command(*arguments: str) -> tuple[str, ...]:
    """The command line of a loraplex child. -P keeps the current directory off its path: a checkout's
    `kernels` folder must not stand in for the published package of that name."""
    return (sys.executable, "-P", "-m", "loraplex", *arguments)


def child_environment() -> dict[str, str]:
    """This process's environment, less our own settings: a child gets those as flags."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
    environment |= {lifeline.VARIABLE: "1", "PYTHONUNBUFFERED": "1"}
    if not _is_installed():
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return environment


def _is_installed() -> bool:
    """Whether an interpreter that does not look into the current directory finds this package."""
    safe = sys.path if sys.flags.safe_path else sys.path[1:]
    return any(True for _ in Distribution.discover(name="loraplex", path=safe))


class Child:
    """A started program. Must be created on a running event loop.

    Args:
        program: what to start; starting is immediate, readiness is `until_ready`.
        log: takes each line of the child's output, from a thread of the child's own.
    """

    def __init__(self, program: Program, log: Callable[[str], None]) -> None:
        self.program = program
        self.last_line = ""
        """The newest line of output that is not blank."""
        self._log = log
        self._process = subprocess.Popen(
            program.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=child_environment() | dict(program.environment),
        )
        self._pump = threading.Thread(target=self._pump_log, name=f"log of {program.label}", daemon=True)
        self._pump.start()
        self.exited: asyncio.Task[int] = asyncio.create_task(asyncio.to_thread(self._reap))
        """Done with the exit code (negative: the signal) when nothing of the child's group is left."""

    async def until_ready(self) -> bool:
        """Wait until the program is ready; False if it exited first."""
        probing = asyncio.ensure_future(self.program.until_ready())
        try:
            await asyncio.wait({probing, self.exited}, return_when=asyncio.FIRST_COMPLETED)
            if not probing.done():
                return False
            probing.result()
            return True
        finally:
            probing.cancel()

    async def stop(self, patience: float) -> None:
        """SIGTERM, and SIGKILL to the whole group after `patience` seconds; returns when it has exited."""
        if not self.exited.done():
            self._process.terminate()
            await asyncio.wait({self.exited}, timeout=patience)
        if not self.exited.done():
            self.kill()
        await asyncio.wait({self.exited})

    def kill(self) -> None:
        """SIGKILL to the child and all that it started, unless it has exited."""
        if not self.exited.done():
            self._kill_group()

    def _reap(self) -> int:
        code = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._kill_group()
        self._pump.join(timeout=1.0)
        return code

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _pump_log(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            while raw := stream.readline(_LINE_LIMIT):
                # Of a progress bar, which rewrites its line, the newest state.
                line = raw.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
                self.last_line = line or self.last_line
                self._log(f"[{self.program.label}] {line}")


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
