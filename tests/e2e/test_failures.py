"""What dies, what is refused, and what goes on regardless."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from loraplex.ports import free_port, hold_port

from . import server as servers
from .server import Refused, Server, alive, serving
from .streams import client, stream_all, stream_one


def body(model: str = "base", tokens: int = 200, **fields: Any) -> dict[str, Any]:
    fixed = {"model": model, "prompt": [5, 6, 7], "ignore_eos": True, "temperature": 0}
    return fixed | {"max_tokens": tokens} | fields


def until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


async def test_a_killed_shard_is_restarted_and_requests_end_or_run_again(
    arguments: list[str], tmp_path: Path
) -> None:
    with serving(arguments, tmp_path / "log") as server:
        expected = server.complete("alpha", [5, 6, 7], max_tokens=40, ignore_eos=True)["choices"][0]["text"]
        shard, before = server.find("shard"), server.tree()
        async with client() as session:
            running = [
                asyncio.create_task(stream_one(session, server.url, body("alpha", 500))) for _ in range(4)
            ]
            await asyncio.to_thread(server.generate, 80)
            os.kill(shard, signal.SIGKILL)
            streams = await asyncio.gather(*running)
            for stream in streams:
                assert stream.error["code"] == "shard_lost"
                assert not stream.done
                assert expected.startswith(stream.text[:20])
            later = await asyncio.wait_for(stream_one(session, server.url, body("alpha", 40)), 30)
        assert later.done
        assert later.text == expected
        assert server.find("shard") != shard
        left = [pid for pid in before if alive(pid)]
        assert sorted(left) == sorted([server.process.pid, server.find("router")]), "no orphan of the shard"
        assert server.metrics()["loraplex_shard_groups_lost_total"] == 1


async def test_requests_without_a_token_survive_their_shard(arguments: list[str], tmp_path: Path) -> None:
    """The shard is stopped, requests come in, it dies: nobody but a log reader notices."""
    with serving(arguments, tmp_path / "log") as server:
        expected = server.complete("beta", [5, 6, 7], max_tokens=20, ignore_eos=True)["choices"][0]["text"]
        shard = server.find("shard")
        os.kill(shard, signal.SIGSTOP)
        waiting = asyncio.create_task(stream_all(server.url, [body("beta", 20)] * 8))
        await asyncio.sleep(0.3)
        os.kill(shard, signal.SIGKILL)
        streams = await asyncio.wait_for(waiting, 40)
        assert [stream.text for stream in streams] == [expected] * 8
        assert all(stream.done for stream in streams)


async def test_sigterm_lets_running_streams_finish(arguments: list[str], tmp_path: Path) -> None:
    with serving(arguments, tmp_path / "log") as server:
        running = asyncio.create_task(stream_all(server.url, [body(tokens=500)] * 48))
        await asyncio.to_thread(server.generate, 1)
        pids = server.tree()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert await asyncio.to_thread(server.status, "/health/ready") == 503
        with pytest.raises(Refused) as refused:
            await asyncio.to_thread(server.complete, "base", "late")
        assert refused.value.status == 503
        assert refused.value.headers["Retry-After"]
        streams = await running
        assert all(stream.done and stream.finish == "length" for stream in streams)
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert not [pid for pid in pids if alive(pid)]


async def test_sigterm_ends_what_outlasts_the_drain(arguments: list[str], tmp_path: Path) -> None:
    with serving([*arguments, "--drain-timeout", "0.5"], tmp_path / "log") as server:
        running = asyncio.create_task(stream_all(server.url, [body(tokens=500)] * 200))
        await asyncio.to_thread(server.generate, 1)
        server.process.send_signal(signal.SIGTERM)
        streams = await running
        assert all(stream.done or stream.error["code"] == "draining" for stream in streams)
        assert any(stream.error for stream in streams)
        assert await asyncio.to_thread(server.process.wait, 20) == 0


def test_killing_the_launcher_leaves_no_orphan(arguments: list[str], tmp_path: Path) -> None:
    with serving(arguments, tmp_path / "log") as server:
        server.complete("alpha", "hello")
        pids = server.tree()
        assert len(pids) >= 4, "launcher, router, shard, adapter worker"
        server.process.kill()
        server.process.wait()
        until(lambda: not [pid for pid in pids if alive(pid)], 10)


def test_a_port_that_somebody_takes_first_costs_a_test_one_try(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_port("127.0.0.1") as taken:
        drawn = iter([taken.getsockname()[1]])
        monkeypatch.setattr(servers, "free_port", lambda: next(drawn, None) or free_port())
        with serving(arguments, tmp_path / "log") as server:
            assert server.status("/health/ready") == 200


def test_a_killed_router_ends_the_server_and_leaves_no_orphan(arguments: list[str], tmp_path: Path) -> None:
    with serving(arguments, tmp_path / "log") as server:
        server.complete("alpha", "hello")
        before = server.tree()
        os.kill(server.find("router"), signal.SIGKILL)
        assert server.process.wait(20) != 0
        until(lambda: not [pid for pid in before if alive(pid)], 10)


def test_a_full_queue_answers_429_or_503_with_retry_after(arguments: list[str], tmp_path: Path) -> None:
    limits = ["--max-num-seqs", "1", "--max-queued-requests", "4"]

    async def flood(server: Server) -> list[Any]:
        return await stream_all(server.url, [body(tokens=60)] * 24)

    with serving([*arguments, *limits], tmp_path / "log") as server:
        streams = asyncio.run(flood(server))
        refused = [stream for stream in streams if stream.status != 200]
        assert {stream.status for stream in refused} <= {429, 503}
        assert len(refused) >= 12
        assert all(stream.done for stream in streams if stream.status == 200)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"prompt": [1] * 513}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_bad_fields_are_named(server: Server, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        server.post("/v1/completions", body() | fields)
    assert caught.value.status == 400
    assert caught.value.body["error"]["param"] == param


def test_an_adapter_outside_the_roots_is_as_unknown_as_any(server: Server, tmp_path: Path) -> None:
    for name in ("/etc", str(tmp_path), "../two/alpha", "gamma", "s3://bucket/adapter"):
        with pytest.raises(Refused) as caught:
            server.complete(name, "x")
        assert caught.value.status in (400, 404), name
        assert caught.value.body["error"]["message"]


def test_keys_guard_every_route_but_health(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret-one tenant-a alpha\nsecret-two tenant-b\n")
    with serving([*arguments, "--api-key-file", str(tmp_path / "keys")], tmp_path / "log") as server:
        for path in ("/v1/models", "/metrics", "/info", "/v1/adapters", "/nowhere", "/v1/completions"):
            assert server.status(path) == 401, path
        for path in ("/health", "/health/live", "/health/ready"):
            assert server.status(path) == 200, path
