"""Processes of one server that are started one by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .server import ONE_THREAD, OPENER, Server, alive, descendants

LORAPLEX = (sys.executable, "-P", "-m", "loraplex")


class Part:
    """A started process; its output is in `log`."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=log.parent,
                env=dict(os.environ) | ONE_THREAD | dict(env or {}),
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        return self.text.splitlines()[-1]

    def tree(self) -> list[int]:
        return [self.process.pid, *descendants(self.process.pid)]

    def wait(self, seconds: float = 60.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {seconds} s:\n{self.text[-8000:]}") from None

    def stop(self) -> int:
        """SIGTERM; answers the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()


@contextmanager
def running(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[Part]:
    """A process that is ended, with all that it started, at the end; what it started must end with it."""
    part = Part(command, log, env)
    try:
        yield part
    finally:
        pids = part.tree()
        if part.process.poll() is None:
            part.process.terminate()
            try:
                part.process.wait(30)
            except subprocess.TimeoutExpired:
                part.process.kill()
                part.process.wait()
        left = [pid for pid in pids if alive(pid)]
        Server.kill(left)


def complete(url: str, model: str, part: Part, *, seconds: float = 90.0) -> str:
    """The text of one completion, from a server that may still be starting."""
    body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + seconds
    while True:
        try:
            with OPENER.open(request, timeout=30) as response:
                return str(json.load(response)["choices"][0]["text"])
        except (urllib.error.URLError, ConnectionError):
            assert part.process.poll() is None, part.text[-8000:]
            assert time.monotonic() < deadline, part.text[-8000:]
            time.sleep(0.2)


def gone(pids: Sequence[int], seconds: float = 20.0) -> bool:
    """Whether all of these end within some seconds."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
