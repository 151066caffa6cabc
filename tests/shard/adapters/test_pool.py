from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.host_cache import HostCache
from loraplex.shard.adapters.pack import Packer
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import PackedAdapter, read_packed
from loraplex.shard.errors import AdapterFetchFailed, AdapterMemoryFull, BadPlan, SlotBusy

from .layouts import TOY, toy_files
from .test_worker import write_adapter


def packed(tmp_path: Path, seed: int = 0) -> PackedAdapter:
    directory = write_adapter(tmp_path / str(seed), toy_files(seed))
    target = tmp_path / f"{seed}.packed"
    result = Packer(TOY, FileLimits()).pack(directory, target)
    return read_packed(target, result.file.index, pin=False)


@pytest.fixture
def adapter(tmp_path: Path) -> PackedAdapter:
    return packed(tmp_path)


def pool_for(budget: int, slots: int = 4) -> AdapterPool:
    return AdapterPool([{}, {}], slots=slots, budget=budget)


def test_a_truncated_packed_file_is_noticed(tmp_path: Path) -> None:
    result = Packer(TOY, FileLimits()).pack(write_adapter(tmp_path / "a"), tmp_path / "packed")
    path = Path(result.file.path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterFetchFailed, match="a packed adapter ended after"):
        read_packed(path, result.file.index, pin=False)


def test_load_installs_views_and_unload_takes_them_away(adapter: PackedAdapter) -> None:
    pool = pool_for(adapter.nbytes)
    assert pool.load(2, "d", adapter) == pool.used_bytes == adapter.nbytes
    assert (pool.digest_of(2), pool.digest_of(0)) == ("d", None)
    assert list(pool.tables[0]) == [2]
    assert pool.tables[1] == {}
    start = adapter.buffer.data_ptr()
    assert start <= pool.tables[0][2].a.data_ptr() < start + adapter.nbytes, "no copy on a CPU"
    assert pool.unload(2) == adapter.nbytes
    assert (pool.tables, pool.used_bytes, pool.digest_of(2)) == ([{}, {}], 0, None)
    assert pool.unload(2) == 0


def test_loading_the_same_again_changes_nothing(adapter: PackedAdapter) -> None:
    pool = pool_for(adapter.nbytes)
    pool.load(0, "d", adapter)
    weights = pool.tables[0][0]
    assert pool.load(0, "d", adapter) == pool.used_bytes == adapter.nbytes
    assert pool.tables[0][0] is weights


def test_a_slot_holds_one_adapter_at_a_time(adapter: PackedAdapter, tmp_path: Path) -> None:
    pool = pool_for(10 * adapter.nbytes)
    pool.load(0, "d", adapter)
    with pytest.raises(SlotBusy, match="slot 0 holds adapter d"):
        pool.load(0, "e", packed(tmp_path, seed=1))
    assert (pool.digest_of(0), pool.used_bytes) == ("d", adapter.nbytes)
    pool.load(1, "d", adapter)
    assert pool.used_bytes == 2 * adapter.nbytes


def test_the_budget_in_bytes_holds(adapter: PackedAdapter) -> None:
    pool = pool_for(2 * adapter.nbytes - 1)
    pool.load(0, "d", adapter)
    with pytest.raises(AdapterMemoryFull, match=f"adapter e needs {adapter.nbytes} bytes.*--adapter-memory"):
        pool.load(1, "e", adapter)
    assert pool.tables[0].keys() == {0}
    pool.unload(0)
    pool.load(1, "e", adapter)


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_that_does_not_exist_is_a_bad_plan(slot: int, adapter: PackedAdapter) -> None:
    pool = pool_for(adapter.nbytes)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_pool_has_its_own_copy(adapter: PackedAdapter) -> None:
    pool = AdapterPool([{}, {}], slots=1, budget=adapter.nbytes, device=torch.device("cuda"))
    pool.load(0, "d", adapter)
    loaded, host = pool.tables[0][0], adapter.site_weights()[0]
    assert loaded.a.is_cuda
    assert torch.equal(loaded.a.cpu(), host.a)
    assert torch.equal(loaded.parts[1].b.cpu(), host.parts[1].b)
