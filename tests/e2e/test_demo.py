"""The bundled model: what the demo shows, and how often its adapters are right."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from loraplex.demo import ADAPTERS, MODEL_DIR
from loraplex.demo.tasks import TASKS, Example, render

from .server import ONE_THREAD, Server, serving
from .streams import client

HELD_OUT = 200


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [str(MODEL_DIR), "--served-model-name", "base"]
    for name, path in ADAPTERS.items():
        arguments += ["--adapter", f"{name}={path}"]
    with serving(arguments, tmp_path_factory.mktemp("bundled") / "log") as server:
        yield server


async def outputs(server: Server, asked: list[tuple[str, Example]]) -> list[str]:
    """Every (model, example) at once; answers in their order."""

    async def ask(session: aiohttp.ClientSession, model: str, example: Example) -> str:
        body = {"model": model, "prompt": render(example.prompt), "max_tokens": 64, "temperature": 0}
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            assert response.status == 200
            return str((await response.json())["choices"][0]["text"])

    async with client() as session:
        return await asyncio.gather(*(ask(session, *question) for question in asked))


async def test_every_adapter_is_right_and_the_base_is_not(bundled: Server) -> None:
    """Two hundred held-out prompts an adapter, all adapters and the base in mixed batches."""
    examples = {name: task.held_out(HELD_OUT) for name, task in TASKS.items()}
    turns = [(name, index) for index in range(HELD_OUT) for name in TASKS]
    for models in ({name: name for name in TASKS}, dict.fromkeys(TASKS, "base")):
        right = dict.fromkeys(TASKS, 0)
        for first in range(0, len(turns), 400):
            part = turns[first : first + 400]
            texts = await outputs(bundled, [(models[name], examples[name][index]) for name, index in part])
            for (name, index), text in zip(part, texts, strict=True):
                right[name] += TASKS[name].is_right(examples[name][index], text)
        shares = {name: count / HELD_OUT for name, count in right.items()}
        if "base" in models.values():
            assert max(shares.values()) <= 0.05, shares
        else:
            assert min(shares.values()) >= 0.95, shares
    assert bundled.metrics()["loraplex_step_adapters_max"] == len(ADAPTERS)


async def test_chat_answers_as_completions_do(bundled: Server) -> None:
    """The chat template renders one user message to the format that the adapters know."""
    for name, task in TASKS.items():
        [example] = task.held_out(1, seed=5)
        messages = [{"role": "user", "content": example.prompt}]
        body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 64}
        answer = await asyncio.to_thread(bundled.post, "/v1/chat/completions", body)
        [text] = await outputs(bundled, [(name, example)])
        assert answer["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("prompt", [None, "the ship is quick"])
def test_the_demo_ends_with_the_adapters_of_one_step(prompt: str | None, tmp_path: Path) -> None:
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    own = ["--prompt", prompt] if prompt else []
    done = subprocess.run(
        [sys.executable, "-P", "-m", "loraplex", "demo", *own],
        cwd=tmp_path,
        env=dict(os.environ) | ONE_THREAD | proxies,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = re.fullmatch(r"adapters in one step: (\d+)", done.stdout.splitlines()[-1])
    assert last
    assert int(last[1]) >= 4
    rows = done.stdout.splitlines()[2:-1]
    assert {row.split()[0] for row in rows} == {"base", *ADAPTERS}
    if prompt:
        assert any("kciuq si pihs eht" in row for row in rows)
    else:
        for name, task in TASKS.items():
            assert any(row.startswith(name) and task.answer(task.demo_prompts[0]) in row for row in rows), (
                name
            )
