"""Before a request is accepted: its adapters are fetched and known, within bounds."""

from __future__ import annotations

import asyncio

import pytest

from loraplex.proto import shard_pb2
from loraplex.router.client import AdapterState
from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    Draining,
    Overloaded,
    RouterError,
    ShardLost,
    TooManyRequests,
)
from loraplex.router.request import AdapterChoice

from ..fakes.polling import until
from ..fakes.shard import FakeAdapter, FakeShards, generate, make_info
from .served import Served, hub, query, serving, tokens_of

SLOW = {"org/slow": FakeAdapter(fetch_seconds=60)}


def asking(served: Served, name: str, tenant: str = "") -> asyncio.Task[object]:
    async def prepare() -> object:
        async with served.engine.prepare(query(name, tenant=tenant)) as adapters:
            return adapters

    return asyncio.create_task(prepare())


def waiting(served: Served, name: str = "org/slow") -> int:
    return served.status(name).waiting


async def test_it_tells_the_version_the_weight_and_what_the_adapter_is() -> None:
    facts = {"kind": "aLoRA", "owns": ["lm_head"], "invocation_tokens": [7, 8], "vocab_size": 1005}
    async with serving(FakeShards(sources=hub(1, manifest=facts))) as served:
        (adapter,) = await served.prepared(AdapterChoice("org/a0", 0.25))
        assert (adapter.name, adapter.weight) == ("org/a0", 0.25)
        manifest = adapter.manifest
        assert (manifest.digest, manifest.kind, manifest.owns) == ("sha-org/a0", "aLoRA", ("lm_head",))
        assert (manifest.invocation_tokens, manifest.vocab_size) == ((7, 8), 1005)
        assert not manifest.ships_text
        status = served.status("org/a0")
        assert (status.kind, status.digest, status.state) == ("aLoRA", "sha-org/a0", AdapterState.ON_DISK)


async def test_it_fetches_but_does_not_load() -> None:
    async with serving(FakeShards(sources=hub(2))) as served:
        await served.prepared("org/a0", "org/a1")
        await asyncio.sleep(0.02)
        assert sorted(served.shards.downloads) == ["org/a0", "org/a1"]
        assert served.shards.loads == []
        assert await tokens_of(await served.ask([1], "org/a0")) == generate(
            [1], 8, entries=(("sha-org/a0", 1.0),)
        )
        await served.at_baseline()


async def test_what_is_on_disk_costs_no_turn_of_the_loop() -> None:
    async with serving(FakeShards(sources=hub(2))) as served:
        await served.prepared("org/a0", "org/a1")
        entering = served.engine.prepare(query("org/a0", "org/a1"))
        step = entering.__aenter__()
        with pytest.raises(StopIteration) as done:
            step.send(None)  # type: ignore[attr-defined]
        assert len(done.value.value) == 2
        await entering.__aexit__(None, None, None)
        await served.at_baseline()


async def test_a_hundred_calls_wait_for_one_fetch() -> None:
    async with serving(FakeShards(sources={"org/a": FakeAdapter(fetch_seconds=0.05)})) as served:
        tasks = [asyncio.create_task(served.ask([i], "org/a", max_tokens=2)) for i in range(100)]
        await asyncio.sleep(0.02)
        assert waiting(served, "org/a") == 100
        for index, task in enumerate(tasks):
            assert await tokens_of(await task) == generate([index], 2, entries=(("sha-org/a", 1.0),))
        assert served.shards.downloads == ["org/a"]
        await served.at_baseline()


