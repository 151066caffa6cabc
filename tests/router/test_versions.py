"""One name, several versions one after the other: reloads, unloads, lost groups."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loraplex.router.client import AdapterState, Manifest
from loraplex.router.config import AdapterSpec
from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    Overloaded,
    RouterError,
)
from loraplex.router.messages import Fetched
from loraplex.router.request import AdapterChoice, Request
from loraplex.router.sums import uses_in

from ..fakes.polling import until
from ..fakes.shard import FakeAdapter, FakeShards, generate, make_info
from .served import Served, hub, query, read, serving, tokens_of


def expected(prompt: list[int], digest: str, count: int = 8, weight: float = 1.0) -> list[int]:
    return generate(prompt, count, entries=((digest, weight),))


async def running(served: Served, name: str, prompt: list[int], count: int) -> Request:
    """A request that has its first token."""
    request = await served.ask(prompt, name, max_tokens=count)
    await until(lambda: request.stream._events)
    return request


async def test_new_bytes_under_the_same_name_are_a_new_version() -> None:
    shards = FakeShards(sources=hub(1), step_seconds=0.002)
    async with serving(shards) as served:
        first = await served.load("name", "org/a0")
        before = await running(served, "name", [1], 200)
        shards.sources["org/a0"].content = "new"
        second = await served.load("name", "org/a0")
        assert (first.digest, second.digest) == ("sha-org/a0", "sha-org/a0-new")
        assert second.state is AdapterState.RESIDENT
        assert served.status("name").digest == "sha-org/a0-new"
        after = await served.ask([2], "name")
        assert not before.stream.closed
        assert await tokens_of(after) == expected([2], "sha-org/a0-new")
        assert len(shards.device.slots) == 2
        assert await tokens_of(before) == expected([1], "sha-org/a0", 200)
        await until(lambda: len(shards.device.slots) == 1)
        assert list(shards.device.slots.values()) == ["sha-org/a0-new"]
        await served.at_baseline()


async def test_a_reload_from_another_source_replaces_the_name() -> None:
    async with serving(FakeShards(sources=hub(2))) as served:
        await served.load("name", "org/a0", pin=True)
        status = await served.load("name", "org/a1")
        assert (status.digest, status.source, status.pinned) == ("sha-org/a1", "hub:org/a1", True)
        assert await tokens_of(await served.ask([1], "name")) == expected([1], "sha-org/a1")
        await until(lambda: list(served.shards.device.slots.values()) == ["sha-org/a1"])
        await served.at_baseline()


async def test_a_reload_that_finds_the_same_bytes_changes_nothing_but_scaling_and_pin() -> None:
    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        held = await served.prepared("name")
        status = await served.load("name", "org/a0", scaling=0.5, pin=True)
        assert (status.scaling, status.pinned, status.digest) == (0.5, True, "sha-org/a0")
        assert await served.prepared("name") != held
        assert shards.loads == ["sha-org/a0"]
        assert shards.downloads == ["org/a0", "org/a0"], "the source was asked again"
        assert await tokens_of(await served.ask([1], "name")) == expected([1], "sha-org/a0", weight=0.5)
        assert (await served.load("name", "org/a0")).scaling == 1
        await served.at_baseline()


async def test_a_failed_reload_leaves_the_old_version_serving() -> None:
    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        shards.sources["org/a0"].error = AdapterFetchFailed("the hub said 503")
        with pytest.raises(AdapterFetchFailed, match="503"):
            await served.load("name", "org/a0")
        with pytest.raises(AdapterNotFound, match="org/none"):
            await served.load("name", "org/none")
        assert await tokens_of(await served.ask([1], "name")) == expected([1], "sha-org/a0")
        shards.sources["org/a0"] = FakeAdapter(content="new")
        shards.load_error = AdapterRejected("tensor q_proj has a wrong shape")
        with pytest.raises(AdapterRejected, match="q_proj"):
            await served.load("name", "org/a0")
        shards.load_error = None
        status = served.status("name")
        assert (status.digest, status.state, status.error) == ("sha-org/a0", AdapterState.RESIDENT, "")
        await served.at_baseline()
        assert len(served.engine._core.registry) == 1
        assert (await served.load("name", "org/a0")).digest == "sha-org/a0-new"


async def test_a_reload_without_room_fails_and_the_old_version_stays() -> None:
    shards = FakeShards(make_info(slots=1), sources=hub(1))
    async with serving(shards) as served:
        await served.load("name", "org/a0", pin=True)
        shards.sources["org/a0"].content = "new"
        with pytest.raises(Overloaded, match="unpin"):
            await served.load("name", "org/a0")
        assert served.status("name").digest == "sha-org/a0"
        await served.at_baseline()
        await served.engine.pin_adapter("name", False, tenant="")
        assert (await served.load("name", "org/a0")).digest == "sha-org/a0-new"


async def test_what_was_prepared_before_a_reload_runs_on_its_version() -> None:
    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        async with served.engine.prepare(query("name")) as adapters:
            shards.sources["org/a0"].content = "new"
            await served.load("name", "org/a0")
            await asyncio.sleep(0.02)
            assert len(shards.device.slots) == 2
            late = served.submit([3], *uses_in([3], adapters))
        assert await tokens_of(late) == expected([3], "sha-org/a0")
        await until(lambda: len(shards.device.slots) == 1)
        await served.at_baseline()


async def test_no_request_mixes_versions_while_names_are_reloaded() -> None:
    shards = FakeShards(make_info(blocks=40, rows=8), sources=hub(1), step_seconds=0.0005)
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        asked = []
        for version in range(6):
            asked += [(await served.ask([i] * 5, "name", max_tokens=20), i) for i in range(10)]
            shards.sources["org/a0"].content = f"v{version}"
            await served.load("name", "org/a0")
        digests = ["sha-org/a0", *(f"sha-org/a0-v{version}" for version in range(6))]
        seen = set()
        for request, index in asked:
            tokens = await tokens_of(request)
            (digest,) = [d for d in digests if tokens == expected([index] * 5, d, 20)]
            seen.add(digest)
        assert len(seen) >= 2
        assert served.metrics.preemptions > 0
        await served.at_baseline()
        assert len(served.engine._core.registry) == 1


async def test_concurrent_loads_of_one_name_all_end() -> None:
    shards = FakeShards(sources=hub(3, fetch_seconds=0.01))
    async with serving(shards) as served:
        await asyncio.gather(*(served.load("name", f"org/a{index % 3}") for index in range(9)))
        await served.at_baseline()
        assert len(served.engine._core.registry) == 1
        (digest,) = shards.device.slots.values()
        assert served.status("name").digest == digest


async def test_a_name_of_first_use_keeps_its_commit_until_it_is_loaded() -> None:
    sources = {"org/a": FakeAdapter(revision="c0ffee", content="one")}
    shards = FakeShards(sources=sources)
    async with serving(shards) as served:
        await tokens_of(await served.ask([1], "org/a"))
        shards.lose()
        await until(lambda: served.engine.ready)
        assert await tokens_of(await served.ask([1], "org/a")) == expected([1], "sha-org/a-one")
        again = shards.requests[-1]
        assert (again.revision, again.expect_digest) == ("c0ffee", "sha-org/a-one")
        sources["org/a"] = FakeAdapter(revision="beef", content="two")
        assert (await served.load("org/a", "org/a")).digest == "sha-org/a-two"
        assert (shards.requests[-1].revision, shards.requests[-1].expect_digest) == ("", "")


async def test_bytes_that_are_gone_after_a_loss_end_requests_with_an_error() -> None:
    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        shards.pause()
        waiting = await served.ask([1], "name")
        await asyncio.sleep(0.01)
        shards.sources["org/a0"].content = "other"
        shards.lose()
        shards.resume()
        with pytest.raises(AdapterRejected, match="name: its files have changed"):
            await tokens_of(waiting)
        with pytest.raises(AdapterRejected):
            await served.ask([1], "name")
        assert served.status("name").state is AdapterState.FAILED
        assert (await served.load("name", "org/a0")).digest == "sha-org/a0-other"
        assert await tokens_of(await served.ask([1], "name")) == expected([1], "sha-org/a0-other")
        await served.at_baseline()


async def test_bytes_that_come_back_serve_again_once_they_are_loaded() -> None:
    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        shards.sources["org/a0"].content = "other"
        shards.lose()
        with pytest.raises(AdapterRejected):
            await tokens_of(await served.ask([1], "name"))
        shards.sources["org/a0"].content = ""
        async with asyncio.timeout(0.5):
            status = await served.load("name", "org/a0")
            assert (status.state, status.error) == (AdapterState.RESIDENT, "")
            assert await tokens_of(await served.ask([1], "name")) == expected([1], "sha-org/a0")
        await served.at_baseline()


async def test_other_bytes_than_expected_are_refused_even_if_a_shard_delivers_them() -> None:
    shards = FakeShards(sources=hub(1))
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        adapter = served.engine._core.registry.find("name", "")
        served.engine._post(Fetched(adapter.key, shards.epoch, Manifest(digest="forged"), 0.0))
        await until(lambda: adapter.state is AdapterState.FAILED)
        assert adapter.digest == "sha-org/a0"
        with pytest.raises(AdapterRejected, match="other bytes now"):
            await served.ask([1], "name")


async def test_versions_of_a_lost_group_are_forgotten_once_unused() -> None:
    shards = FakeShards(sources=hub(1), step_seconds=0.002)
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        old = await running(served, "name", [1], 1000)
        shards.sources["org/a0"].content = "new"
        await served.load("name", "org/a0")
        shards.lose()
        with pytest.raises(RouterError):
            await tokens_of(old)
        await until(lambda: len(served.engine._core.registry) == 1)
        assert await tokens_of(await served.ask([1], "name")) == expected([1], "sha-org/a0-new")
        await served.at_baseline()


async def test_a_load_survives_a_lost_group() -> None:
    shards = FakeShards(sources=hub(1, fetch_seconds=0.05))
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        shards.sources["org/a0"].content = "new"
        reload = asyncio.create_task(served.load("name", "org/a0"))
        await asyncio.sleep(0.02)
        shards.lose()
        assert (await reload).digest == "sha-org/a0-new"
        await served.at_baseline()


# Unload.


async def test_unload_drains_what_runs_and_waits_and_never_comes_back() -> None:
    shards = FakeShards(make_info(rows=2), sources=hub(1, bytes=70), step_seconds=0.001)
    async with serving(shards) as served:
        requests = [await served.ask([index], "org/a0", max_tokens=30) for index in range(5)]
        unload = asyncio.create_task(served.engine.unload_adapter("org/a0", tenant="any"))
        await asyncio.sleep(0.005)
        for tenant_choice in ("org/a0", AdapterChoice("org/a0", 0.5)):
            with pytest.raises(AdapterNotFound):
                await served.ask([9], tenant_choice)
        assert await unload == 70
        for index, request in enumerate(requests):
            assert request.stream.closed, "answered only when everything was over"
            assert await tokens_of(request) == expected([index], "sha-org/a0", 30)
        assert shards.device.slots == {}
        with pytest.raises(AdapterNotFound):
            await served.ask([1], "org/a0")
        with pytest.raises(AdapterNotFound):
            await served.engine.unload_adapter("org/a0", tenant="")
        assert served.engine.adapters(tenant="") == []
        await served.at_baseline()
        await served.load("org/a0", "org/a0")
        assert await tokens_of(await served.ask([1], "org/a0")) == expected([1], "sha-org/a0")


async def test_unload_frees_every_version_and_ends_a_reload() -> None:
    shards = FakeShards(sources=hub(2, bytes=70), step_seconds=0.002)
    async with serving(shards) as served:
        await served.load("name", "org/a0")
        old = await running(served, "name", [1], 100)
        await served.load("name", "org/a1")
        shards.sources["org/a0"] = FakeAdapter(content="third", fetch_seconds=0.05)
        third = asyncio.create_task(served.load("name", "org/a0"))
        await asyncio.sleep(0.01)
        assert await served.engine.unload_adapter("name", tenant="") == 140
        with pytest.raises(AdapterNotFound, match="unloaded"):
            await third
        assert old.stream.closed
        assert (await read(old))[0] == expected([1], "sha-org/a0", 100)
        await until(lambda: len(served.engine._core.registry) == 0)
        assert shards.device.slots == {}
        await served.at_baseline()


async def test_unload_of_what_is_not_resident_frees_nothing() -> None:
    async with serving(FakeShards(sources=hub(1))) as served:
        served.use("org/a0")
        assert await served.engine.unload_adapter("org/a0", tenant="") == 0


# Scaling.


async def test_scaling_multiplies_every_use(tmp_path: Path) -> None:
    shards = FakeShards(sources=hub(1) | {str(tmp_path): FakeAdapter()})
    async with serving(shards, adapters=(AdapterSpec("cli", str(tmp_path), -0.5),)) as served:
        status = await served.load("half", "org/a0", scaling=0.5)
        assert status.scaling == 0.5
        request = await served.ask([1], AdapterChoice("half", 3.0), "cli")
        entries = (("sha-org/a0", 1.5), (f"sha-{tmp_path}", -0.5))
        assert await tokens_of(request) == generate([1], 8, entries=entries)
        await served.load("half", "org/a0", scaling=0.0)
        assert await tokens_of(await served.ask([1], "half")) == expected([1], "sha-org/a0", weight=0.0)
        with pytest.raises(InvalidRequest, match="scaling"):
            await served.load("half", "org/a0", scaling=101.0)


async def test_what_serves_alone_takes_no_scaling() -> None:
    shards = FakeShards(sources=hub(1, manifest={"alone": "DoRA"}))
    async with serving(shards, adapters=(AdapterSpec("cli", "org/a0", 0.5),)) as served:
        with pytest.raises(AdapterRejected, match=r"name: it takes no scaling but 1, not 0.5.*DoRA"):
            await served.load("name", "org/a0", scaling=0.5)
        with pytest.raises(AdapterRejected, match=r"cli: it takes no scaling"):
            await served.ask([1], "cli")
        await served.load("name", "org/a0")
        with pytest.raises(AdapterRejected, match="scaling"):
            await served.load("name", "org/a0", scaling=2.0)
        assert (served.status("name").scaling, served.status("name").error) == (1.0, "")
        assert await tokens_of(await served.ask([1], "name")) == expected([1], "sha-org/a0")
        await served.at_baseline()


async def test_metrics_show_the_digests_of_what_is_resident() -> None:
    async with serving(FakeShards(sources=hub(1, bytes=70))) as served:
        await served.load("one", "org/a0")
        await served.load("two", "org/a0")
        (family,) = [f for f in served.metrics.collect() if f.name == "loraplex_adapter_resident_bytes"]
        assert [(s.labels, s.value) for s in family.samples] == [({"digest": "sha-org/a0"}, 140)]
