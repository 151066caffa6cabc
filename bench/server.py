"""A server process from its command to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import BenchFailed

START_SECONDS = 300.0
STOP_SECONDS = 20.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run, what to add to the environment, and the path that answers 200 once it serves."""

    command: tuple[str, ...]
    ready_path: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    pid: int


@contextlib.contextmanager
def running(launch: Launch, port: int, log: Path) -> Iterator[Running]:
    """Run a server, its output in `log`: yields once it is ready, and ends its whole process group.

    Raises BenchFailed where it ends or stays silent instead of getting ready.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.command,
            env=os.environ | launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url + launch.ready_path, log)
        yield Running(url, process.pid)
    finally:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        _signal(process, signal.SIGKILL)
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(url):
        if (code := process.poll()) is not None:
            words = log.read_text(errors="replace").splitlines()[-1:]
            raise BenchFailed(
                "\n".join([f"a server ended with {code} before it was ready; see {log}", *words])
            )
        if time.monotonic() > deadline:
            raise BenchFailed(f"a server was not ready after {START_SECONDS:.0f} s; see {log}")
        time.sleep(0.25)


def _answers(url: str) -> bool:
    try:
        with _OPENER.open(url, timeout=2):
            return True
    except OSError:
        return False


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the group that the process leads, if anything of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
