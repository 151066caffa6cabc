"""The engine against a shard that checks every rule of the contract."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from loraplex.proto import shard_pb2
from loraplex.router.client import AdapterState
from loraplex.router.config import AdapterSpec, RouterConfig
from loraplex.router.engine import Engine
from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    Draining,
    InternalError,
    InvalidRequest,
    NumericalError,
    Overloaded,
    RouterError,
    ShardLost,
    TooManyRequests,
)
from loraplex.router.metrics import Metrics
from loraplex.router.request import AdapterUse, FinishReason, TokenEvent, TokenStream

from ..fakes.polling import until
from ..fakes.shard import FakeAdapter, FakeShards, generate, make_info, prompt_logprob
from .served import Served, hub, read, serving, tokens_of


async def test_one_request_gets_exactly_its_tokens() -> None:
    async with serving() as served:
        request = served.submit([1, 2, 3], seed=7)
        assert await read(request) == (generate([1, 2, 3], 8, seed=7), FinishReason.LENGTH)
        await served.at_baseline()


async def test_many_requests_over_many_adapters_do_not_change_each_other() -> None:
    rng = random.Random(1)
    async with serving(FakeShards(sources=hub(5), step_seconds=0.001)) as served:
        asked = []
        for index in range(60):
            prompt = [rng.randrange(1000) for _ in range(rng.randrange(1, 40))]
            name = f"org/a{index % 6}" if index % 6 < 5 else ""
            uses = (served.use(name),) if name else ()
            entries = ((FakeAdapter.digest(name), 1.0),) if name else ()
            count = rng.randrange(1, 20)
            request = served.submit(prompt, *uses, max_tokens=count, seed=index)
            asked.append((request, generate(prompt, count, entries=entries, seed=index)))
        for request, expected in asked:
            assert await tokens_of(request) == expected
        await served.at_baseline()
        assert served.shards.in_flight_most == 2
        assert served.metrics.step_adapters_max == 5


async def test_a_weighted_sum_names_all_its_adapters() -> None:
    async with serving(FakeShards(sources=hub(2))) as served:
        request = served.submit([5], served.use("org/a1", 0.25), served.use("org/a0", 2.0))
        entries = (("sha-org/a1", 0.25), ("sha-org/a0", 2.0))
        assert await tokens_of(request) == generate([5], 8, entries=entries)


async def test_a_stop_id_ends_the_row_and_overshoot_is_not_delivered() -> None:
    alone = generate([9], 20)
    stop = alone[4]
    async with serving() as served:
        tokens, finish = await read(served.submit([9], max_tokens=20, stop_ids=(stop,)))
        assert tokens == alone[: alone.index(stop) + 1]
        assert finish is FinishReason.STOP
        await served.at_baseline()
        assert served.metrics.generated_tokens == len(tokens)


async def test_output_ends_at_the_length_of_the_model() -> None:
    async with serving(FakeShards(make_info(max_model_len=10))) as served:
        tokens, finish = await read(served.submit([1] * 7, max_tokens=50))
        assert (len(tokens), finish) == (3, FinishReason.LENGTH)
        with pytest.raises(InvalidRequest, match="10 tokens") as caught:
            served.submit([1] * 10)
        assert caught.value.param == "prompt"


async def test_output_ends_where_the_blocks_do() -> None:
    async with serving(FakeShards(make_info(blocks=10, block_size=4))) as served:
        assert served.engine.model.max_model_len == 40
        tokens, finish = await read(served.submit([1] * 20, max_tokens=50))
        assert (len(tokens), finish) == (20, FinishReason.LENGTH)
        with pytest.raises(InvalidRequest):
            served.submit([1] * 40)
        await served.at_baseline()


async def test_preemption_yields_the_same_tokens() -> None:
    shards = FakeShards(make_info(blocks=24, rows=16), step_seconds=0.0005)
    async with serving(shards) as served:
        asked = []
        for index in range(30):
            prompt = list(range(index, index + 5 + index % 7))
            asked.append((served.submit(prompt, max_tokens=30, seed=index), prompt, index))
        for request, prompt, seed in asked:
            assert await tokens_of(request) == generate(prompt, 30, seed=seed)
        await served.at_baseline()
        assert served.metrics.preemptions > 5


async def test_preemption_does_not_repeat_or_lose_prompt_logprobs() -> None:
    shards = FakeShards(make_info(blocks=12, rows=8, step_tokens=8), step_seconds=0.0005)
    async with serving(shards) as served:
        asked = [
            (served.submit([i] * 10, max_tokens=20, prompt_logprobs=2, logprobs=1), [i] * 10)
            for i in range(6)
        ]
        for request, prompt in asked:
            events = [event async for event in request.stream]
            with_prompt = [e for e in events if e.prompt_logprobs is not None]
            assert with_prompt == events[:1]
            first = events[0].prompt_logprobs
            assert first is not None
            assert first[0] is None
            assert all(entry is None or len(entry.top) == 2 for entry in first)
            got = [entry.logprob for entry in first[1:] if entry is not None]
            assert got == pytest.approx([prompt_logprob(prompt, p) for p in range(1, 10)])
            assert all(len(e.logprobs) == 1 and len(e.logprobs[0].top) == 1 for e in events)
        assert served.metrics.preemptions > 0
        await served.at_baseline()


async def test_a_long_prompt_runs_in_chunks_while_others_decode() -> None:
    shards = FakeShards(make_info(step_tokens=16))
    async with serving(shards) as served:
        short = served.submit([1], max_tokens=60)
        long = served.submit(list(range(200)), max_tokens=2)
        assert await tokens_of(long) == generate(list(range(200)), 2)
        assert await tokens_of(short) == generate([1], 60)
    mixed = [plan for plan in shards.plans if plan.chunks and plan.decode_rows]
    assert len(mixed) >= 12


async def test_cancel_frees_blocks_within_two_steps() -> None:
    shards = FakeShards(step_seconds=0.002)
    async with serving(shards) as served:
        request = served.submit([1] * 20, max_tokens=1000)
        async for _ in request.stream:
            break
        served.engine.cancel(request.id)
        sent = len(shards.plans)
        await served.at_baseline()
        assert len(shards.plans) - sent <= 2
        assert not request.stream.closed
        assert served.metrics.outcomes == {"cancelled": 1}


async def test_cancel_takes_a_waiting_request_out_of_its_queue() -> None:
    async with serving(FakeShards(sources={"org/slow": FakeAdapter(fetch_seconds=60)})) as served:
        request = served.submit([1], served.use("org/slow"))
        await asyncio.sleep(0.01)
        assert served.metrics.snapshot().waiting == 1
        served.engine.cancel(request.id)
        served.engine.cancel("unknown")
        await asyncio.sleep(0.01)
        assert served.metrics.snapshot().waiting == 0


async def test_a_hundred_requests_for_one_adapter_fetch_it_once() -> None:
    async with serving(FakeShards(sources={"org/a": FakeAdapter(fetch_seconds=0.05)})) as served:
        requests = [served.submit([i], served.use("org/a"), max_tokens=2) for i in range(100)]
        for index, request in enumerate(requests):
            assert await tokens_of(request) == generate([index], 2, entries=(("sha-org/a", 1.0),))
        assert served.shards.downloads == ["org/a"]
        assert served.shards.loads == ["sha-org/a"]


async def test_a_slow_fetch_holds_up_nobody() -> None:
    sources = {"org/slow": FakeAdapter(fetch_seconds=0.5), "org/fast": FakeAdapter()}
    async with serving(FakeShards(sources=sources)) as served:
        slow = served.submit([1], served.use("org/slow"))
        others = [served.submit([2]), served.submit([3], served.use("org/fast"))]
        async with asyncio.timeout(0.4):
            for request in others:
                await read(request)
        assert len(await tokens_of(slow)) == 8


async def test_forty_adapters_are_served_in_room_for_eight() -> None:
    shards = FakeShards(make_info(slots=8), sources=hub(40), step_seconds=0.0005)
    async with serving(shards) as served:
        asked = []
        for index in range(160):
            name = f"org/a{index * 7 % 40}"
            asked.append((served.submit([index], served.use(name), max_tokens=5), name, index))
        for request, name, index in asked:
            assert await tokens_of(request) == generate(
                [index], 5, entries=((FakeAdapter.digest(name), 1.0),)
            )
        await served.at_baseline()
        assert len(shards.device.slots) == 8
        assert served.metrics.adapter_evictions >= 32


async def test_adapters_share_a_budget_of_bytes() -> None:
    sources = {f"org/a{i}": FakeAdapter(bytes=400) for i in range(6)} | {"org/huge": FakeAdapter(bytes=1001)}
    shards = FakeShards(make_info(adapter_bytes=1000), sources=sources, step_seconds=0.0005)
    async with serving(shards) as served:
        requests = [served.submit([i], served.use(f"org/a{i}"), max_tokens=3) for i in range(6)]
        huge = served.submit([1], served.use("org/huge"))
        for request in requests:
            await tokens_of(request)
        with pytest.raises(AdapterRejected, match="org/huge"):
            await tokens_of(huge)
        await served.at_baseline()


async def test_a_busy_adapter_is_drained_for_one_that_waits_too_long() -> None:
    shards = FakeShards(make_info(slots=1), sources=hub(2), step_seconds=0.001)
    async with serving(shards, adapter_patience=0.05) as served:
        stop = asyncio.Event()

        async def keep_busy(seed: int) -> None:
            while not stop.is_set():
                await read(served.submit([1], served.use("org/a0"), max_tokens=7 + 5 * seed, seed=seed))

        busy = [asyncio.create_task(keep_busy(seed)) for seed in range(3)]
        await asyncio.sleep(0.05)
        base = served.submit([2], max_tokens=100)
        assert await tokens_of(served.submit([3], served.use("org/a1"))) == generate(
            [3], 8, entries=(("sha-org/a1", 1.0),)
        )
        stop.set()
        await asyncio.gather(*busy, tokens_of(base))


async def test_a_failed_adapter_is_remembered_with_backoff_and_tried_again() -> None:
    sources = {"org/bad": FakeAdapter(error=AdapterFetchFailed("the hub said 503"))}
    async with serving(FakeShards(sources=sources)) as served:
        failing = [served.submit([1], served.use("org/bad")) for _ in range(3)]
        for request in failing:
            with pytest.raises(AdapterFetchFailed, match=r"org/bad.*503"):
                await tokens_of(request)
        with pytest.raises(AdapterFetchFailed) as caught:
            served.submit([1], served.use("org/bad"))
        assert caught.value.retry_after is not None
        assert served.shards.downloads == ["org/bad"]
        assert served.engine.adapters(tenant="")[0].state is AdapterState.FAILED
        await tokens_of(served.submit([1]))
        sources["org/bad"].error = None
        await asyncio.sleep(1.3)
        assert len(await tokens_of(served.submit([1], served.use("org/bad")))) == 8


async def test_an_unknown_adapter_never_gets_the_base() -> None:
    async with serving() as served:
        with pytest.raises(AdapterNotFound):
            served.use("nothing")
        with pytest.raises(AdapterNotFound):
            served.submit([1], AdapterUse("gone#3"))
        with pytest.raises(AdapterNotFound):
            await tokens_of(served.submit([1], served.use("org/missing")))


async def test_load_pin_and_unload_by_name(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    shards = FakeShards(
        make_info(slots=1), sources={str(directory): FakeAdapter(bytes=70), "org/b": FakeAdapter()}
    )
    async with serving(shards, adapter_roots=(str(tmp_path),)) as served:
        engine = served.engine
        status = await engine.load_adapter("mine", str(directory), tenant="", pin=True)
        assert (status.state, status.pinned, status.bytes) == (AdapterState.RESIDENT, True, 70)
        with pytest.raises(Overloaded, match="unpin"):
            await tokens_of(served.submit([1], served.use("org/b")))
        assert not (await engine.pin_adapter("mine", False, tenant="")).pinned
        running = served.submit([1], served.use("mine"), max_tokens=30)
        assert await engine.unload_adapter("mine", tenant="") == 70
        assert len(await tokens_of(running)) == 30
        with pytest.raises(AdapterNotFound):
            served.use("mine")
        with pytest.raises(AdapterNotFound):
            await engine.unload_adapter("mine", tenant="")
        await served.at_baseline()
        assert shards.device.slots == {}
        assert [s.name for s in engine.adapters(tenant="")] == ["org/b"]


async def test_a_load_that_fails_says_so() -> None:
    async with serving() as served:
        with pytest.raises(AdapterNotFound, match="org/none"):
            await served.engine.load_adapter("x", "org/none", tenant="")


async def test_an_adapter_from_the_command_line_may_lie_anywhere(tmp_path: Path) -> None:
    shards = FakeShards(sources={str(tmp_path): FakeAdapter()})
    async with serving(shards, adapters=(AdapterSpec("cli", str(tmp_path)),)) as served:
        assert len(await tokens_of(served.submit([1], served.use("cli")))) == 8
        with pytest.raises(AdapterNotFound):
            served.use(str(tmp_path))


async def test_output_that_is_not_finite_fails_that_request_only() -> None:
    sources = {"org/nan": FakeAdapter(not_finite=True)}
    async with serving(FakeShards(sources=sources)) as served:
        bad, good = served.submit([1], served.use("org/nan")), served.submit([2])
        with pytest.raises(NumericalError):
            await tokens_of(bad)
        assert await tokens_of(good) == generate([2], 8)
        await served.at_baseline()


async def test_a_lost_group_reruns_what_had_no_token_and_ends_the_rest() -> None:
    shards = FakeShards(make_info(rows=2), sources=hub(1), step_seconds=0.001)
    async with serving(shards) as served:
        running = [served.submit([i], served.use("org/a0"), max_tokens=500) for i in range(2)]
        for request in running:
            async for _ in request.stream:
                break
        waiting = [served.submit([i], served.use("org/a0")) for i in range(10, 14)]
        await asyncio.sleep(0.01)
        shards.lose()
        for request in running:
            with pytest.raises(ShardLost):
                await tokens_of(request)
        for index, request in enumerate(waiting, start=10):
            assert await tokens_of(request) == generate([index], 8, entries=(("sha-org/a0", 1.0),))
        await served.at_baseline()
        assert served.metrics.groups_lost == 1
        assert shards.downloads == ["org/a0", "org/a0"]


async def test_a_started_request_without_a_token_is_invisible_to_its_client() -> None:
    shards = FakeShards()
    async with serving(shards) as served:
        shards.pause()
        request = served.submit([4, 5])
        await asyncio.sleep(0.01)
        assert shards.plans
        shards.lose()
        shards.resume()
        assert await tokens_of(request) == generate([4, 5], 8)
        await served.at_baseline()


async def test_a_request_that_always_kills_the_group_is_ended() -> None:
    shards = FakeShards()
    async with serving(shards) as served:
        shards.pause()
        request = served.submit([4, 5])
        for _ in range(4):
            await asyncio.sleep(0.01)
            shards.lose()
        with pytest.raises(ShardLost):
            await tokens_of(request)


async def test_requests_do_not_wait_forever_for_a_group() -> None:
    shards = FakeShards()
    async with serving(shards, patience_lost=0.3) as served:
        shards.returns = False
        shards.pause()
        request = served.submit([1])
        await asyncio.sleep(0.01)
        shards.lose()
        await asyncio.sleep(0.01)
        assert not served.engine.ready
        with pytest.raises(ShardLost):
            await tokens_of(request)
        with pytest.raises(Overloaded):
            served.submit([1])
        shards.resume()
        shards.connect()
        assert len(await tokens_of_when_ready(served)) == 8


async def tokens_of_when_ready(served: Served) -> list[int]:
    await until(lambda: served.engine.ready)
    return await tokens_of(served.submit([1]))


async def test_pinned_adapters_come_back_with_the_group() -> None:
    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        await served.engine.load_adapter("org/a0", "org/a0", tenant="", pin=True)
        shards.lose()
        await until(lambda: shards.device.slots)


@pytest.mark.parametrize(
    "alter",
    [
        lambda result: result.rows.pop(),
        lambda result: setattr(result.rows[0], "row", 99),
        lambda result: setattr(result, "seq", 77),
    ],
    ids=["row missing", "foreign row", "wrong seq"],
)
async def test_an_answer_that_breaks_the_contract_ends_the_epoch(alter: object) -> None:
    shards = FakeShards()

    def once(result: shard_pb2.StepResult) -> None:
        if shards.epoch == 1:
            alter(result)  # type: ignore[operator]

    shards.alter = once
    async with serving(shards) as served:
        assert await tokens_of(served.submit([1])) == generate([1], 8)
        assert len(shards.abandoned) == 1
        assert shards.epoch == 2
        await served.at_baseline()


async def test_close_answers_whoever_waits_for_an_adapter() -> None:
    async with serving(FakeShards(sources={"org/slow": FakeAdapter(fetch_seconds=60)})) as served:
        waiting = [
            asyncio.create_task(served.engine.load_adapter("org/slow", "org/slow", tenant=""))
            for _ in range(2)
        ]
        await asyncio.sleep(0.01)
        waiting.append(asyncio.create_task(served.engine.unload_adapter("org/slow", tenant="")))
        await asyncio.sleep(0)
        await served.engine.close()
        for task in waiting:
            with pytest.raises((Draining, AdapterNotFound)):
                await task
        with pytest.raises(Draining):
            await served.engine.unload_adapter("org/slow", tenant="")


async def test_drain_lets_accepted_requests_finish() -> None:
    async with serving(FakeShards(make_info(rows=2), step_seconds=0.001)) as served:
        requests = [served.submit([i], max_tokens=20) for i in range(5)]
        draining = asyncio.create_task(served.engine.drain(5.0))
        await asyncio.sleep(0)
        assert not served.engine.ready
        with pytest.raises(Draining) as caught:
            served.submit([9])
        assert caught.value.retry_after
        await draining
        for index, request in enumerate(requests):
            assert await tokens_of(request) == generate([index], 20)
        await served.at_baseline()


async def test_drain_ends_what_takes_too_long() -> None:
    shards = FakeShards(
        make_info(rows=1), sources={"org/slow": FakeAdapter(fetch_seconds=60)}, step_seconds=0.01
    )
    async with serving(shards) as served:
        requests = [served.submit([i], max_tokens=1000) for i in range(3)]
        requests.append(served.submit([1], served.use("org/slow")))
        await served.engine.drain(0.05)
        for request in requests:
            with pytest.raises(Draining):
                await tokens_of(request)
        await served.at_baseline()


async def test_close_ends_everything_that_was_accepted() -> None:
    async with serving(FakeShards(step_seconds=0.01)) as served:
        requests = [served.submit([1], max_tokens=1000) for _ in range(3)]
        await asyncio.sleep(0.02)
        await served.engine.close()
        for request in requests:
            with pytest.raises(Draining):
                await tokens_of(request)


async def test_refusals_are_raised_at_once() -> None:
    sources = {"org/slow": FakeAdapter(fetch_seconds=60), "org/slower": FakeAdapter(fetch_seconds=60)}
    shards = FakeShards(make_info(blocks=10, block_size=4, slots=2), sources=sources)
    async with serving(shards, max_queued_requests=4) as served:
        slow = served.use("org/slow")
        for _ in range(2):
            served.submit([1], slow)
        with pytest.raises(TooManyRequests) as caught:
            served.submit([1], slow)
        assert caught.value.retry_after
        for _ in range(2):
            served.submit([1], served.use("org/slower"))
        with pytest.raises(Overloaded):
            served.submit([1])
        for request_id in ("r1", "r2"):
            served.engine.cancel(request_id)
        await asyncio.sleep(0.01)
        with pytest.raises(InvalidRequest, match="at most 2 adapters"):
            served.submit([1], *(AdapterUse(f"k{i}") for i in range(3)))
        with pytest.raises(InternalError):
            served.submit([1], request_id="r4")
        assert served.metrics.refusals["too_many_requests"] == 1


async def test_a_bug_ends_requests_but_not_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        core = served.engine._core

        def broken(*args: object) -> None:
            monkeypatch.undo()
            raise RuntimeError("bug")

        monkeypatch.setattr(core, "_step", broken)
        with pytest.raises(InternalError):
            await tokens_of(served.submit([1]))
        assert await tokens_of_when_ready(served) == generate([1], 8)


async def test_a_load_without_room_is_tried_again() -> None:
    from loraplex.router.rpc_errors import AdapterMemoryFull

    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        shards.load_error = AdapterMemoryFull("full")
        request = served.submit([1], served.use("org/a0"))
        await asyncio.sleep(0.1)
        assert shards.loads == ["sha-org/a0"]
        shards.load_error = None
        assert len(await tokens_of(request)) == 8


async def test_an_adapter_rejected_at_load_fails_its_requests() -> None:
    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        shards.load_error = AdapterRejected("tensor q_proj has a wrong shape")
        with pytest.raises(AdapterRejected, match="q_proj"):
            await tokens_of(served.submit([1], served.use("org/a0")))
        await served.at_baseline()
        assert served.metrics.snapshot().slots_used == 0


async def test_model_and_errors_before_the_first_group() -> None:
    engine = Engine(
        RouterConfig(served_model_name="base", groups=(("localhost:1",),)),
        (FakeShards(),),
        Metrics(CollectorRegistry()),
    )
    with pytest.raises(Overloaded):
        _ = engine.model
    assert not engine.ready
    async with serving() as served:
        assert served.engine.model.architecture == "FakeForCausalLM"
        assert served.engine.model.name == "base"


def test_a_terminal_event_closes_the_stream() -> None:
    stream = TokenStream()
    stream.put(TokenEvent((1,), finish=FinishReason.STOP))
    with pytest.raises(RuntimeError):
        stream.put(RouterError("late"))
