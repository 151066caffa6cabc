"""A turn of a server and one of PEFT: the same load, and what it came to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from bench.errors import BenchFailed
from bench.peers.load import SETTINGS, Load, parse_settings, seeds
from bench.peers.transformers_peft import batches, load_model, run
from bench.peers.turns import ServerTurns, peft_turns
from loraplex.loadtest.plan import Target

from ...fakes.completions import FakeCompletions

SMALL = Load(requests=6, concurrency=4, prompt_tokens=5, output_tokens=8, vocabulary=400, seed=3)
ADAPTERS = ("a0", "a1", "a2")


async def test_a_server_gets_the_load_and_its_adapters_in_turn() -> None:
    fake = FakeCompletions(pause=0.01)
    async with fake.serving() as url:
        turns = ServerTurns(Target("fake", url, model="base", adapters=ADAPTERS))
        turn = await asyncio.to_thread(turns.turn, SMALL, warm_up=False)
    assert [body["model"] for body in fake.bodies] == [*ADAPTERS, *ADAPTERS]
    assert {len(body["prompt"]) for body in fake.bodies} == {5}
    assert {body["max_tokens"] for body in fake.bodies} == {8}
    assert fake.most_running == 4
    assert turn.tokens_per_second > 0
    assert turn.first_token is not None
    assert turn.per_token is not None


async def test_only_a_warm_up_adds_requests() -> None:
    fake = FakeCompletions()
    async with fake.serving() as url:
        turns = ServerTurns(Target("fake", url, model="base", adapters=ADAPTERS))
        await asyncio.to_thread(turns.turn, SMALL, warm_up=True)
    assert len(fake.bodies) == 1 + len(ADAPTERS) + SMALL.requests


async def test_a_turn_with_an_incomplete_answer_does_not_count() -> None:
    fake = FakeCompletions(fault=lambda number, body: "503" if number == 2 else None)
    async with fake.serving() as url:
        turns = ServerTurns(Target("fake", url, model="base"))
        with pytest.raises(BenchFailed, match="fake: 1 requests failed, HTTP 503: the queue is full"):
            await asyncio.to_thread(turns.turn, SMALL, warm_up=False)


async def test_peft_gets_the_prompts_that_servers_get() -> None:
    fake = FakeCompletions()
    async with fake.serving() as url:
        turns = ServerTurns(Target("fake", url, model="base"))
        await asyncio.to_thread(turns.turn, SMALL, warm_up=False)
    made = list(batches(SMALL, ADAPTERS))
    assert [len(ids) for ids, _ in made] == [4, 2]
    assert [names for _, names in made] == [["a0", "a1", "a2", "a0"], ["a1", "a2"]]
    assert torch.cat([ids for ids, _ in made]).tolist() == [body["prompt"] for body in fake.bodies]
    assert all(names == [] for _, names in batches(SMALL, []))


def test_a_mixed_batch_of_peft_counts_every_token(generated: Path) -> None:
    adapters = {name: generated / name for name in ADAPTERS}
    done = run(load_model(generated / "base", adapters), SMALL, list(adapters))
    assert done.tokens == SMALL.requests * SMALL.output_tokens
    assert done.seconds > 0


def test_the_base_of_peft_goes_on_past_the_end_token(generated: Path) -> None:
    model = load_model(generated / "base", {})
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1.0
    assert run(model, SMALL, []).tokens == SMALL.requests * SMALL.output_tokens


def test_peft_takes_turns_in_a_process_of_its_own(generated: Path, tmp_path: Path) -> None:
    adapters = {name: generated / name for name in ADAPTERS}
    with peft_turns(generated / "base", adapters, 1, tmp_path / "log") as turns:
        assert turns.turn(SMALL, warm_up=False).tokens_per_second > 0
        assert turns.turn(SMALL, warm_up=False).first_token is None


def test_a_process_that_ends_is_named_by_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(BenchFailed, match=f"peft: the process ended; see {log}"),
        peft_turns(tmp_path / "none", {}, 1, log),
    ):
        pass


def test_no_prompt_comes_twice_whatever_is_compared() -> None:
    drawn = [seed for setting in SETTINGS for seed in seeds(setting, 3)]
    assert len(set(drawn)) == 3 * len(SETTINGS)
    assert SETTINGS[0].load.seed not in drawn


def test_settings_are_those_of_the_measurements() -> None:
    base, mixed, rank8, single = parse_settings("base,mixed,rank8,single")
    assert (base.adapters, mixed.adapters, rank8.adapters, single.adapters) == (0, 16, 16, 0)
    assert (mixed.ranks, rank8.ranks) == ((8, 16, 32, 64), (8,))
    assert base.load == mixed.load == rank8.load == Load(requests=32, concurrency=16)
    assert single.load.concurrency == 1
    with pytest.raises(BenchFailed, match="no setting 'huge'; there is base, mixed, rank8, single"):
        parse_settings("base,huge")
