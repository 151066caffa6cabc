"""Two copies of the model behind one router, as real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .server import Server, alive, serving
from .streams import client, stream_all, stream_one

MODELS = ("base", "alpha", "beta")
TOKENS = 40


@pytest.fixture(scope="module")
def server(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("replicas") / "log"
    with serving([*arguments, "--replicas", "2"], log) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, str]:
    """What each model answers on its own."""
    texts = {
        model: server.complete(model, [5, 6, 7], max_tokens=TOKENS, ignore_eos=True)["choices"][0]["text"]
        for model in MODELS
    }
    assert len({*texts.values()}) == 3
    return texts


def body(model: str, tokens: int = TOKENS) -> dict[str, Any]:
    return {"model": model, "prompt": [5, 6, 7], "ignore_eos": True, "temperature": 0, "max_tokens": tokens}


def admissions(server: Server) -> list[float]:
    values = server.metrics()
    return [values.get(f'loraplex_group_admissions_total{{group="{index}"}}', 0.0) for index in range(2)]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def ready(server: Server) -> list[bool]:
    return [group["ready"] for group in server.get("/info")["groups"]]


def test_both_groups_are_told_and_labelled(server: Server) -> None:
    groups = server.get("/info")["groups"]
    assert [(group["tp"], group["ready"]) for group in groups] == [(1, True), (1, True)]
    assert all(len(group["weight_bytes"]) == 1 and group["weight_bytes"][0] > 0 for group in groups)
    assert server.metrics()["loraplex_shard_groups_ready"] == 2
    log = server.log.read_text()
    assert "[group 0 shard 0]" in log
    assert "[group 1 shard 0]" in log
    assert len(server.find_all("shard")) == 2


async def test_concurrent_requests_are_answered_right_by_both_groups(
    server: Server, expected: dict[str, str]
) -> None:
    before = admissions(server)
    models = [MODELS[index % 3] for index in range(48)]
    streams = await stream_all(server.url, [body(model) for model in models])
    for model, stream in zip(models, streams, strict=True):
        assert stream.done
        assert stream.text == expected[model]
    assert all(now - then >= 8 for now, then in zip(admissions(server), before, strict=True))


async def test_a_killed_group_leaves_the_other_serving_and_comes_back(
    server: Server, expected: dict[str, str]
) -> None:
    shards = server.find_all("shard")
    async with client() as session:
        running = [
            asyncio.create_task(stream_one(session, server.url, body(MODELS[index % 3], 400)))
            for index in range(12)
        ]
        await asyncio.to_thread(server.generate, 100)
        os.kill(shards[0], signal.SIGKILL)
        await asyncio.to_thread(until, lambda: sorted(ready(server)) == [False, True])
        assert server.status("/health/ready") == 200
        assert server.metrics()["loraplex_shard_groups_ready"] == 1
        later = [
            asyncio.create_task(stream_one(session, server.url, body(MODELS[index % 3])))
            for index in range(12)
        ]
        streams = await asyncio.gather(*running)
        lost = [stream for stream in streams if stream.error]
        assert all(stream.error["code"] == "shard_lost" for stream in lost)
        assert 0 < len(lost) < 12
        for index, stream in enumerate(streams):
            assert stream.text.startswith(expected[MODELS[index % 3]]) or stream.error
        for index, stream in enumerate(await asyncio.wait_for(asyncio.gather(*later), 60)):
            assert stream.text == expected[MODELS[index % 3]]
    await asyncio.to_thread(until, lambda: ready(server) == [True, True])
    assert server.metrics()["loraplex_shard_groups_lost_total"] == 1
    assert shards[0] not in server.find_all("shard")
    before = admissions(server)
    streams = await stream_all(server.url, [body(MODELS[index % 3]) for index in range(48)])
    assert [stream.text for stream in streams] == [expected[MODELS[index % 3]] for index in range(48)]
    assert all(now > then for now, then in zip(admissions(server), before, strict=True))


async def test_a_group_that_is_told_to_stop_finishes_its_requests(
    server: Server, expected: dict[str, str]
) -> None:
    """A rolling restart: nobody but a log reader notices."""
    shards = server.find_all("shard")
    lost = server.metrics()["loraplex_shard_groups_lost_total"]
    models = [MODELS[index % 3] for index in range(24)]
    running = asyncio.create_task(stream_all(server.url, [body(model, 200) for model in models]))
    await asyncio.to_thread(server.generate, 1)
    os.kill(shards[0], signal.SIGTERM)
    for model, stream in zip(models, await running, strict=True):
        assert stream.done
        assert stream.text.startswith(expected[model])
    await asyncio.to_thread(until, lambda: not alive(shards[0]))
    await asyncio.to_thread(until, lambda: ready(server) == [True, True])
    assert server.metrics()["loraplex_shard_groups_lost_total"] == lost


def test_a_stopped_server_leaves_nothing(arguments: list[str], tmp_path: Path) -> None:
    with serving([*arguments, "--replicas", "2"], tmp_path / "log") as server:
        assert server.complete("alpha", "hello")["usage"]["completion_tokens"] == 8
        assert server.stop() == 0
    assert "ERROR" not in (tmp_path / "log").read_text()


async def test_each_of_two_groups_of_two_ranks_is_kept_by_itself(
    arguments: list[str], expected: dict[str, str], tmp_path: Path
) -> None:
    """What is asked of both groups is what one process answers; a lost rank takes one group only."""
    with serving([*arguments, "--tp", "2", "--replicas", "2"], tmp_path / "log") as server:
        assert [(group["tp"], group["ready"]) for group in server.get("/info")["groups"]] == [(2, True)] * 2
        ranks = server.find_all("shard")
        assert len(ranks) == 4
        models = [MODELS[index % 3] for index in range(24)]
        streams = await stream_all(server.url, [body(model) for model in models])
        assert [stream.text for stream in streams] == [expected[model] for model in models]
        assert all(count >= 4 for count in admissions(server))
        os.kill(ranks[-1], signal.SIGKILL)
        await asyncio.to_thread(until, lambda: sorted(ready(server)) == [False, True])
        streams = await stream_all(server.url, [body(model) for model in models])
        assert [stream.text for stream in streams] == [expected[model] for model in models]
        await asyncio.to_thread(until, lambda: ready(server) == [True, True])
        assert len({*ranks} & {*server.find_all("shard")}) == 2
