"""`loraplex bench` against a fake server: what is sent, in which order, and what counts as an answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from loraplex import cli

from ..fakes.completions import FakeCompletions

Bench = Callable[..., Awaitable[int]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the command while the fake goes on, whatever proxy the environment names."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("LORAPLEX_API_KEY", raising=False)

    async def run(line: str) -> int:
        return await asyncio.to_thread(cli.run, ["bench", *line.split()])

    return run


async def test_a_short_run_on_the_base(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCompletions()
    async with fake.serving() as url:
        assert await bench(url) == 0
    warm_up, *measured = fake.bodies
    assert len(measured) == 64
    assert fake.most_running == 8
    assert {body["model"] for body in fake.bodies} == {"base"}
    assert {len(body["prompt"]) for body in measured} == {64}
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 65
    assert warm_up["max_tokens"] == 4
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    assert all(fixed.items() <= body.items() and body["max_tokens"] == 32 for body in measured)
    printed = capsys.readouterr()
    assert "requests finished                   64\n" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("503", "HTTP 503", "the queue is full"),
        ("early end", "early end", "the stream ended after 1 chunks, without [DONE]"),
        ("short", "wrong count", "3 tokens came where 4 were wanted"),
        ("stop", "wrong finish", "the finish reason is stop, not length"),
        ("no usage", "no usage", "the stream says no usage"),
        ("error", "error in stream", "the device is lost"),
        ("garbage", "not understood", "JSON is malformed"),
        ("hang up", "broken off", ""),
        ("stall", "silence", ""),
    ],
)
async def test_what_is_no_whole_answer_counts_by_its_kind(
    fault: str, kind: str, message: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCompletions(fault=lambda number, body: fault if number == 2 else None)
    async with fake.serving() as url:
        line = f"x={url} --requests 4 --output-tokens 4 --no-warm-up --concurrency 2"
        assert await bench(f"{line} --silence-timeout 1" if fault == "stall" else line) == 0
    printed = capsys.readouterr().out
    assert "requests finished                   3\n" in printed
    assert "requests failed                     1\n" in printed
    assert f"x: 1 × {kind}, the first: {message}" in printed


async def test_a_request_has_an_end(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens keep coming, but not soon enough for the whole."""
    async with FakeCompletions(pause=0.2).serving() as url:
        assert await bench(f"--requests 1 --no-warm-up --timeout 0.5 x={url}") == 1
    assert "x: 1 × timeout" in capsys.readouterr().out


async def test_a_server_that_answers_nothing_complete_fails_the_command(bench: Bench) -> None:
    fake = FakeCompletions(fault=lambda number, body: "503")
    async with fake.serving() as url:
        assert await bench(f"--requests 3 --no-warm-up {url}") == 1


async def test_adapters_by_model(bench: Bench, tmp_path: Path) -> None:
    fake, path = FakeCompletions(tokens_per_chunk=3), tmp_path / "out.json"
    async with fake.serving() as url:
        line = f"{url} --adapters a{{0..1}} --requests 40 --output-tokens 7 --base-share 0.5 --json {path}"
        assert await bench(line) == 0
    assert [body["model"] for body in fake.bodies[:3]] == ["base", "a0", "a1"]
    assert {body["model"] for body in fake.bodies[3:]} == {"base", "a0", "a1"}
    content = json.loads(path.read_text())
    [point], [run] = content["points"], content["runs"]
    [figures] = point["servers"].values()
    assert (figures["finished"], figures["adapters"], content["interrupted"]) == (40, 2, False)
    names = [
        "base" if request["adapter"] is None else f"a{request['adapter']}" for request in run["requests"]
    ]
    assert sorted(names) == sorted(body["model"] for body in fake.bodies[3:])
    assert {(request["tokens"], request["chunks"]) for request in run["requests"]} == {(7, 3)}


async def test_adapters_by_index_as_llama_cpp_wants_them(bench: Bench) -> None:
    fake = FakeCompletions()
    async with fake.serving() as url:
        line = f"l={url} --style l=llama.cpp --model l=m --adapters x,y --requests 20 --output-tokens 2"
        assert await bench(f"{line} --base-share 0.4") == 0
    assert {body["model"] for body in fake.bodies} == {"m"}
    asked = {json.dumps(body["lora"]) for body in fake.bodies}
    assert asked == {
        '[{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]',
        '[{"id": 0, "scale": 1.0}]',
        '[{"id": 1, "scale": 1.0}]',
    }


