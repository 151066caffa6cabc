"""Adapters on their way to the device: what is reserved, made resident and given back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.shard.adapters.loading import AdapterLoading
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.upload import PlacedAdapter
from loraplex.shard.adapters.weights import PackedAdapter
from loraplex.shard.device import DeviceThread
from loraplex.shard.errors import AdapterMemoryFull, EpochEnded, SlotBusy

from .test_pool import Recorder, packed


class Gate:
    """An uploader whose uploads end when they are let through, or fail."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_through = threading.Event()
        self.failure: Exception | None = None
        self.handed_over_on: list[str] = []

    def upload(self, adapter: PackedAdapter) -> PlacedAdapter:
        self.begun.set()
        assert self.let_through.wait(timeout=60)
        if self.failure is not None:
            raise self.failure
        return PlacedAdapter.of(adapter)

    def hand_over(self, adapter: PlacedAdapter) -> None:
        self.handed_over_on.append(threading.current_thread().name)


class Loads:
    """A pool for exactly one adapter, and the way into it."""

    def __init__(self, adapter: PackedAdapter) -> None:
        self.adapter = adapter
        self.site = Recorder()
        self.thread = DeviceThread()
        self.thread.start()
        self.pool = AdapterPool([self.site], slots=4, budget=adapter.nbytes)
        self.gate = Gate()
        self.loading = AdapterLoading(self.thread, self.pool, self.gate)

    async def begin(self, slot: int = 1, digest: str = "d") -> asyncio.Task[None]:
        """A load that has its slot and waits for its upload."""
        task = asyncio.create_task(self.loading.load(slot, digest, self.adapter))
        await asyncio.to_thread(self.gate.begun.wait, 60)
        return task

    async def is_empty(self) -> bool:
        """Once the device thread has done what it was given."""
        await self.thread.submit(lambda: None)
        return self.pool.used_bytes == 0 and not self.site.held


@pytest.fixture
def loads(tmp_path: Path) -> Iterator[Loads]:
    result = Loads(packed(tmp_path))
    yield result
    result.gate.let_through.set()
    result.thread.stop()


async def test_the_device_thread_goes_on_while_an_adapter_is_on_its_way(loads: Loads) -> None:
    load = await loads.begin()
    assert await loads.thread.submit(lambda: loads.pool.digest_of(1)) is None, "not yet to be named"
    assert loads.pool.used_bytes == loads.adapter.nbytes
    loads.gate.let_through.set()
    await load
    assert (loads.pool.digest_of(1), list(loads.site.held)) == ("d", [1])
    assert loads.gate.handed_over_on == ["device"]


async def test_what_is_resident_is_not_sent_again(loads: Loads) -> None:
    loads.gate.let_through.set()
    await loads.loading.load(1, "d", loads.adapter)
    loads.gate.begun.clear()
    await loads.loading.load(1, "d", loads.adapter)
    assert not loads.gate.begun.is_set()
    assert await loads.loading.unload(1) == loads.adapter.nbytes
    assert await loads.is_empty()


async def test_an_adapter_on_its_way_holds_its_slot_and_bytes(loads: Loads) -> None:
    load = await loads.begin()
    with pytest.raises(SlotBusy, match="slot 1"):
        await loads.loading.load(1, "d", loads.adapter)
    with pytest.raises(AdapterMemoryFull):
        await loads.loading.load(2, "e", loads.adapter)
    loads.gate.let_through.set()
    await load
    assert loads.pool.digest_of(1) == "d"


async def test_a_failed_upload_gives_its_slot_and_bytes_back(loads: Loads) -> None:
    loads.gate.failure = AdapterMemoryFull("no room")
    loads.gate.let_through.set()
    with pytest.raises(AdapterMemoryFull, match="no room"):
        await loads.loading.load(1, "d", loads.adapter)
    assert await loads.is_empty()
    loads.gate.failure = None
    await loads.loading.load(1, "d", loads.adapter)
    assert loads.pool.digest_of(1) == "d"


async def test_an_interrupted_load_gives_its_slot_and_bytes_back(loads: Loads) -> None:
    load = await loads.begin()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert await loads.is_empty()
    loads.gate.let_through.set()  # the loop does not end before its threads


async def test_a_load_interrupted_while_it_reserves_gives_its_slot_and_bytes_back(loads: Loads) -> None:
    reserving, go_on = threading.Event(), threading.Event()
    reserve = loads.pool.reserve

    def slow(slot: int, digest: str, nbytes: int) -> object:
        reserving.set()
        assert go_on.wait(timeout=60)
        return reserve(slot, digest, nbytes)

    loads.pool.reserve = slow  # type: ignore[method-assign, assignment]
    load = asyncio.create_task(loads.loading.load(1, "d", loads.adapter))
    await asyncio.to_thread(reserving.wait, 60)
    load.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert await loads.is_empty()


async def test_a_slot_that_was_emptied_meanwhile_stays_empty(loads: Loads) -> None:
    load = await loads.begin()
    await loads.loading.clear()
    loads.gate.let_through.set()
    with pytest.raises(EpochEnded, match="slot 1 was emptied"):
        await load
    assert await loads.is_empty()
