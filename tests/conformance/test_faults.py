"""Bad adapters through the real store and its child process: typed errors, no leaks, good ones unharmed."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.base_weights import WeightFile
from loraplex.shard.adapters.host_cache import HostCache
from loraplex.shard.adapters.manifest import AdapterManifest, AdapterRequest, Source
from loraplex.shard.adapters.store import AdapterStore
from loraplex.shard.adapters.worker import AdapterWorker
from loraplex.shard.errors import AdapterFetchFailed, AdapterNotFound, ShardError

from .bases import Base
from .bench import Bench, lora
from .faults import FAULTS, Fault, write_good
from .serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOADS = 1000
AT_ONCE = 8
GROWTH = 12 * 1024 * 1024
"""Bytes that either process may have grown by after LOADS bad loads: what its allocator holds back, once. Ten
thousand loads take no more than one thousand."""


class World:
    """A store with its worker, and a directory of every fault."""

    def __init__(self, served: Served, root: Path) -> None:
        self.worker = AdapterWorker(served.layout, served.base_tensors)
        self.store = AdapterStore(self.worker, HostCache(1 << 20))
        self.root = root
        for name, fault in FAULTS.items():
            directory = self.directory(name)
            directory.mkdir()
            fault.write(directory)
        write_good(root / "good")

    def directory(self, fault: str) -> Path:
        return self.root / re.sub(r"\W+", "-", fault)

    async def load(self, directory: Path, *, root: str = "") -> AdapterManifest:
        request = AdapterRequest(Source.LOCAL, str(directory), root=root)
        return await self.store.download(request, lambda done, total: None)

    async def load_bad(self, name: str, fault: Fault) -> str:
        """Load a fault; answers the error's message."""
        directory = self.directory(name)
        with pytest.raises(ShardError) as caught:
            await self.load(directory, root=str(self.root) if fault.rooted else "")
        assert type(caught.value) is fault.error, f"{name}: {caught.value!r}"
        return str(caught.value)

    async def load_good(self) -> None:
        manifest = await self.load(self.root / "good")
        assert manifest.modules == 1
        packed = await self.store.host_weights(manifest.digest)
        assert packed.nbytes == manifest.rank_bytes[0] > 0

    def processes(self) -> list[int]:
        assert self.worker.pid is not None
        return [os.getpid(), self.worker.pid]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    serve: Callable[[str], Served], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    spool = tmp_path_factory.mktemp("spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(spool))
        world = World(serve("llama"), tmp_path_factory.mktemp("faults"))
        await world.store.start()
        yield world
        assert list(spool.glob("*/*")) == [], "no packed file is left"
        await world.store.stop()
    assert list(spool.iterdir()) == [], "no spool is left"


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_named_with_its_adapter_and_its_remedy(name: str, world: World) -> None:
    fault = FAULTS[name]
    message = await world.load_bad(name, fault)
    assert f"adapter '{world.directory(name)}'" in message
    for pattern in fault.says:
        assert re.search(pattern, message), message
    await world.load_good()


@pytest.mark.parametrize(
    "path", ["/etc/../nowhere", "", "a\0b", "../" * 40 + "nowhere", "/etc/passwd", "x" * 300]
)
async def test_a_path_that_is_no_directory_is_not_found(path: str, world: World) -> None:
    request = AdapterRequest(Source.LOCAL, path)
    with pytest.raises(AdapterNotFound, match=r"adapter '.*no such directory"):
        await world.store.download(request, lambda done, total: None)
    await world.load_good()


async def test_a_thousand_bad_loads_leave_no_file_open_and_no_memory_taken(world: World) -> None:
    """Several at once, good ones among them."""
    names = itertools.cycle(FAULTS)

    async def load(count: int) -> None:
        for _ in range(count // AT_ONCE):
            batch = [next(names) for _ in range(AT_ONCE)]
            await asyncio.gather(*(world.load_bad(name, FAULTS[name]) for name in batch), world.load_good())

    await load(200)
    pids = world.processes()
    files, memory = await settled(pids), [resident_bytes(pid) for pid in pids]
    await load(LOADS)
    assert world.processes() == pids, "the worker has not died on the way"
    assert await settled(pids) == files
    grown = [resident_bytes(pid) - before for pid, before in zip(pids, memory, strict=True)]
    assert max(grown) < GROWTH, grown


async def settled(pids: list[int]) -> list[int]:
    """Open files of each process, when nothing is under way any more."""
    gc.collect()
    await asyncio.sleep(0.2)
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class SlowTensors(BaseTensors):
    """Weights of the base that come when the test says so: a worker waits for them in mid-work."""

    def __init__(self, tensors: BaseTensors) -> None:
        self._tensors = tensors
        self.asked, self.allowed = threading.Event(), threading.Event()

    def write(self, name: str, path: Path, *, held: bool = False) -> WeightFile:
        self.asked.set()
        assert self.allowed.wait(30)
        return self._tensors.write(name, path, held=held)


async def test_a_worker_killed_in_the_middle_of_a_load_is_replaced(
    bases: Callable[[str], Base], serve: Callable[[str], Served], tmp_path: Path
) -> None:
    """The load fails as one to be tried again; then it works, and so do the others."""
    served, base = serve("llama"), bases("llama")
    made = lora(use_dora=True, target_modules=["q_proj"])(Bench(base, tmp_path / "dora", bases))
    write_good(tmp_path / "good")
    tensors = SlowTensors(served.base_tensors)
    worker = AdapterWorker(served.layout, tensors)
    store = AdapterStore(worker, HostCache(1 << 20))

    async def load(directory: Path) -> AdapterManifest:
        return await store.download(AdapterRequest(Source.LOCAL, str(directory)), lambda done, total: None)

    try:
        doomed = asyncio.create_task(load(made.directory))
        assert await asyncio.to_thread(tensors.asked.wait, 30)
        first = worker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with pytest.raises(AdapterFetchFailed, match="try again"):
            await doomed
        tensors.allowed.set()
        assert (await load(tmp_path / "good")).modules == 1
        assert (await load(made.directory)).modules == 3
        assert worker.pid not in (None, first)
    finally:
        tensors.allowed.set()
        await store.stop()
