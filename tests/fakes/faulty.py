"""An HTTP server for tests that counts what it is asked, and fails on demand."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Fault:
    """What goes wrong with requests whose path ends with `path`, the next `times` times."""

    path: str
    times: int
    methods: tuple[str, ...] = ("GET",)
    status: int = 0
    """Answer this status instead; 0: answer, but spoil the body as below."""
    retry_after: int | None = None
    corrupt: bool = False
    """Same size, other bytes."""
    cut_after: int | None = None
    """Close the connection after so many bytes."""
    seconds: float = 0.0
    """Spread the body over this time."""


class FaultyServer:
    """Serves on a free port of 127.0.0.1 while its `with` block lasts. Thread-safe."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        """(method, path) to how often it was asked for."""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def break_(self, path: str, times: int = 1, **fault: Any) -> None:
        """Let the next `times` requests for paths ending in `path` fail as `Fault` describes."""
        with self._lock:
            self._faults.append(Fault(path, times, **fault))

    def count(self, path: str, method: str = "GET") -> int:
        """How many requests of this method had a path ending in `path`."""
        with self._lock:
            return sum(
                n for (verb, asked), n in self.requests.items() if verb == method and asked.endswith(path)
            )

    def note(self, method: str, path: str) -> Fault | None:
        """Count a request; the fault that it meets, used up by one."""
        with self._lock:
            self.requests[method, path] += 1
            for fault in self._faults:
                if fault.times > 0 and method in fault.methods and path.endswith(fault.path):
                    fault.times -= 1
                    return fault
        return None
