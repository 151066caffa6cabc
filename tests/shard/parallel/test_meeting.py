"""Ranks that do not find each other: real processes, little patience."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from loraplex.ports import free_port
from loraplex.shard.errors import RanksLost
from loraplex.shard.parallel.meeting import Meeting, StoreBoard, meet

EXIT_FATAL = 3
SECONDS = 90.0
"""Most that a process may take to give up. Its patience is 2."""


@contextmanager
def port_of_nobody() -> Iterator[int]:
    """Bound, so that nobody else gets it, but not listened at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def lone_rank(model: Path, rank: int, port: int) -> tuple[int, list[str]]:
    """Exit code and last lines of one of two ranks whose other one never comes."""
    command = [sys.executable, "-P", "-m", "loraplex", "shard", str(model), "--device", "cpu"]
    place = f"--rank {rank} --world-size 2 --master 127.0.0.1:{port} --rank-patience 2".split()
    ended = subprocess.run([*command, *place], capture_output=True, text=True, timeout=SECONDS, check=False)
    return ended.returncode, ended.stderr.splitlines()


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def test_rank_0_says_that_its_port_is_taken(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, lines = lone_rank(model, 0, port)
    assert code == EXIT_FATAL
    want = f"loraplex shard: rank 0 cannot listen for the others at 127.0.0.1:{port}: Address already in use"
    assert lines == [want]


def test_rank_0_does_not_wait_for_ever(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, lines = lone_rank(model, 0, port)
    assert code == EXIT_FATAL
    [line] = lines
    assert line.startswith(f"loraplex shard: rank 0 of 2 did not meet the others at 127.0.0.1:{port}")


def test_another_rank_does_not_wait_for_ever_either(model: Path) -> None:
    with port_of_nobody() as port:
        code, lines = lone_rank(model, 1, port)
    assert code == EXIT_FATAL
    found_nobody = f"rank 1 of 2 found nobody at 127.0.0.1:{port} within 2 s: Connection refused"
    assert lines == [f"loraplex shard: {found_nobody}"]


def test_ranks_of_one_machine_meet_where_no_other_machine_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is left to itself listens on every address."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with port_of_nobody() as port:
        pass
    at = Meeting(rank=0, size=2, master=f"127.0.0.1:{port}", patience=1.0, facts={})
    listening: list[str] = []

    def look() -> None:
        until_listening(port)
        listening.extend(address for address, at_port in listeners() if at_port == port)

    looker = threading.Thread(target=look)
    looker.start()
    with pytest.raises(RanksLost, match="did not meet"):
        meet(at, torch.device("cpu"))
    looker.join()
    assert listening == ["0100007F"]


def test_what_one_rank_posts_another_reads() -> None:
    store = TCPStore("127.0.0.1", free_port(), is_master=True, timeout=timedelta(seconds=0.3))
    others = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=0.3))
    mine, theirs = StoreBoard(store, 0), StoreBoard(others, 1)
    mine.post("key", bytes(range(256)))
    assert theirs.read("key") == bytes(range(256))
    mine.remove("key")
    with pytest.raises(RanksLost, match="rank 1 does not get key: "):
        theirs.read("key")


def listeners() -> list[tuple[str, int]]:
    """Address in hexadecimal, as the kernel writes it, and port of every listening socket."""
    lines = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    own = [words[1].split(":") for words in lines if words[3] == "0A"]
    return [(address, int(port, 16)) for address, port in own]


def until_listening(port: int) -> None:
    deadline = time.monotonic() + 30
    while all(port != other for _, other in listeners()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
