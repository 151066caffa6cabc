"""Two hundred streams over seventeen models: complete, equal to solo runs, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from loraplex.shard.kv import LayerShape, block_bytes

from ..tiny import AdapterRecipe, build_adapter
from .server import Server, open_files, serving
from .streams import Streamed, stream_all

STREAMS, TOKENS, PROMPT_TOKENS = 200, 40, 20
MODELS = ["base", *(f"adapter{index}" for index in range(16))]
RANKS = (1, 3, 8, 16)
BASELINE = (
    "loraplex_kv_blocks_used",
    "loraplex_rows_used",
    "loraplex_requests_running",
    "loraplex_requests_waiting",
    "loraplex_adapter_references",
    "loraplex_steps_in_flight",
)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a model and its sixteen adapters."""
    root = tmp_path_factory.mktemp("streams")
    base = tiny_model("llama")
    arguments = [str(base), "--served-model-name", "base", "--dtype", "float32"]
    for index, name in enumerate(MODELS[1:]):
        path = build_adapter(base, root / name, AdapterRecipe(RANKS[index % len(RANKS)]), seed=index)
        arguments += ["--adapter", f"{name}={path}"]
    return arguments


def bodies() -> list[dict[str, Any]]:
    """Seventeen models in turn, four prompts each, greedy and sampled."""
    dice = random.Random(3)
    prompts = [[dice.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(4)]
    return [
        {
            "model": MODELS[index % len(MODELS)],
            "prompt": prompts[index // len(MODELS) % len(prompts)],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": 0.8 if index % len(MODELS) % 3 == 0 else 0.0,
            "seed": index % len(MODELS),
        }
        for index in range(STREAMS)
    ]


def check(streams: list[Streamed], expected: dict[str, str], asked: list[dict[str, Any]]) -> None:
    for body, stream in zip(asked, streams, strict=True):
        assert stream.error is None
        assert stream.done
        assert stream.finish == "length"
        assert stream.text == expected[str(body)], body["model"]


async def solo_runs(server: Server) -> dict[str, str]:
    """Each distinct request alone on the server."""
    texts: dict[str, str] = {}
    for body in bodies():
        if str(body) not in texts:
            [stream] = await stream_all(server.url, [body])
            texts[str(body)] = stream.text
    return texts


def at_rest(server: Server) -> dict[str, float]:
    """What must be back at its baseline once nothing runs. Waits, for a while, until it stays the same:
    a connection takes a moment to close."""
    deadline = time.monotonic() + 5
    before: dict[str, float] = {}
    while (found := _holdings(server)) != before or any(found[name] for name in BASELINE):
        if time.monotonic() > deadline:
            break
        before = found
        time.sleep(0.25)
    return found


def _holdings(server: Server) -> dict[str, float]:
    metrics = server.metrics()
    time.sleep(0.1)  # the connection of this very request takes a moment to close
    found = {name: metrics[name] for name in (*BASELINE, "loraplex_adapter_slots_used", "loraplex_tasks")}
    found["processes"] = len(server.tree())
    for role in ("router", "shard"):
        found[f"{role} files"] = open_files(server.find(role))
    return found


@pytest.fixture(scope="module")
def roomy(checkpoint: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("roomy") / "log"
    with serving([*checkpoint, "--kv-memory", "128MiB"], log) as server:
        yield server


@pytest.fixture(scope="module")
def tight(checkpoint: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Room in the KV cache for forty streams."""
    blocks = 40 * -(-(PROMPT_TOKENS + TOKENS) // 16) + 1
    size = block_bytes(dict.fromkeys(range(3), LayerShape(2, 16, 16)), 16, torch.float32)
    log = tmp_path_factory.mktemp("tight") / "log"
    with serving([*checkpoint, "--kv-memory", str(blocks * size)], log) as server:
        yield server


@pytest.fixture(scope="module")
def expected(roomy: Server) -> dict[str, str]:
    return asyncio.run(solo_runs(roomy))


async def test_two_hundred_streams_equal_their_solo_runs(roomy: Server, expected: dict[str, str]) -> None:
    asked = bodies()
    assert len(set(expected.values())) > 60
    check(await stream_all(roomy.url, asked), expected, asked)
    rest, before = await asyncio.to_thread(at_rest, roomy), roomy.metrics()
    check(await stream_all(roomy.url, asked), expected, asked)
    after = roomy.metrics()
    steps = after["loraplex_decode_steps_total"] - before["loraplex_decode_steps_total"]
    rows = after["loraplex_decode_rows_total"] - before["loraplex_decode_rows_total"]
    assert rows / steps >= 64
    assert after["loraplex_step_adapters_max"] == 16
    assert await asyncio.to_thread(at_rest, roomy) == rest


async def test_preempted_streams_equal_their_solo_runs(tight: Server, expected: dict[str, str]) -> None:
    asked = bodies()
    check(await stream_all(tight.url, asked), expected, asked)
    rest, before = await asyncio.to_thread(at_rest, tight), tight.metrics()
    check(await stream_all(tight.url, asked), expected, asked)
    after = tight.metrics()
    assert after["loraplex_preemptions_total"] > before["loraplex_preemptions_total"]
    assert await asyncio.to_thread(at_rest, tight) == rest


async def test_streams_that_are_left_free_what_they_held(roomy: Server) -> None:
    """Half of the clients close their connection in the middle."""
    asked = bodies()[:60]

    async def leave(body: dict[str, Any]) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{roomy.url}/v1/completions", json=body | {"stream": True}) as response,
        ):
            await response.content.readline()
            response.close()

    async def stay_and_leave() -> dict[str, float]:
        streams, *_ = await asyncio.gather(
            stream_all(roomy.url, asked[::2]), *(leave(body | {"max_tokens": 400}) for body in asked[1::2])
        )
        assert all(stream.done for stream in streams)
        return await asyncio.to_thread(at_rest, roomy)

    rest = await stay_and_leave()
    assert await stay_and_leave() == rest
