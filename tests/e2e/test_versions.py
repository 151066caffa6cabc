"""One name, new bytes: under traffic no request ever mixes two versions of an adapter."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..fakes.polling import until
from ..tiny import AdapterRecipe, build_adapter
from .server import Refused, Server
from .streams import client, stream_one

PROMPT = [70, 80, 90, 100, 110]
TOKENS = 40


def body(prompt: int, tokens: int = TOKENS) -> dict[str, Any]:
    fixed = {"model": "moving", "prompt": [*PROMPT, prompt], "temperature": 0, "ignore_eos": True}
    return fixed | {"max_tokens": tokens}


def answers(server: Server, count: int) -> list[str]:
    """What the version that is served now says to each prompt."""
    return [server.post("/v1/completions", body(i))["choices"][0]["text"] for i in range(count)]


def put(server: Server, version: Path, name: Path) -> Any:
    """Let the name's directory hold another version's bytes, and load it again."""
    shutil.copytree(version, name, dirs_exist_ok=True)
    return server.post("/v1/load_lora_adapter", {"lora_name": "moving", "lora_path": str(name)})


async def test_new_bytes_under_one_name_never_mix(
    server: Server, two_adapters: dict[str, Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    versions = [
        build_adapter(tiny_model("llama"), tmp_path / f"v{seed}", AdapterRecipe(4), seed=100 + seed)
        for seed in range(2)
    ]
    name = two_adapters["alpha"].parent / "moving"
    prompts, expected, digests = 6, [], []
    for version in versions:
        put(server, version, name)
        expected.append(answers(server, prompts))
        digests.append(server.get("/v1/adapters/moving")["digest"])
    assert digests[0] != digests[1]
    assert all(old != new for old, new in zip(*expected, strict=True))
    loaded = server.metrics()["loraplex_adapter_loads_total"]

    async with client() as session:
        stop = asyncio.Event()

        async def traffic(prompt: int) -> list[str]:
            texts = []
            while not stop.is_set():
                stream = await stream_one(session, server.url, body(prompt))
                assert stream.done, stream.error
                texts.append(stream.text)
            return texts

        running = [asyncio.create_task(traffic(prompt)) for prompt in range(prompts)]
        for turn in range(6):
            await asyncio.to_thread(put, server, versions[turn % 2], name)
            fresh = await stream_one(session, server.url, body(0))
            assert fresh.text == expected[turn % 2][0], "who asks after the load gets what was loaded"
        stop.set()
        for prompt, texts in enumerate(await asyncio.gather(*running)):
            allowed = {expected[0][prompt], expected[1][prompt]}
            assert texts
            assert set(texts) <= allowed
    assert server.metrics()["loraplex_adapter_loads_total"] >= loaded + 5
    await _unload_under_traffic(server, expected[1])


async def _unload_under_traffic(server: Server, expected: list[str]) -> None:
    """Streams that run finish; new requests are refused; the name does not come back by itself."""
    async with client() as session:
        running = asyncio.create_task(stream_one(session, server.url, body(1, 200)))
        await until(lambda: server.get("/v1/adapters/moving")["running"])
        await asyncio.to_thread(server.post, "/v1/unload_lora_adapter", {"lora_name": "moving"})
        stream = await running
    assert stream.done
    assert stream.text.startswith(expected[1])
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            answers(server, 1)
        assert refused.value.status == 404
