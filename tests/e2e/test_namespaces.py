"""Two network namespaces as two machines: one group across both, and a group on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .parts import LORAPLEX, Part, running
from .server import Server

HOSTS = ("10.211.7.1", "10.211.7.2")
ASK = """
import json, sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
url, body = sys.argv[1], sys.argv[2].encode()
request = urllib.request.Request(url, body or None, {"Content-Type": "application/json"})
print(opener.open(request, timeout=30).read().decode())
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that reach each other at HOSTS."""
    names = (f"loraplex-a{os.getpid()}", f"loraplex-b{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
        link = f"lpx{os.getpid()}"
        ip(
            "link",
            "add",
            f"{link}a",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            f"{link}b",
            "netns",
            names[1],
        )
        for name, end, host in zip(names, "ab", HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{host}/24", "dev", f"{link}{end}")
            for device in (f"{link}{end}", "lo"):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove(names)
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield names
    remove(names)


def remove(names: tuple[str, str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def start(machines: tuple[str, str], tmp_path: Path) -> Iterator[Callable[..., Part]]:
    """Starts a part on one of the machines."""
    with ExitStack() as stack:

        def started(machine: int, *words: str) -> Part:
            log = tmp_path / f"{words[0]}{machine}.log"
            command = ("ip", "netns", "exec", machines[machine], *LORAPLEX, *words, "--plaintext", "on")
            return stack.enter_context(running(command, log))

        yield started


def ask(machine: str, path: str, body: object = None, *, part: Part) -> dict[str, object]:
    """What a server on this machine answers, which may still be starting."""
    words = ["ip", "netns", "exec", machine, sys.executable, "-c", ASK, f"http://127.0.0.1:8080{path}"]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [*words, "" if body is None else json.dumps(body)], check=False, capture_output=True, text=True
        )
        if done.returncode == 0:
            answer: dict[str, object] = json.loads(done.stdout)
            return answer
        assert part.process.poll() is None, part.text[-8000:]
        assert time.monotonic() < deadline, part.text[-8000:]
        time.sleep(0.2)


def text_of(answer: dict[str, object]) -> object:
    choices = answer["choices"]
    assert isinstance(choices, list)
    return choices[0]["text"]


def check(machine: str, router: Part, server: Server, times: int = 1) -> None:
    """It answers as a server on one machine does."""
    for model in ("base", "alpha") * times:
        fields = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
        expected = server.complete(model, [5, 6, 7], **fields)
        got = ask(machine, "/v1/completions", {"model": model, "prompt": [5, 6, 7], **fields}, part=router)
        assert text_of(got) == text_of(expected), model


def shard_words(model: Path, machine: int) -> list[str]:
    settings = ["--dtype", "float32", "--kv-memory", "32MiB", "--host", HOSTS[machine], "--port", "9100"]
    return ["shard", *settings, str(model)]


def router_words(two_adapters: dict[str, Path], *groups: str) -> list[str]:
    words = ["router", "--served-model-name", "base", "--grpc-port", "0"]
    words += [f"--adapter={name}={path}" for name, path in two_adapters.items()]
    return [*words, *(f"--group={group}" for group in groups)]


def test_one_group_across_both(
    machines: tuple[str, str],
    start: Callable[..., Part],
    tiny_model: Callable[[str], Path],
    two_adapters: dict[str, Path],
    server: Server,
) -> None:
    for rank in (0, 1):
        place = ["--rank", str(rank), "--world-size", "2", "--master", f"{HOSTS[0]}:9099"]
        start(rank, *shard_words(tiny_model("llama"), rank)[:-1], *place, str(tiny_model("llama")))
    router = start(0, *router_words(two_adapters, f"{HOSTS[0]}:9100,{HOSTS[1]}:9100"))
    check(machines[0], router, server)
    info = ask(machines[0], "/info", part=router)
    assert [group["tp"] for group in info["groups"]] == [2]  # type: ignore[attr-defined]


def test_a_group_on_each(
    machines: tuple[str, str],
    start: Callable[..., Part],
    tiny_model: Callable[[str], Path],
    two_adapters: dict[str, Path],
    server: Server,
) -> None:
    shards = [start(machine, *shard_words(tiny_model("llama"), machine)) for machine in (0, 1)]
    router = start(1, *router_words(two_adapters, *(f"{host}:9100" for host in HOSTS)))
    check(machines[1], router, server)
    shards[0].process.kill()
    check(machines[1], router, server, times=2)
    info = ask(machines[1], "/info", part=router)
    assert [group["ready"] for group in info["groups"]] == [False, True]  # type: ignore[attr-defined]
