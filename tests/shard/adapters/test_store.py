from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from loraplex.shard.adapters.host_cache import HostCache
from loraplex.shard.adapters.manifest import AdapterRequest, Source
from loraplex.shard.adapters.norms import GroupNorms
from loraplex.shard.adapters.store import AdapterStore
from loraplex.shard.adapters.weights import PackedAdapter
from loraplex.shard.adapters.worker import AdapterWorker
from loraplex.shard.errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected

from ...fakes.hub import FakeHub
from .layouts import NO_WEIGHTS, TOY, toy_files
from .test_norms import Shelf
from .test_worker import until, write_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEIGHTS = "adapter_model.safetensors"


def ignore(done: int, total: int) -> None:
    pass


@pytest_asyncio.fixture(loop_scope="module")
async def store(worker: AdapterWorker) -> AsyncIterator[AdapterStore]:
    yield AdapterStore(worker, HostCache(1_000_000))


async def test_equal_requests_share_one_fetch_and_its_progress(store: AdapterStore, hub: FakeHub) -> None:
    commit = hub.add("org/shared", toy_files())
    hub.break_(f"org/shared/resolve/{commit}/{WEIGHTS}", seconds=0.3)
    seen: list[list[tuple[int, int]]] = [[] for _ in range(100)]
    request = AdapterRequest(Source.HUB, "org/shared")
    manifests = await asyncio.gather(
        *(store.download(request, lambda done, total, own=own: own.append((done, total))) for own in seen)
    )
    assert len(set(manifests)) == 1
    assert hub.count("api/models/org/shared") == 1
    assert hub.count(f"org/shared/resolve/{commit}/{WEIGHTS}") == 1
    assert all(own[-1][0] == own[-1][1] > 0 for own in seen)


async def test_another_callers_token_is_another_request(store: AdapterStore, hub: FakeHub) -> None:
    hub.add("org/locked", toy_files(), token="hf_right")
    right = AdapterRequest(Source.HUB, "org/locked", token="hf_right")
    wrong = AdapterRequest(Source.HUB, "org/locked", token="hf_wrong")
    results = await asyncio.gather(
        store.download(right, ignore), store.download(wrong, ignore), return_exceptions=True
    )
    assert results[0].modules == 2  # type: ignore[union-attr]
    assert isinstance(results[1], AdapterNotFound)
    assert "hf_right" not in repr(right) + str(right.key())


async def test_a_failure_reaches_all_and_is_not_remembered(store: AdapterStore, tmp_path: Path) -> None:
    request = AdapterRequest(Source.LOCAL, str(tmp_path / "later"))
    results = await asyncio.gather(
        *(store.download(request, ignore) for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(result, AdapterNotFound) for result in results)
    write_adapter(tmp_path / "later")
    assert (await store.download(request, ignore)).modules == 2


async def test_a_caller_that_leaves_does_not_stop_the_others(store: AdapterStore, hub: FakeHub) -> None:
    commit = hub.add("org/leaving", toy_files())
    hub.break_(f"org/leaving/resolve/{commit}/{WEIGHTS}", seconds=0.5)
    request = AdapterRequest(Source.HUB, "org/leaving")
    first = asyncio.create_task(store.download(request, ignore))
    second = asyncio.create_task(store.download(request, ignore))
    await asyncio.sleep(0.1)
    first.cancel()
    assert (await second).revision == commit
    assert first.cancelled()
    assert hub.count(f"org/leaving/resolve/{commit}/{WEIGHTS}") == 1


async def test_an_unexpected_digest_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    directory = str(write_adapter(tmp_path / "a"))
    digest = (await store.download(AdapterRequest(Source.LOCAL, directory), ignore)).digest
    await store.download(AdapterRequest(Source.LOCAL, directory, expect_digest=digest), ignore)
    with pytest.raises(AdapterRejected, match=f"{'0' * 64} was expected, this host arrived at {digest}"):
        await store.download(AdapterRequest(Source.LOCAL, directory, expect_digest="0" * 64), ignore)


async def test_host_weights_come_from_memory(store: AdapterStore, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    digest = (await store.download(AdapterRequest(Source.LOCAL, str(directory)), ignore)).digest
    (directory / WEIGHTS).unlink()
    first = await store.host_weights(digest)
    assert await store.host_weights(digest) is first


class Completing(GroupNorms):
    """Answers a copy once, as for an adapter that was not complete, and then what it is given."""

    def __init__(self) -> None:
        super().__init__(0, 2, Shelf())
        self.asked: list[PackedAdapter] = []

    async def complete(self, digest: str, adapter: PackedAdapter) -> PackedAdapter:
        self.asked.append(adapter)
        return replace(adapter) if len(self.asked) == 1 else adapter


async def test_host_weights_are_completed_once_and_offered_every_time(
    worker: AdapterWorker, tmp_path: Path
) -> None:
    norms = Completing()
    store = AdapterStore(worker, HostCache(1_000_000), norms)
    directory = write_adapter(tmp_path / "a")
    digest = (await store.download(AdapterRequest(Source.LOCAL, str(directory)), ignore)).digest
    first = await store.host_weights(digest)
    assert norms.asked[0] is not first
    assert await store.host_weights(digest) is first
    assert norms.asked[1] is first


async def test_host_weights_are_parsed_again_from_unchanged_files(
    worker: AdapterWorker, tmp_path: Path
) -> None:
    store = AdapterStore(worker, HostCache(0))
    directory = write_adapter(tmp_path / "a")
    digest = (await store.download(AdapterRequest(Source.LOCAL, str(directory)), ignore)).digest
    one, two = await asyncio.gather(store.host_weights(digest), store.host_weights(digest))
    assert one is two, "parsed once for both"
    assert await store.host_weights(digest) is not one, "a budget of 0 keeps nothing"
    write_adapter(directory, toy_files(seed=3))
    with pytest.raises(AdapterRejected, match=f"adapter '{directory}': its files have changed"):
        await store.host_weights(digest)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    with pytest.raises(AdapterNotFound, match="there is no directory"):
        await store.host_weights(digest)


async def test_an_unknown_digest_is_not_found(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFound):
        await store.host_weights("f" * 64)
    with pytest.raises(AdapterNotFound):
        await store.own_tokenizer("../../etc")


async def test_a_stopped_store_fails_what_is_in_progress(hub_home: Path, hub: FakeHub) -> None:
    commit = hub.add("org/stopped", toy_files(seed=8))
    hub.break_(f"org/stopped/resolve/{commit}/{WEIGHTS}", seconds=5)
    worker = AdapterWorker(TOY, NO_WEIGHTS)
    store = AdapterStore(worker, HostCache(0))
    await store.start()
    download = asyncio.create_task(store.download(AdapterRequest(Source.HUB, "org/stopped"), ignore))
    await until(lambda: hub.count(f"org/stopped/resolve/{commit}/{WEIGHTS}") == 1)
    await store.stop()
    with pytest.raises(AdapterFetchFailed):
        await download
