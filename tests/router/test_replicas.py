"""Several groups behind one engine: who serves what, and what happens when one goes."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from loraplex.proto import shard_pb2
from loraplex.router.client import AdapterState
from loraplex.router.errors import (
    AdapterNotFound,
    AdapterRejected,
    Draining,
    Overloaded,
    ShardLost,
)
from loraplex.router.request import AdapterUse, Request

from ..fakes.polling import until
from ..fakes.shard import FakeAdapter, FakeShards, generate, make_info
from .served import Served, hub, replicas, serving, tokens_of


def expected(prompt: list[int], name: str = "", count: int = 8, seed: int = 0) -> list[int]:
    entries = ((FakeAdapter.digest(name), 1.0),) if name else ()
    return generate(prompt, count, entries=entries, seed=seed)


def rows_started(shards: FakeShards) -> int:
    return sum(len(plan.starts) for plan in shards.plans)


async def first_token(request: Request) -> None:
    async for _ in request.stream:
        return


async def on_both(served: Served, name: str) -> AdapterUse:
    """Ask for so much of one adapter that it becomes resident on each group."""
    use = served.use(name)
    digest = FakeAdapter.digest(name)
    requests = [served.submit([i], use, max_tokens=1000) for i in range(20)]
    await until(lambda: all(digest in shards.device.slots.values() for shards in served.groups))
    for request in requests:
        served.engine.cancel(request.id)
    await served.at_baseline()
    return use


async def test_requests_are_spread_and_get_exactly_their_tokens() -> None:
    groups = replicas(2, info=make_info(rows=8), sources=hub(6), step_seconds=0.001)
    rng = random.Random(1)
    async with serving(*groups) as served:
        asked = []
        for index in range(120):
            name = f"org/a{index % 7}" if index % 7 < 6 else ""
            prompt = [rng.randrange(1000) for _ in range(rng.randrange(1, 30))]
            count = rng.randrange(1, 20)
            uses = (served.use(name),) if name else ()
            request = served.submit(prompt, *uses, max_tokens=count, seed=index)
            asked.append((request, expected(prompt, name, count, index)))
        for request, tokens in asked:
            assert await tokens_of(request) == tokens
        await served.at_baseline()
        shares = [rows_started(shards) for shards in groups]
        assert sum(shares) == 120
        assert min(shares) >= 40, shares
        assert served.metrics.snapshot().groups_ready == 2


async def test_hot_adapters_come_to_both_groups_and_cold_ones_to_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A Zipf-like load in waves over 24 adapters, with room for 16 on each group. Halfway another adapter
    becomes the most popular one."""
    groups = replicas(2, info=make_info(rows=16, slots=16), sources=hub(24), step_seconds=0.0005)
    rng = random.Random(2)
    weights = [1 / (rank + 1) ** 1.2 for rank in range(24)]
    async with serving(*groups) as served:
        for wave in range(8):
            names = [(name + wave // 4) % 24 for name in rng.choices(range(24), weights, k=80)]
            uses = [served.use(f"org/a{name}") for name in names]
            requests = [
                served.submit([wave, index], use, max_tokens=100, seed=index)
                for index, use in enumerate(uses)
            ]
            for index, (name, request) in enumerate(zip(names, requests, strict=True)):
                assert await tokens_of(request) == expected([wave, index], f"org/a{name}", 100, index)
        await served.at_baseline()
        metrics = served.metrics
        loads = sum(len(shards.loads) for shards in groups)
        homes = [sum(FakeAdapter.digest(f"org/a{i}") in shards.loads for shards in groups) for i in range(24)]
        hits, misses = metrics.adapter_hits, metrics.adapter_misses
        rate = hits / (hits + misses)
        shares = [rows_started(shards) for shards in groups]
        with capsys.disabled():
            print(
                f"\nZipf 1.2 over 24 adapters, 2 groups of 16 slots, {hits + misses} requests {shares}: "
                f"{loads} loads, groups by popularity {homes}, "
                f"hit rate {rate:.3f} in all"
            )
        assert loads == metrics.adapter_loads
        assert homes[0] == homes[1] == 2
        assert all(count == 1 for count in homes[5:]), "a cold adapter stays on one group"
        assert loads <= 30
        assert rate > 0.8
        assert max(shares) < 1.3 * min(shares)


async def test_a_rare_adapter_is_loaded_once() -> None:
    groups = replicas(3, sources=hub(5), step_seconds=0.0005)
    async with serving(*groups) as served:
        for index in range(30):
            name = f"org/a{index % 5}"
            assert await tokens_of(served.submit([index], served.use(name))) == expected([index], name)
        loads = [digest for shards in groups for digest in shards.loads]
        assert sorted(loads) == sorted({*loads})
        assert len(loads) == 5


async def test_a_second_group_fetches_the_digest_of_the_first() -> None:
    groups = replicas(2, info=make_info(rows=4), sources=hub(1, revision="c0ffee"), step_seconds=0.0005)
    async with serving(*groups) as served:
        await tokens_of(served.submit([1], served.use("org/a0")))
        await on_both(served, "org/a0")
        second = next(shards for shards in groups if shards.requests[0].expect_digest)
        assert (second.requests[0].expect_digest, second.requests[0].revision) == ("sha-org/a0", "c0ffee")
        assert [shards.downloads for shards in groups] == [["org/a0"]] * 2


async def test_bytes_that_only_one_group_can_have_are_served_there() -> None:
    """The source has changed since the first fetch: the second group is refused, and nobody notices."""
    groups = replicas(2, sources=hub(1), step_seconds=0.0005)
    async with serving(*groups) as served:
        use = served.use("org/a0")
        await tokens_of(served.submit([1], use))
        groups[0].sources["org/a0"].content = "other"
        requests = [served.submit([i], use, max_tokens=200) for i in range(24)]
        for index, request in enumerate(requests):
            assert await tokens_of(request) == expected([index], "org/a0", 200)
        assert sum(len(shards.downloads) for shards in groups) == 2, "the second group tried"
        assert served.metrics.adapter_failures == 1
        assert served.status("org/a0").state is AdapterState.RESIDENT
        await served.at_baseline()


async def test_a_lost_group_leaves_its_work_to_the_other() -> None:
    groups = replicas(2, info=make_info(rows=2), sources=hub(1), step_seconds=0.002)
    async with serving(*groups) as served:
        use = served.use("org/a0")
        running = [served.submit([i], max_tokens=300) for i in range(4)]
        for request in running:
            await first_token(request)
        waiting = [served.submit([i], use, max_tokens=20) for i in range(10, 20)]
        groups[0].returns = False
        groups[0].lose()
        ends = await asyncio.gather(*(tokens_of(request) for request in running), return_exceptions=True)
        lost = [end for end in ends if isinstance(end, ShardLost)]
        assert len(lost) == 2
        assert served.engine.ready
        assert (served.engine.group_ready(0), served.engine.group_ready(1)) == (False, True)
        for index, request in enumerate(waiting, start=10):
            assert await tokens_of(request) == expected([index], "org/a0", 20)
        await served.at_baseline()
        assert served.metrics.groups_lost == 1
        assert served.metrics.snapshot().groups_ready == 1


async def test_what_has_started_without_a_token_runs_again_elsewhere() -> None:
    groups = replicas(2)
    async with serving(*groups) as served:
        groups[0].pause()
        requests = [served.submit([i]) for i in range(6)]
        await until(lambda: groups[0].plans)
        groups[0].returns = False
        groups[0].lose()
        for index, request in enumerate(requests):
            assert await tokens_of(request) == expected([index])
        assert rows_started(groups[1]) == 6
        await served.at_baseline()


async def test_a_group_that_comes_back_takes_over_what_waits() -> None:
    groups = replicas(2, info=make_info(rows=2), step_seconds=0.001)
    async with serving(*groups) as served:
        groups[0].returns = False
        groups[0].lose()
        requests = [served.submit([i], max_tokens=50) for i in range(40)]
        await until(lambda: rows_started(groups[1]) >= 2)
        before = rows_started(groups[0])
        groups[0].connect()
        for index, request in enumerate(requests):
            assert await tokens_of(request) == expected([index], count=50)
        assert rows_started(groups[0]) - before >= 15
        await served.at_baseline()


async def test_without_any_group_requests_wait_for_one() -> None:
    groups = replicas(2)
    async with serving(*groups, patience_lost=0.3) as served:
        for shards in groups:
            shards.returns = False
            shards.lose()
        await asyncio.sleep(0.01)
        assert not served.engine.ready
        request = served.submit([1])
        groups[1].connect()
        assert await tokens_of(request) == expected([1])
        groups[1].lose()
        waiting = served.submit([2])
        with pytest.raises(ShardLost):
            await tokens_of(waiting)
        with pytest.raises(Overloaded):
            served.submit([3])


async def test_the_engine_is_ready_once_every_group_was() -> None:
    late = FakeShards()
    groups = (*replicas(1), late)
    late._epochs = groups[0]._epochs
    connect, late.connect = late.connect, lambda: None  # type: ignore[method-assign]
    started = asyncio.Event()

    async def serve() -> None:
        async with serving(*groups):
            started.set()

    task = asyncio.create_task(serve())
    await asyncio.sleep(0.05)
    assert not started.is_set()
    connect()
    async with asyncio.timeout(5):
        await task
    assert started.is_set()


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_digest", "other"), ("dtype", "bfloat16"), ("max_model_len", 100), ("max_rank", 8)],
)
async def test_a_group_that_differs_is_not_used(
    name: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    groups = replicas(2)
    other = make_info()
    setattr(other, name, value)
    groups[1].info = other
    with caplog.at_level(logging.ERROR, "loraplex.router.core"):
        async with serving(*groups) as served:
            requests = [served.submit([i]) for i in range(8)]
            for index, request in enumerate(requests):
                assert await tokens_of(request) == expected([index])
            assert not groups[1].plans
            assert not served.engine.group_ready(1)
    (record,) = [record for record in caplog.records if "not used" in record.getMessage()]
    assert name in record.getMessage()
    assert str(value) in record.getMessage()


async def test_groups_with_less_memory_get_what_they_can_hold() -> None:
    groups = replicas(2)
    groups[1].info = make_info(blocks=10)
    async with serving(*groups) as served:
        assert served.engine.model.max_model_len == 40
        requests = [served.submit([i] * 20, max_tokens=15) for i in range(8)]
        for index, request in enumerate(requests):
            assert await tokens_of(request) == expected([index] * 20, count=15)
        assert all(shards.plans for shards in groups)


async def test_an_idle_group_takes_over_what_a_full_one_cannot_start() -> None:
    groups = replicas(2, info=make_info(rows=2), step_seconds=0.001)
    async with serving(*groups) as served:
        groups[1].pause()
        requests = [served.submit([i], max_tokens=5) for i in range(8)]
        await until(lambda: sum(request.stream.closed for request in requests) == 6)
        groups[1].resume()
        for index, request in enumerate(requests):
            assert await tokens_of(request) == expected([index], count=5)
        assert served.metrics.takeovers >= 2
        await served.at_baseline()


async def test_unload_frees_every_group() -> None:
    groups = replicas(2, info=make_info(rows=4), sources=hub(2, bytes=70), step_seconds=0.0005)
    async with serving(*groups) as served:
        await on_both(served, "org/a0")
        status = served.status("org/a0")
        assert (status.state, status.bytes) == (AdapterState.RESIDENT, 70)
        running = served.submit([1], served.use("org/a0"), max_tokens=50)
        assert await served.engine.unload_adapter("org/a0", tenant="") == 140
        assert len(await tokens_of(running)) == 50
        assert all(not shards.device.slots for shards in groups)
        with pytest.raises(AdapterNotFound):
            served.use("org/a0")
        await served.at_baseline()


async def test_a_load_by_name_comes_to_one_group_and_its_pin_stays_with_one() -> None:
    groups = replicas(2, info=make_info(slots=1), sources=hub(3), step_seconds=0.0005)
    async with serving(*groups) as served:
        await served.load("mine", "org/a0", pin=True)
        assert sorted(len(shards.loads) for shards in groups) == [0, 1]
        for index in range(6):
            name = f"org/a{1 + index % 2}"
            assert await tokens_of(served.submit([index], served.use(name))) == expected([index], name)
        assert served.status("mine").state is AdapterState.RESIDENT, "a full group sends others elsewhere"
        holder = next(s for s in groups if "sha-org/a0" in s.device.slots.values())
        holder.returns = False
        holder.lose()
        other = next(s for s in groups if s is not holder)
        await until(lambda: list(other.device.slots.values()) == ["sha-org/a0"])
        with pytest.raises(Overloaded, match="unpin"):
            await tokens_of(served.submit([1], served.use("org/a1")))
        await served.at_baseline()


async def test_a_load_goes_on_with_another_group() -> None:
    groups = replicas(2, sources=hub(1, fetch_seconds=0.05))
    async with serving(*groups) as served:
        load = asyncio.create_task(served.load("name", "org/a0"))
        await until(lambda: any(shards.downloads for shards in groups))
        first = next(shards for shards in groups if shards.downloads)
        first.returns = False
        first.lose()
        assert (await load).state is AdapterState.RESIDENT
        assert served.group_of("org/a0") is not first
        await served.at_baseline()


async def test_a_new_version_replaces_the_old_one_on_every_group() -> None:
    groups = replicas(2, info=make_info(rows=4), sources=hub(1), step_seconds=0.0005)
    async with serving(*groups) as served:
        await on_both(served, "org/a0")
        groups[0].sources["org/a0"].content = "new"
        assert (await served.load("org/a0", "org/a0")).digest == "sha-org/a0-new"
        assert await tokens_of(await served.ask([1], "org/a0")) == generate(
            [1], 8, entries=(("sha-org/a0-new", 1.0),)
        )
        await until(lambda: sum(len(shards.device.slots) for shards in groups) == 1)
        await served.at_baseline()


async def test_what_an_adapter_ships_is_asked_of_a_group_that_has_it() -> None:
    text = FakeAdapter(text=shard_pb2.TokenizerReply(chat_template="x"))
    groups = replicas(2, sources={"org/text": text})
    async with serving(*groups) as served:
        (adapter,) = await served.prepared("org/text")
        reply = await served.engine.tokenizer(adapter.manifest.digest)
        assert reply.chat_template == "x"
        (holder,) = [shards for shards in groups if shards.downloads]
        assert holder.tokenizers_asked == [adapter.manifest.digest]
        assert (await served.engine.tokenizer()).stop_ids == [0]
        with pytest.raises(ShardLost):
            await served.engine.tokenizer("unknown")


async def test_an_adapter_that_fails_everywhere_is_refused() -> None:
    sources = {"org/bad": FakeAdapter(error=AdapterRejected("tensor q_proj"))}
    groups = replicas(2, sources=sources)
    async with serving(*groups) as served:
        requests = [served.submit([i], served.use("org/bad")) for i in range(4)]
        for request in requests:
            with pytest.raises(AdapterRejected, match="q_proj"):
                await tokens_of(request)
        assert served.status("org/bad").state is AdapterState.FAILED
        await served.at_baseline()


async def test_drain_lets_every_group_finish() -> None:
    groups = replicas(2, info=make_info(rows=2), step_seconds=0.001)
    async with serving(*groups) as served:
        requests = [served.submit([i], max_tokens=30) for i in range(10)]
        drain = asyncio.create_task(served.engine.drain(20.0))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            served.submit([1])
        assert not served.engine.group_ready(0)
        await drain
        for index, request in enumerate(requests):
            assert await tokens_of(request) == expected([index], count=30)
        assert all(rows_started(shards) for shards in groups)
        await served.at_baseline()


async def test_a_group_that_is_about_to_stop_finishes_what_runs_and_gets_nothing_new() -> None:
    groups = replicas(2, info=make_info(rows=4), step_seconds=0.001)
    async with serving(*groups) as served:
        requests = [served.submit([i], max_tokens=60) for i in range(16)]
        for request in requests[:4]:
            await first_token(request)
        epoch = groups[0].epoch
        groups[0].drain()
        await asyncio.sleep(0.01)
        assert (served.engine.group_ready(0), served.engine.ready) == (False, True)
        before = rows_started(groups[0])
        later = [served.submit([i], max_tokens=10) for i in range(20, 30)]
        await until(lambda: groups[0].released == [epoch])
        assert rows_started(groups[0]) == before
        for index, request in enumerate(requests[4:], start=4):
            assert await tokens_of(request) == expected([index], count=60)
        for index, request in enumerate(later, start=20):
            assert await tokens_of(request) == expected([index], count=10)
        assert served.metrics.groups_lost == 0
        groups[0].connect()
        await until(lambda: served.engine.group_ready(0))
        await served.at_baseline()


async def test_an_only_group_that_stops_in_order_is_waited_for() -> None:
    shards = FakeShards(step_seconds=0.001)
    async with serving(shards) as served:
        running = served.submit([1], max_tokens=40)
        await until(lambda: shards.plans)
        shards.drain()
        await asyncio.sleep(0)
        waiting = served.submit([2])
        assert await tokens_of(running) == expected([1], count=40)
        await until(lambda: shards.released)
        assert not served.engine.ready
        shards.connect()
        assert await tokens_of(waiting) == expected([2])
        await served.at_baseline()


async def test_any_group_may_be_lost_at_any_time() -> None:
    groups = replicas(3, info=make_info(rows=4, blocks=60), sources=hub(6), step_seconds=0.0005)
    rng = random.Random(3)
    async with serving(*groups) as served:
        asked = []
        for index in range(150):
            name = f"org/a{rng.randrange(6)}"
            count = rng.randrange(1, 40)
            asked.append((served.submit([index], served.use(name), max_tokens=count), index, name, count))
            if index % 30 == 29:
                await asyncio.sleep(0.02)
                groups[rng.randrange(3)].lose()
        ends = await asyncio.gather(*(tokens_of(request) for request, *_ in asked), return_exceptions=True)
        for end, (_, index, name, count) in zip(ends, asked, strict=True):
            if not isinstance(end, ShardLost):
                assert end == expected([index], name, count)
        finished = sum(isinstance(end, list) for end in ends)
        assert finished >= 90, finished
        await served.at_baseline()
        assert served.metrics.groups_lost == 5
