"""`loraplex serve` as a real process, and what can be read of it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex.ports import free_port

START_SECONDS = 60.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(Exception):
    """The server answered with an HTTP error."""

    def __init__(self, error: urllib.error.HTTPError) -> None:
        self.status = error.code
        self.headers = dict(error.headers)
        with error:
            self.body = json.loads(error.read() or b"{}")
        super().__init__(f"{self.status}: {self.body}")


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For servers of tiny models beside each other: a thread that waits for work spins, at others' cost."""


class Server:
    """A running server and its processes. Talks plain HTTP to it; load tests bring their own client."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        command: Sequence[str] = (sys.executable, "-P", "-m", "loraplex"),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        ports = ["--port", str(self.port), "--grpc-port", str(self.grpc_port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "serve", *arguments, *ports],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=cwd or log.parent,
                env=dict(os.environ) | ONE_THREAD | dict(env or {}),
                start_new_session=True,
            )

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server exited with {self.process.returncode}:\n{self.log_text()}")
            if self.status("/health/ready") == 200:
                return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log_text()}")

    def has_ports(self, seconds: float = START_SECONDS) -> bool:
        """Wait until it listens. False where it ended because one of its ports was taken meanwhile."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.status("/health/live"):
                return True
            time.sleep(0.05)
        return "Address already in use" not in self.log_text()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")[-8000:]

    def status(self, path: str) -> int:
        """HTTP status of a GET; 0 where nobody answers."""
        try:
            with OPENER.open(self.url + path, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return Refused(error).status
        except OSError:
            return 0

    def get(self, path: str) -> Any:
        with OPENER.open(self.url + path, timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: object, *, timeout: float = 60) -> Any:
        """The decoded answer. Raises Refused for an HTTP error."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with OPENER.open(request, timeout=timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise Refused(error) from None
        return json.loads(text) if text.startswith((b"{", b"[")) else text.decode()

    def complete(self, model: str, prompt: object, **fields: object) -> Any:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8} | fields
        return self.post("/v1/completions", body)

    def metrics(self) -> dict[str, float]:
        """Values of all metrics, labels included in the name."""
        with OPENER.open(self.url + "/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        found = (re.fullmatch(r"(\S+(?:\{.*\})?) (\S+)", line) for line in lines if not line.startswith("#"))
        return {match[1]: float(match[2]) for match in found if match}

    def generate(self, tokens: int, seconds: float = 30.0) -> None:
        """Wait until so many more tokens have been generated."""
        name = "loraplex_generated_tokens_total"
        wanted, deadline = self.metrics()[name] + tokens, time.monotonic() + seconds
        while self.metrics()[name] < wanted:
            assert time.monotonic() < deadline, f"no {tokens} tokens in {seconds} s"
            time.sleep(0.01)

    def tree(self) -> list[int]:
        """Process ids of the server and everything below it."""
        return [self.process.pid, *descendants(self.process.pid)]

    def find(self, role: str) -> int:
        """Process id of the router or the first shard, by its command line."""
        found = self.find_all(role)
        assert found, f"no {role} process below {self.process.pid}"
        return found[0]

    def find_all(self, role: str) -> list[int]:
        """Process ids of every router or shard."""
        found = []
        for pid in self.tree():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if role.encode() in words and b"serve" not in words:
                    found.append(pid)
        return found

    def stop(self, seconds: float = 40.0) -> int:
        """SIGTERM, wait, and answer the exit code; whatever is left is killed and reported."""
        pids = self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill(pids)
            raise AssertionError(f"the server did not stop:\n{self.log_text()}") from None
        left = [pid for pid in pids if alive(pid)]
        self.kill(left)
        assert not left, f"processes {left} outlived the server"
        return code

    @staticmethod
    def kill(pids: Sequence[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(arguments: Sequence[str], log: Path, **options: Any) -> Iterator[Server]:
    """A ready server that is stopped, with all its processes, at the end."""
    server = Server(arguments, log, **options)
    try:
        if not server.has_ports():  # somebody was faster
            server = Server(arguments, log, **options)
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def alive(pid: int) -> bool:
    """A process that runs; one that only waits to be reaped does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += [int(child) for child in task.read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]