async def test_who_waits_counts_against_the_queues() -> None:
    sources = SLOW | {"org/slower": FakeAdapter(fetch_seconds=60)}
    async with serving(FakeShards(sources=sources), max_queued_requests=4) as served:
        tasks = [asking(served, "org/slow") for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(TooManyRequests) as caught:
            await asking(served, "org/slow")
        assert caught.value.retry_after
        tasks += [asking(served, "org/slower", "acme") for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            served.submit([1])
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert waiting(served) == 1
        tasks[0] = asking(served, "org/slow")
        await asyncio.sleep(0.01)
        assert waiting(served) == 2
        assert served.metrics.refusals["too_many_requests"] == 1
        for task in tasks:
            task.cancel()
        await served.at_baseline()


async def test_a_client_that_goes_leaves_nothing_behind() -> None:
    async with serving(FakeShards(sources=SLOW)) as served:
        task = asking(served, "org/slow")
        await asyncio.sleep(0.01)
        assert waiting(served) == 1
        task.cancel()
        await asyncio.sleep(0.01)
        assert waiting(served) == 0
        await served.at_baseline()


async def test_a_failure_is_the_adapters_own_and_is_remembered_with_backoff() -> None:
    sources = {"org/bad": FakeAdapter(error=AdapterFetchFailed("the hub said 503"))} | hub(1)
    async with serving(FakeShards(sources=sources)) as served:
        tasks = [asking(served, "org/bad") for _ in range(3)]
        tasks.append(asyncio.create_task(served.prepared("org/a0", "org/bad")))
        for task in tasks:
            with pytest.raises(AdapterFetchFailed, match=r"org/bad.*503"):
                await task
        with pytest.raises(AdapterFetchFailed) as caught:
            await served.prepared("org/bad")
        assert caught.value.retry_after
        assert served.shards.downloads.count("org/bad") == 1
        sources["org/bad"].error = None
        await asyncio.sleep(1.3)
        await served.prepared("org/bad")
        await served.at_baseline()


async def test_the_unknown_is_refused_before_anything_is_fetched() -> None:
    async with serving(FakeShards(sources=hub(1))) as served:
        with pytest.raises(AdapterNotFound):
            await served.prepared("org/a0", "nothing")
        assert served.shards.downloads == []
        assert served.metrics.refusals["model_not_found"] == 1
        await served.at_baseline()


async def test_a_drain_ends_the_wait() -> None:
    async with serving(FakeShards(sources=SLOW)) as served:
        tasks = [asking(served, "org/slow") for _ in range(2)]
        await asyncio.sleep(0.01)
        await served.engine.drain(5.0)
        for task in tasks:
            with pytest.raises(Draining):
                await task
        with pytest.raises(Draining):
            await served.prepared("org/slow")


async def test_a_lost_group_is_waited_for() -> None:
    shards = FakeShards(sources={"org/a": FakeAdapter(fetch_seconds=0.05)})
    async with serving(shards) as served:
        shards.returns = False
        task = asking(served, "org/a")
        await asyncio.sleep(0.02)
        shards.lose()
        await asyncio.sleep(0.1)
        assert not task.done()
        shards.connect()
        await task
        assert shards.downloads == ["org/a", "org/a"]
        await served.at_baseline()


async def test_a_group_that_stays_away_is_not_waited_for_longer_than_requests_wait() -> None:
    shards = FakeShards(sources=SLOW)
    async with serving(shards, patience_lost=0.3) as served:
        shards.returns = False
        task = asking(served, "org/slow")
        await asyncio.sleep(0.01)
        shards.lose()
        with pytest.raises(ShardLost):
            await task
        with pytest.raises(Overloaded):
            await served.prepared("org/slow")


async def test_what_is_known_needs_no_group() -> None:
    """A request can wait in its queue instead; what ships text must be asked for it."""
    text = FakeAdapter(text=shard_pb2.TokenizerReply(chat_template="x"))
    shards = FakeShards(sources=hub(1) | {"org/text": text})
    async with serving(shards) as served:
        await served.prepared("org/a0", "org/text")
        shards.returns = False
        shards.lose()
        await asyncio.sleep(0.01)
        request = await served.ask([1], "org/a0")
        task = asking(served, "org/text")
        await asyncio.sleep(0.02)
        assert not task.done()
        shards.connect()
        await task
        assert len(await tokens_of(request)) == 8
        await served.at_baseline()


async def test_an_unload_waits_for_who_prepares() -> None:
    shards = FakeShards(sources={"org/a": FakeAdapter(fetch_seconds=0.05)})
    async with serving(shards) as served:
        asked = asyncio.create_task(served.ask([1], "org/a", max_tokens=3))
        await asyncio.sleep(0.01)
        unload = asyncio.create_task(served.engine.unload_adapter("org/a", tenant=""))
        request = await asked
        assert not unload.done()
        assert len(await tokens_of(request)) == 3
        assert await unload == 100
        await served.at_baseline()


async def test_more_adapters_than_room_are_prepared_but_not_accepted() -> None:
    async with serving(FakeShards(make_info(slots=1), sources=hub(2))) as served:
        with pytest.raises(RouterError, match="at most 1 adapters"):
            await served.ask([1], "org/a0", "org/a1")
        await served.at_baseline()


async def test_close_ends_the_wait() -> None:
    async with serving(FakeShards(sources=SLOW)) as served:
        task = asking(served, "org/slow")
        await until(lambda: served.shards.downloads)
        await served.engine.close()
        with pytest.raises(Draining):
            await task
