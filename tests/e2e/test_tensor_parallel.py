"""Two ranks behind one router give what one process gives, over REST; and what happens when a rank goes."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ..shard.parallel.recipes import recipes
from ..tiny import build_adapter
from .server import Server, alive, serving
from .streams import Streamed, client, stream_all, stream_one

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "mixtral")
PATIENCE = 60.0
"""Seconds after which something counts as never. How long it takes is measured by `bench.group_recovery`."""


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_two_ranks_answer_as_one_process(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_model(kind)
    adapters = {
        name: build_adapter(base, tmp_path / name, recipe, seed=seed)
        for seed, (name, recipe) in enumerate(recipes(kind).items())
    }
    words = [str(base), "--served-model-name", "base", "--dtype", "float32", "--kv-memory", "32MiB"]
    words += [f"--adapter={name}={path}" for name, path in adapters.items()]
    dice = random.Random(3)
    cases = [
        (model, [dice.randrange(256) for _ in range(length)])
        for model in ["base", *adapters]
        for length in (3, 19)
    ]
    with (
        serving(words, tmp_path / "one.log") as one,
        serving([*words, "--tp", "2"], tmp_path / "two.log") as two,
    ):
        want, got = answers(one, cases), answers(two, cases)
        for case, (logprobs, tokens), (expected, other) in zip(cases, got, want, strict=True):
            assert (logprobs - expected).abs().max() <= 1e-4, case[0]
            assert tokens == other, case[0]
        (group,) = two.get("/info")["groups"]
        (whole,) = one.get("/info")["groups"][0]["weight_bytes"]
        assert group["tp"] == 2
        assert all(size < 0.75 * whole for size in group["weight_bytes"])


def answers(server: Server, cases: list[tuple[str, list[int]]]) -> list[tuple[torch.Tensor, list[int]]]:
    """All cases at once: each prompt's logprobs and greedy tokens."""

    def ask(case: tuple[str, list[int]]) -> tuple[torch.Tensor, list[int]]:
        model, prompt = case
        choice = server.complete(
            model, prompt, max_tokens=24, echo=True, logprobs=0, ignore_eos=True, return_token_ids=True
        )["choices"][0]
        return torch.tensor(choice["logprobs"]["token_logprobs"][1 : len(prompt)]), choice["token_ids"]

    with ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(ask, cases))


@pytest.fixture
def pair(arguments: list[str], tmp_path: Path) -> Iterator[Server]:
    """A server of two ranks: one of its own for each test, since many deaths in a row end a server."""
    with serving([*arguments, "--tp", "2"], tmp_path / "log") as server:
        yield server


def shards(server: Server) -> list[int]:
    """Process ids of the ranks, in their order."""
    found = []
    for pid in server.tree():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"shard" in words:
            rank = next((int(word.partition(b"=")[2]) for word in words if word.startswith(b"--rank=")), 0)
            found.append((rank, pid))
    return [pid for _, pid in sorted(found)]


def body(model: str, tokens: int) -> dict[str, Any]:
    fixed = {"model": model, "prompt": [5, 6, 7], "ignore_eos": True, "temperature": 0}
    return fixed | {"max_tokens": tokens}


def baseline(server: Server) -> dict[str, float]:
    """What must be back where it was when nothing runs."""
    names = ("loraplex_kv_blocks_used", "loraplex_rows_used", "loraplex_adapter_references")
    return {name: value for name, value in server.metrics().items() if name.startswith(names)}


GOES = [(rank, number) for rank in (0, 1) for number in (signal.SIGKILL, signal.SIGSTOP)]
"""Which rank goes, and how."""


def decoding() -> list[dict[str, Any]]:
    """Streams that have had tokens for a while when the rank goes."""
    return [body("alpha", 480)] * 4


def prefilling() -> list[dict[str, Any]]:
    """Prompts of several chunks each, and one token."""
    return [body("alpha", 1) | {"prompt": [7] * 500}] * 60


def loading(adapter: Path) -> list[dict[str, Any]]:
    """Adapters that nobody has named before, fetched and loaded one after another."""
    names = [adapter.with_name(f"copy{number}-{time.monotonic_ns()}") for number in range(30)]
    for name in names:
        shutil.copytree(adapter, name)
    return [body(str(name), 8) for name in names]


async def test_a_rank_that_goes_takes_its_group_with_it(pair: Server, two_adapters: dict[str, Path]) -> None:
    """Whatever was under way, here decode steps, prefills and loads, ends whole or with a typed error, and
    the group comes back without orphans."""

    def start() -> list[asyncio.Task[list[Streamed]]]:
        kinds = (decoding(), prefilling(), loading(two_adapters["beta"]))
        return [asyncio.create_task(stream_all(pair.url, bodies)) for bodies in kinds]

    whole = [stream.text for streams in await asyncio.gather(*start()) for stream in streams]
    for count, (rank, number) in enumerate(GOES, start=1):
        before, running = shards(pair), start()
        await asyncio.to_thread(pair.generate, 1)
        assert not any(kind.done() for kind in running)
        os.kill(before[rank], number)
        await asyncio.to_thread(until, lambda n=count: lost(pair) == n)
        ended = await asyncio.wait_for(asyncio.gather(*running), PATIENCE)
        again = await asyncio.wait_for(stream_one_of(pair), PATIENCE)
        assert again.done
        for stream, text in zip([stream for streams in ended for stream in streams], whole, strict=True):
            assert text.startswith(stream.text)
            assert stream.text == text if stream.done else code_of(stream) == "shard_lost"
        assert not [pid for pid in before if alive(pid)], "no orphan"
        await asyncio.to_thread(until, lambda: set(baseline(pair).values()) <= {0.0})


def lost(server: Server) -> float:
    """Groups that the router has lost so far."""
    return server.metrics()["loraplex_shard_groups_lost_total"]


def code_of(stream: Streamed) -> str:
    """Of an error, in the stream or in place of one."""
    return str(stream.error.get("error", stream.error)["code"])


async def stream_one_of(server: Server) -> Any:
    async with client() as session:
        return await stream_one(session, server.url, body("alpha", 20))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "not noticed in time"
        time.sleep(0.05)


async def test_requests_without_a_token_are_run_again(pair: Server) -> None:
    """A rank stops, requests come in, it dies: only a log reader notices."""
    expected = pair.complete("beta", [5, 6, 7], max_tokens=20, ignore_eos=True)["choices"][0]["text"]
    follower = shards(pair)[1]
    os.kill(follower, signal.SIGSTOP)
    waiting = asyncio.create_task(stream_all(pair.url, [body("beta", 20)] * 6))
    await asyncio.sleep(0.3)
    os.kill(follower, signal.SIGKILL)
    streams = await asyncio.wait_for(waiting, PATIENCE)
    assert [stream.text for stream in streams] == [expected] * 6


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tp", "3"], "--tp 3 does not divide this model's 4 attention heads"),
        (["--tp", "0"], "--tp 0"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(
    words: list[str], reason: str, arguments: list[str], tmp_path: Path
) -> None:
    refused(Server([*arguments, *words], tmp_path / "log"), reason)


def test_a_model_without_a_plan_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    words = [str(tiny_model("gpt2")), "--served-model-name", "base", "--tp", "2"]
    refused(Server(words, tmp_path / "log"), "no tensor-parallel plan for gpt2 models")


def refused(server: Server, reason: str) -> None:
    """It says so in its last line, and ends with nothing left behind."""
    pids = server.tree()
    assert server.process.wait(60) == 2
    assert reason in server.log_text().strip().splitlines()[-1]
    assert not [pid for pid in pids if alive(pid)]