async def test_servers_take_turns_with_the_same_requests(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[tuple[str, Any]] = []

    def note(name: str) -> FakeCompletions:
        return FakeCompletions(fault=lambda number, body: turns.append((name, body)))

    async with note("a").serving() as a, note("b").serving() as b:
        line = f"a={a} b={b} --requests 6 --concurrency 1 --output-tokens 2 --rounds 3 --no-warm-up"
        assert await bench(f"{line} --adapters a0,a1") == 0
    assert [(name, len(list(group))) for name, group in groupby(turns, key=lambda turn: turn[0])] == [
        ("a", 6),
        ("b", 12),
        ("a", 12),
        ("b", 6),
    ]
    sent = {name: [body for whose, body in turns if whose == name] for name in "ab"}
    assert sent["a"] == sent["b"]
    assert len({tuple(body["prompt"]) for body in sent["a"]}) == 18
    printed = capsys.readouterr().out
    assert "  by round" in printed
    assert "a       1.00      1.00      1.00\n" in printed


async def test_an_open_loop_does_not_wait_for_answers(bench: Bench) -> None:
    fake = FakeCompletions(pause=0.1)
    async with fake.serving() as url:
        line = f"{url} --workload s-lora --rate 40 --duration 0.5 --input-range 2:4 --output-range 5:6"
        assert await bench(f"{line} --no-warm-up") == 0
    assert len(fake.bodies) == 20
    assert fake.most_running > 12


async def test_a_sweep_over_adapters(bench: Bench, tmp_path: Path) -> None:
    fake = FakeCompletions()
    async with fake.serving() as url:
        line = f"{url} --adapters a0,a1 --adapter-counts 0,1,2 --requests 12 --output-tokens 2"
        assert await bench(f"{line} --spread round-robin --plots {tmp_path}") == 0
    models = [body["model"] for body in fake.bodies[3:]]
    assert models[:24] == ["base"] * 12 + ["a0"] * 12
    assert sorted(models[24:]) == ["a0"] * 6 + ["a1"] * 6
    drawn = await asyncio.to_thread(os.listdir, tmp_path)
    assert sorted(drawn) == ["latency.png", "throughput.png"]


async def test_the_warm_up_stops_where_an_adapter_is_not_served(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCompletions(fault=lambda number, body: "503" if body["model"] == "a1" else None)
    async with fake.serving() as url:
        assert await bench(f"x={url} --adapters a0,a1") == 1
    error = capsys.readouterr().err
    assert error == "loraplex: x: the first request to a1 failed, HTTP 503: the queue is full\n"


async def test_keys(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCompletions(api_key="secret")
    async with fake.serving() as url:
        assert await bench(f"{url} --requests 2 --api-key secret") == 0
        assert await bench(f"x={url} --requests 2") == 1
    assert "the first request to the base failed, HTTP 401: the key is wrong" in capsys.readouterr().err


async def test_a_server_that_does_not_answer_is_one_line(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeCompletions(models_status=404).serving() as url:
        assert await bench(url) == 1
        assert f"{url}/v1/models answers HTTP 404" in capsys.readouterr().err
        assert await bench(f"{url} --model m --requests 2") == 0
    capsys.readouterr()
    assert await bench(url) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"loraplex: no server answers at {url} (")
    assert error.count("\n") == 1


async def test_an_interrupt_reports_what_there_is(tmp_path: Path) -> None:
    """The third request never ends; two do, and then the user has had enough."""
    path, third = tmp_path / "out.json", asyncio.Event()

    def fault(number: int, body: dict[str, Any]) -> str | None:
        if number < 2:
            return None
        third.set()
        return "stall"

    fake = FakeCompletions(fault=fault)
    async with fake.serving() as url:
        line = f"bench x={url} --requests 10 --concurrency 1 --no-warm-up --json {path}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "loraplex", *line.split()),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=tmp_path,
        )
        async with asyncio.timeout(30):
            await third.wait()
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
    assert process.returncode == 130
    assert err.decode() == "interrupted; this is what there is:\n"
    assert "requests finished                   2\n" in out.decode()
    assert "cut off                             8\n" in out.decode()
    content = json.loads(path.read_text())
    assert content["interrupted"] is True
    assert len(content["runs"][0]["requests"]) == 2
