"""What the router costs: streams over a shard whose step takes a fixed time.

Three processes: a real shard with a timed model, the router, and a client that reads raw sockets.
Prints how much of the ideal rate (one token for each stream and step) arrives, the router's processor
time per token, and how long the shard idled between steps.

    python -m bench.router_cost --streams 64 --tokens 1000 --step-ms 4
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from loraplex.ports import free_port
from loraplex.router.config import RouterConfig
from loraplex.router.main import run as run_router

WARM_UP_TOKENS = 200


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def metrics(port: int) -> dict[str, float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


async def stream(port: int, tokens: int) -> int:
    """One completion over a raw socket; answers how many chunks of text came."""
    fields = {"model": "null", "prompt": "hello", "max_tokens": tokens, "temperature": 0}
    body = json.dumps(fields | {"stream": True, "ignore_eos": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    letters, data = 0, b""
    while data := await reader.read(1 << 16):
        letters += data.count(b'"text":"') - data.count(b'"text":""')
    writer.close()
    return letters


def client(port: int, streams: int, tokens: int) -> None:
    """Run all streams at once; every one must be complete."""

    async def all_streams() -> list[int]:
        return await asyncio.gather(*(stream(port, tokens) for _ in range(streams)))

    counts = asyncio.run(all_streams())
    if any(count == 0 for count in counts):
        raise SystemExit("a stream brought nothing")


def in_another_process(port: int, streams: int, tokens: int) -> float:
    """Wall seconds of the client."""
    worker = multiprocessing.get_context("spawn").Process(target=client, args=(port, streams, tokens))
    began = time.perf_counter()
    worker.start()
    worker.join()
    if worker.exitcode != 0:
        raise SystemExit("the client failed")
    return time.perf_counter() - began


def wait_ready(port: int) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        try:
            with opener.open(f"http://127.0.0.1:{port}/health/ready", timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the router did not become ready")


def measure(port: int, router_pid: int, streams: int, tokens: int, step_ms: float) -> dict[str, float]:
    in_another_process(port, streams, WARM_UP_TOKENS)
    before, cpu_before = metrics(port), processor_seconds(router_pid)
    in_another_process(port, streams, tokens)
    cpu, after = processor_seconds(router_pid) - cpu_before, metrics(port)

    def grown(name: str) -> float:
        return after[f"loraplex_{name}_total"] - before[f"loraplex_{name}_total"]

    produced = grown("generated_tokens")
    busy = grown("busy_seconds")
    return {
        "streams": streams,
        "tokens": produced,
        "tokens_per_second": produced / busy,
        "share_of_ideal": produced / busy / (streams / (step_ms / 1000)),
        "router_us_per_token": cpu / produced * 1e6,
        "shard_idle_share": grown("idle_seconds") / busy,
        "step_ms": 1000 * busy / grown("steps"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--step-ms", type=float, default=4.0)
    arguments = parser.parse_args()
    shard_port, port = free_port(), free_port()
    shard = subprocess.Popen(
        [sys.executable, "-m", "bench.null_shard", f"--port={shard_port}", f"--step-ms={arguments.step_ms}"]
    )
    config = RouterConfig(
        served_model_name="null", groups=((f"127.0.0.1:{shard_port}",),), port=port, grpc_port=free_port()
    )
    router = multiprocessing.get_context("spawn").Process(target=run_router, args=(config,))
    router.start()
    try:
        wait_ready(port)
        assert router.pid is not None
        result = measure(port, router.pid, arguments.streams, arguments.tokens, arguments.step_ms)
        print(json.dumps({name: round(value, 4) for name, value in result.items()}, indent=2))
    finally:
        router.terminate()
        router.join()
        shard.terminate()
        shard.wait()


if __name__ == "__main__":
    main()
