"""A server process: ready, gone with its group, and failures in one line."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from bench import server
from bench.errors import BenchFailed
from bench.server import Launch, running
from loraplex.ports import free_port

SERVE = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(60)"])
print(child.pid, flush=True)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
"""


def python(code: str, *arguments: str) -> Launch:
    return Launch((sys.executable, "-c", code, *arguments), "/health")


def is_running(pid: int) -> bool:
    """A process that has ended but has not been collected does not run."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_server_is_entered_ready_and_takes_its_children_with_it(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "logs/server.log"
    with running(python(SERVE, str(port)), port, log) as started:
        with urllib.request.urlopen(f"{started.url}/health", timeout=5) as answer:
            assert answer.status == 200
        child = int(log.read_text().split()[0])
        assert is_running(child)
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=5)
    assert not is_running(child)


def test_a_server_that_ends_at_once_is_named_by_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with (
        pytest.raises(BenchFailed, match=f"ended with 3 before it was ready; see {log}"),
        running(python("raise SystemExit(3)"), free_port(), log),
    ):
        pass


def test_its_last_words_are_told(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchFailed, match=r"\nthe port is taken$"),
        running(
            python("print('so', flush=True); raise SystemExit('the port is taken')"),
            free_port(),
            tmp_path / "log",
        ),
    ):
        pass


def test_a_server_that_stays_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "START_SECONDS", 0.0)
    with (
        pytest.raises(BenchFailed, match="not ready after 0 s"),
        running(python("import time; time.sleep(60)"), free_port(), tmp_path / "log"),
    ):
        pass


def test_the_environment_is_added_to(tmp_path: Path) -> None:
    launch = Launch((sys.executable, "-c", "import os; print(os.environ['HOW'])"), "/", {"HOW": "so"})
    with pytest.raises(BenchFailed), running(launch, free_port(), tmp_path / "log"):
        pass
    assert (tmp_path / "log").read_text() == "so\n"
