"""How long a group of ranks is away when one of its ranks goes.

`loraplex serve` with two ranks, under a load of decode steps, of prompts or of adapter loads; one rank is
killed or stopped. Prints the seconds until the router has noticed and until a new request has been answered.

    python -m bench.group_recovery
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from loraplex.child import loraplex_command
from loraplex.demo import ADAPTERS, MODEL_DIR
from loraplex.ports import free_port

from .errors import BenchFailed
from .server import Launch, running

STEP = 0.02
"""Seconds between two looks."""
LATEST = 120.0
"""Seconds after which a rank that went counts as not noticed, or its group as lost."""

SHARED = Path(tempfile.gettempdir()).resolve()
"""Where requests may name adapters."""

Body = dict[str, Any]
Load = Callable[[str], Iterator[Body]]


def completion(model: str, prompt: int, tokens: int) -> Body:
    body = {
        "model": model,
        "prompt": [7] * prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return body | {"stream": True}


def decoding(_: str) -> Iterator[Body]:
    return itertools.repeat(completion(next(iter(ADAPTERS)), 8, 400))


def prefilling(_: str) -> Iterator[Body]:
    return itertools.repeat(completion(next(iter(ADAPTERS)), 480, 1))


def loading(folder: str) -> Iterator[Body]:
    """Every request names an adapter that nobody has named before."""
    for number in itertools.count():
        copy = Path(folder, f"copy{number}")
        shutil.copytree(next(iter(ADAPTERS.values())), copy)
        yield completion(str(copy), 8, 4)


LOADS: dict[str, Load] = {"decode": decoding, "prompts": prefilling, "adapter loads": loading}
AT_ONCE = {"decode": 4, "prompts": 16, "adapter loads": 2}
"""Streams of each load."""


async def answered(session: aiohttp.ClientSession, url: str, body: Body) -> bool:
    """Whether a request gets its whole answer."""
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            return response.status == 200 and b"[DONE]" in await response.read()
    except aiohttp.ClientError:
        return False


async def stream_on(session: aiohttp.ClientSession, url: str, bodies: Iterator[Body]) -> None:
    """One request after another, until cancelled; what becomes of them is the tests' business."""
    for body in bodies:
        if not await answered(session, url, body):
            await asyncio.sleep(0.2)


async def groups_lost(session: aiohttp.ClientSession, url: str) -> float:
    async with session.get(f"{url}/metrics") as response:
        for line in (await response.text()).splitlines():
            name, _, value = line.rpartition(" ")
            if name == "loraplex_shard_groups_lost_total":
                return float(value)
    raise BenchFailed("the router does not count lost groups")


async def seconds_until(condition: Callable[[], Any]) -> float:
    began = time.monotonic()
    while not await condition():
        if time.monotonic() - began > LATEST:
            raise BenchFailed(f"not within {LATEST:.0f} s")
        await asyncio.sleep(STEP)
    return time.monotonic() - began


def pid_of_rank(server: int, rank: int) -> int:
    """Of the rank below this server's launcher."""
    for children in Path(f"/proc/{server}/task").glob("*/children"):
        for pid in children.read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            told = [word.partition("=")[2] for word in words if word.startswith("--rank=")] or ["0"]
            if "shard" in words and told == [str(rank)]:
                return int(pid)
    raise BenchFailed(f"no rank {rank} below {server}")


async def lose(url: str, server: int, load: str, rank: int, number: signal.Signals) -> tuple[float, float]:
    """Seconds until the loss is noticed, and from there until a request is answered again."""
    timeout = aiohttp.ClientTimeout(total=LATEST)
    with tempfile.TemporaryDirectory(prefix="copies-", dir=SHARED) as folder:
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            bodies = LOADS[load](folder)
            if not await answered(session, url, next(bodies)):
                raise BenchFailed(f"{load}: a request was not answered in full while nothing was wrong")
            tasks = [asyncio.create_task(stream_on(session, url, bodies)) for _ in range(AT_ONCE[load])]
            await asyncio.sleep(1.0)
            os.kill(pid_of_rank(server, rank), number)

            async def noticed() -> bool:
                return await groups_lost(session, url) > 0

            async def again() -> bool:
                return await answered(session, url, completion("base", 3, 1))

            detected = await seconds_until(noticed)
            for task in tasks:
                task.cancel()
            return detected, await seconds_until(again)


def measure() -> list[dict[str, Any]]:
    """One server for each loss, so that none waits for the pause after several. Raises BenchFailed."""
    rows = []
    print(f"{'load':14} rank signal   noticed, s   back after, s")
    for load, rank, number in itertools.product(LOADS, (0, 1), (signal.SIGKILL, signal.SIGSTOP)):
        port = free_port()
        settings = ["--served-model-name=base", "--tp=2", "--drain-timeout=1"]
        settings += [f"--port={port}", "--grpc-port=0"]
        settings += [f"--adapter={name}={path}" for name, path in ADAPTERS.items()]
        settings += [f"--adapter-root={SHARED}"]
        launch = Launch(loraplex_command("serve", *settings, str(MODEL_DIR)), "/health/ready")
        with tempfile.TemporaryDirectory() as logs, running(launch, port, Path(logs) / "log") as server:
            noticed, back = asyncio.run(lose(server.url, server.pid, load, rank, number))
        rows.append({"load": load, "rank": rank, "signal": number.name, "noticed_s": noticed, "back_s": back})
        print(f"{load:14} {rank:4} {number.name:8} {noticed:10.2f}   {back:13.2f}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="Write the figures there too.")
    options = parser.parse_args()
    try:
        rows = measure()
    except BenchFailed as error:
        print(f"group_recovery: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
