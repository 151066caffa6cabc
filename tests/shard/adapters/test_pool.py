from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.kernels.ops import LoraWeights
from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.host_cache import HostCache
from loraplex.shard.adapters.pack import Packer
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import LinearWeights, PackedAdapter, SiteWeights, read_packed
from loraplex.shard.errors import AdapterFetchFailed, AdapterMemoryFull, BadPlan, SlotBusy

from .layouts import TOY, TOY_BASE, toy_files
from .test_worker import write_adapter


class Recorder:
    """A site that keeps what it is given and does nothing with it."""

    def __init__(self) -> None:
        self.held: dict[int, SiteWeights] = {}

    def put(self, slot: int, weights: SiteWeights) -> None:
        self.held[slot] = weights

    def drop(self, slot: int) -> None:
        self.held.pop(slot, None)


def packed(tmp_path: Path, seed: int = 0) -> PackedAdapter:
    directory = write_adapter(tmp_path / str(seed), toy_files(seed))
    target = tmp_path / f"{seed}.packed"
    result = Packer(TOY, FileLimits()).pack(directory, target, TOY_BASE)
    return read_packed(target, result.file.index, pin=False)


@pytest.fixture
def adapter(tmp_path: Path) -> PackedAdapter:
    return packed(tmp_path)


@pytest.fixture
def sites() -> list[Recorder]:
    return [Recorder(), Recorder()]


def pool_for(sites: list[Recorder], budget: int, slots: int = 4) -> AdapterPool:
    return AdapterPool(sites, slots=slots, budget=budget)


def lora_of(site: Recorder, slot: int) -> LoraWeights:
    weights = site.held[slot]
    assert isinstance(weights, LinearWeights)
    assert weights.lora is not None
    return weights.lora


def test_a_truncated_packed_file_is_noticed(tmp_path: Path) -> None:
    result = Packer(TOY, FileLimits()).pack(write_adapter(tmp_path / "a"), tmp_path / "packed", TOY_BASE)
    path = Path(result.file.path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterFetchFailed, match="a packed adapter ended after"):
        read_packed(path, result.file.index, pin=False)


def test_load_installs_views_and_unload_takes_them_away(
    adapter: PackedAdapter, sites: list[Recorder]
) -> None:
    pool = pool_for(sites, adapter.nbytes)
    assert pool.load(2, "d", adapter) == pool.used_bytes == adapter.nbytes
    assert (pool.digest_of(2), pool.digest_of(0)) == ("d", None)
    assert [list(site.held) for site in sites] == [[2], []]
    start = adapter.buffer.data_ptr()
    assert start <= lora_of(sites[0], 2).a.data_ptr() < start + adapter.nbytes, "no copy on a CPU"
    assert pool.unload(2) == adapter.nbytes
    assert ([site.held for site in sites], pool.used_bytes, pool.digest_of(2)) == ([{}, {}], 0, None)
    assert pool.unload(2) == 0


def test_loading_the_same_again_changes_nothing(adapter: PackedAdapter, sites: list[Recorder]) -> None:
    pool = pool_for(sites, adapter.nbytes)
    pool.load(0, "d", adapter)
    weights = sites[0].held[0]
    assert pool.load(0, "d", adapter) == pool.used_bytes == adapter.nbytes
    assert sites[0].held[0] is weights


def test_a_slot_holds_one_adapter_at_a_time(
    adapter: PackedAdapter, sites: list[Recorder], tmp_path: Path
) -> None:
    pool = pool_for(sites, 10 * adapter.nbytes)
    pool.load(0, "d", adapter)
    with pytest.raises(SlotBusy, match="slot 0 holds adapter d"):
        pool.load(0, "e", packed(tmp_path, seed=1))
    assert (pool.digest_of(0), pool.used_bytes) == ("d", adapter.nbytes)
    pool.load(1, "d", adapter)
    assert pool.used_bytes == 2 * adapter.nbytes


def test_the_budget_in_bytes_holds(adapter: PackedAdapter, sites: list[Recorder]) -> None:
    pool = pool_for(sites, 2 * adapter.nbytes - 1)
    pool.load(0, "d", adapter)
    with pytest.raises(AdapterMemoryFull, match=f"adapter e needs {adapter.nbytes} bytes.*--adapter-memory"):
        pool.load(1, "e", adapter)
    assert sites[0].held.keys() == {0}
    pool.unload(0)
    pool.load(1, "e", adapter)


def test_clear_empties_every_slot(adapter: PackedAdapter, sites: list[Recorder]) -> None:
    pool = pool_for(sites, 2 * adapter.nbytes)
    pool.load(0, "d", adapter)
    pool.load(3, "e", adapter)
    pool.clear()
    assert (pool.used_bytes, pool.digest_of(0), pool.digest_of(3)) == (0, None, None)
    assert sites[0].held == {}


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_that_does_not_exist_is_a_bad_plan(
    slot: int, adapter: PackedAdapter, sites: list[Recorder]
) -> None:
    pool = pool_for(sites, adapter.nbytes)
    for call in (lambda: pool.load(slot, "d", adapter), lambda: pool.unload(slot)):
        with pytest.raises(BadPlan, match="0 to 3"):
            call()


def test_the_host_cache_lets_the_least_recently_used_go(tmp_path: Path) -> None:
    adapters = {str(seed): packed(tmp_path, seed) for seed in range(4)}
    size = adapters["0"].nbytes
    cache = HostCache(3 * size)
    for digest in "012":
        cache.put(digest, adapters[digest])
    assert cache.get("0") is adapters["0"]
    cache.put("3", adapters["3"])
    assert [digest for digest in "0123" if digest in cache] == ["0", "2", "3"]
    assert cache.used_bytes == 3 * size
    cache.put("3", adapters["3"])
    assert (len(cache), cache.used_bytes) == (3, 3 * size)


def test_the_host_cache_keeps_nothing_larger_than_itself(adapter: PackedAdapter) -> None:
    cache = HostCache(adapter.nbytes - 1)
    cache.put("d", adapter)
    assert (cache.get("d"), cache.used_bytes) == (None, 0)
