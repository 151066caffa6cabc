"""deploy/launch_tp.sh with two ranks on the CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraplex.demo import MODEL_DIR
from loraplex.ports import free_port

from .parts import Part, complete, gone, running

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "launch_tp.sh"

pytestmark = pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid is not installed")


@contextmanager
def launched(log: Path, *router_flags: str, model: str = str(MODEL_DIR)) -> Iterator[tuple[Part, str]]:
    """The script, and where its REST interface will be."""
    port = free_port()
    ports = ("--port", str(port), "--grpc-port", str(free_port()))
    settings = {
        "DEVICE": "cpu",
        "PYTHON": sys.executable,
        "SHARD_FLAGS": "--dtype float32 --kv-memory 32MiB",
    }
    command = [str(SCRIPT), model, "2", "--served-model-name", "base", *ports, *router_flags]
    with running(command, log, settings) as script:
        yield script, f"http://127.0.0.1:{port}"


def child(script: Part, *words: str) -> int:
    """Process id of the part with these words in its command line."""
    for pid in script.tree():
        line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if all(word.encode() in line for word in words) and b"bash" not in line[0]:
            return pid
    raise AssertionError(f"no {words} below the script:\n{script.text}")


def test_it_serves_and_a_killed_shard_ends_everything(tmp_path: Path) -> None:
    with launched(tmp_path / "log") as (script, url):
        assert complete(url, "base", script)
        for prefix in ("[shard 0] ", "[shard 1] ", "[router] "):
            assert prefix in script.text
        pids = script.tree()
        os.kill(child(script, "shard", "--rank", "1"), signal.SIGKILL)
        assert script.wait() == 128 + signal.SIGKILL
        assert gone(pids)
        assert "a shard ended (exit code 137)" in script.text


def test_sigterm_drains_and_leaves_nothing(tmp_path: Path) -> None:
    with launched(tmp_path / "log") as (script, url):
        assert complete(url, "base", script)
        pids = script.tree()
        assert script.stop() == 0
        assert gone(pids)
        assert "draining" in script.text


def test_a_killed_script_leaves_nothing(tmp_path: Path) -> None:
    with launched(tmp_path / "log") as (script, url):
        assert complete(url, "base", script)
        pids = script.tree()
        script.process.kill()
        assert gone(pids)


def test_a_model_that_is_refused_ends_it_with_the_shards_code(tmp_path: Path) -> None:
    with launched(tmp_path / "log", model=str(tmp_path / "nowhere")) as (script, _):
        assert script.wait() == 2
        assert "a shard ended before all were ready (exit code 2)" in script.text


def test_a_router_that_refuses_ends_it_with_its_code(tmp_path: Path) -> None:
    with launched(tmp_path / "log", "--drain-timeout", "soon") as (script, _):
        assert script.wait() == 2
        assert "'soon' is not a number of seconds" in script.text
        assert "the router ended (exit code 2)" in script.text


def test_it_says_how_it_is_used() -> None:
    told = subprocess.run([SCRIPT, "model"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr == "launch_tp: usage: launch_tp.sh MODEL TP [flags of loraplex router...]\n"
