"""Adapters that come from a hub because a request names them, and what they do not disturb."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ..fakes.hub import FakeHub
from ..tiny import AdapterRecipe, build_adapter
from .server import Refused, Server, serving
from .streams import client, stream_all, stream_one

WEIGHTS = "adapter_model.safetensors"
MANY = 40
ROOM = 8
PROMPT = list(range(60, 80))


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def adapters(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        f"org/a{index}": build_adapter(
            tiny_model("llama"), root / str(index), AdapterRecipe(1 + index % 8), seed=index
        )
        for index in range(MANY)
    }


@pytest.fixture(scope="module")
def server(
    tiny_model: Callable[[str], Path], hub: FakeHub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Room for eight adapters on the device, and for twelve in host memory."""
    root = tmp_path_factory.mktemp("hub")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "cache"), "HF_HUB_DISABLE_XET": "1"}
    arguments = [str(tiny_model("llama")), "--served-model-name", "base", "--dtype", "float32"]
    arguments += ["--max-adapters", str(ROOM), "--kv-memory", "64MiB", "--host-adapter-memory", "400KiB"]
    with serving(arguments, root / "log", env=environment) as server:
        yield server


def greedy(base: Path, adapter: Path, tokens: int) -> str:
    """PEFT's text for the prompt; the tiny tokenizer's ids below 256 are bytes."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = torch.tensor([PROMPT])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return json.dumps(out[0, len(PROMPT) :].tolist())


def ask(server: Server, model: str, **fields: Any) -> str:
    fields = {"ignore_eos": True, "return_token_ids": True} | fields
    return json.dumps(server.complete(model, PROMPT, **fields)["choices"][0]["token_ids"])


def failure(server: Server, model: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(Refused) as caught:
        ask(server, model)
    return caught.value.status, caught.value.body["error"]


def test_a_repository_is_fetched_verified_and_served(
    server: Server, hub: FakeHub, adapters: Mapping[str, Path], tiny_model: Callable[[str], Path]
) -> None:
    hub.add("org/first", adapters["org/a0"])
    assert ask(server, "org/first") == greedy(tiny_model("llama"), adapters["org/a0"], 8)
    assert ask(server, "org/first") != ask(server, "base")
    assert hub.count(WEIGHTS) == 1


def test_a_corrupted_file_and_a_503_are_mended_by_fetching_again(
    server: Server, hub: FakeHub, adapters: Mapping[str, Path], tiny_model: Callable[[str], Path]
) -> None:
    hub.add("org/corrupt", adapters["org/a1"])
    hub.break_(f"org/corrupt/resolve/{hub.add('org/corrupt', adapters['org/a1'])}/{WEIGHTS}", corrupt=True)
    assert ask(server, "org/corrupt") == greedy(tiny_model("llama"), adapters["org/a1"], 8)
    commit = hub.add("org/busy", adapters["org/a2"])
    hub.break_(f"org/busy/resolve/{commit}/{WEIGHTS}", 2, status=503)
    assert ask(server, "org/busy") == greedy(tiny_model("llama"), adapters["org/a2"], 8)


def test_failures_name_the_adapter_and_the_base_never_answers(
    server: Server, hub: FakeHub, adapters: Mapping[str, Path]
) -> None:
    code, error = failure(server, "org/nowhere")
    assert (code, error["code"]) == (404, "model_not_found")
    assert "org/nowhere" in error["message"]
    commit = hub.add("org/always-corrupt", adapters["org/a3"])
    hub.break_(f"org/always-corrupt/resolve/{commit}/{WEIGHTS}", 99, corrupt=True)
    code, error = failure(server, "org/always-corrupt")
    assert (code, error["code"]) == (502, "adapter_fetch_failed")
    assert "org/always-corrupt" in error["message"]
    files = {path.name: path.read_bytes() for path in adapters["org/a4"].iterdir()}
    hub.add("org/torn", files | {WEIGHTS: files[WEIGHTS][:-100]})
    code, error = failure(server, "org/torn")
    assert (code, error["code"]) == (422, "adapter_rejected")
    fetched = hub.count(WEIGHTS)
    assert failure(server, "org/torn")[0] == 422
    assert hub.count(WEIGHTS) == fetched, "a failure is remembered"
    assert ask(server, "base")


async def test_a_slow_fetch_holds_up_nobody_and_is_made_once(
    server: Server, hub: FakeHub, adapters: Mapping[str, Path]
) -> None:
    """Five seconds for one adapter that a hundred requests name, beside streams that run. Prints their
    longest pause. Other tests run beside this one: a pause that the fetch makes would be in every try."""
    for number in range(3):
        longest = await longest_pause_beside_a_slow_fetch(
            server, hub, adapters["org/a5"], f"org/slow{number}"
        )
        print(f"longest pause of a stream: {1e3 * longest:.0f} ms")
        if longest <= 0.25:
            return
    pytest.fail("streams paused for more than 250 ms in each of three tries")


async def longest_pause_beside_a_slow_fetch(server: Server, hub: FakeHub, adapter: Path, name: str) -> float:
    """Seconds between two tokens of a stream, at most."""
    commit = hub.add(name, adapter)
    path = f"{name}/resolve/{commit}/{WEIGHTS}"
    hub.break_(path, seconds=5.0)
    running = asyncio.Event()
    pauses: list[float] = []

    async def keep_streaming() -> None:
        body = {"model": "base", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        async with client() as session:
            while not running.is_set():
                stream = await stream_one(session, server.url, body)
                assert stream.done
                pauses.append(stream.longest_pause)

    others = [asyncio.create_task(keep_streaming()) for _ in range(4)]
    await asyncio.sleep(0.2)
    body = {"model": name, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
    streams = await stream_all(server.url, [body] * 100)
    running.set()
    await asyncio.gather(*others)
    assert all(stream.done and stream.error is None for stream in streams)
    assert len({stream.text for stream in streams}) == 1
    assert hub.count(path) == 1
    assert len(pauses) >= 4
    return max(pauses)


async def test_forty_adapters_in_room_for_eight_equal_peft(
    server: Server, hub: FakeHub, adapters: Mapping[str, Path], tiny_model: Callable[[str], Path]
) -> None:
    for name, path in adapters.items():
        hub.add(name, path)
    expected = {name: greedy(tiny_model("llama"), path, 6) for name, path in adapters.items()}
    before = server.metrics()["loraplex_adapter_evictions_total"]
    for _ in range(2):
        answers = await asyncio.gather(
            *(asyncio.to_thread(ask, server, name, max_tokens=6) for name in adapters)
        )
        assert dict(zip(adapters, answers, strict=True)) == expected
    metrics = server.metrics()
    assert metrics["loraplex_adapter_slots_used"] <= ROOM
    assert metrics["loraplex_adapter_evictions_total"] - before >= MANY


async def test_decode_goes_on_between_the_chunks_of_a_long_prompt(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """A prompt of many chunks is answered while another stream keeps its pace."""
    arguments = [str(tiny_model("llama")), "--served-model-name", "base", "--max-step-tokens", "16"]
    with serving(arguments, tmp_path / "log") as server:
        short = {"model": "base", "prompt": PROMPT[:4], "max_tokens": 300, "ignore_eos": True}
        long = {"model": "base", "prompt": list(range(250)) + [1] * 150, "max_tokens": 1, "ignore_eos": True}
        async with client() as session:
            task = asyncio.create_task(stream_one(session, server.url, short))
            await asyncio.sleep(0.1)
            began = asyncio.get_running_loop().time()
            answer = await stream_one(session, server.url, long)
            ended = asyncio.get_running_loop().time()
            stream = await task
        assert answer.done
        between = [moment for moment in stream.arrivals if began < moment < ended]
        assert len(between) >= 8, "the long prompt takes more than twenty-four steps"
