"""The worker process: its manners, its death, and what the parent makes of both."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import textwrap
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from loraplex.shard.adapters.manifest import AdapterRequest, Source
from loraplex.shard.adapters.worker import AdapterWorker, DownloadedAdapter
from loraplex.shard.errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected

from ...fakes.hub import FakeHub
from .conftest import FAST
from .layouts import NO_WEIGHTS, TOY, config_bytes, toy_files, toy_tensors, weights_bytes

pytestmark = pytest.mark.asyncio(loop_scope="module")

HANGING_PATTERN = r"(([a-z0-9_]+\.?)+)+!"
"""Matching it against a module path takes longer than anybody waits, and holds the interpreter."""


@pytest_asyncio.fixture(loop_scope="module")
async def own_worker(hub_home: Path) -> AsyncIterator[AdapterWorker]:
    """A worker that its test may maltreat."""
    worker = AdapterWorker(TOY, NO_WEIGHTS, settings=FAST, silence=4.0)
    yield worker
    await worker.stop()


def spooled_files() -> list[Path]:
    """Packed files that lie about, of any worker of this module."""
    return list(Path(tempfile.gettempdir()).glob("*/*"))


def write_adapter(directory: Path, files: dict[str, bytes] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in (files or toy_files()).items():
        (directory / name).write_bytes(data)
    return directory


async def local(worker: AdapterWorker, directory: Path) -> DownloadedAdapter:
    return await worker.download(AdapterRequest(Source.LOCAL, str(directory)), lambda done, total: None)


def mapped_files(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_directory_is_parsed_and_no_file_left(worker: AdapterWorker, tmp_path: Path) -> None:
    downloaded = await local(worker, write_adapter(tmp_path / "a"))
    assert (downloaded.manifest.revision, downloaded.manifest.modules) == ("", 2)
    assert spooled_files() == []


async def test_an_adapter_is_packed_again_while_its_files_are_the_same(
    worker: AdapterWorker, tmp_path: Path
) -> None:
    directory = write_adapter(tmp_path / "a")
    first = await local(worker, directory)
    again = await worker.pack("a", directory, first.manifest.digest)
    assert again.index == first.packed.index
    assert again.buffer.equal(first.packed.buffer)
    write_adapter(directory, toy_files(seed=9))
    with pytest.raises(
        AdapterRejected, match=f"adapter 'a': its files have changed.*{first.manifest.digest}"
    ):
        await worker.pack("a", directory, first.manifest.digest)


async def test_errors_keep_their_type_and_name_the_adapter(worker: AdapterWorker, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="adapter '/nowhere': there is no such directory"):
        await local(worker, Path("/nowhere"))
    with pytest.raises(AdapterRejected, match=f"adapter '{tmp_path}/a': there is no adapter_config.json"):
        await local(worker, write_adapter(tmp_path / "a", {"README.md": b""}))


async def test_an_error_is_one_short_line(worker: AdapterWorker, tmp_path: Path) -> None:
    odd = "x\n\x1b[31m" + "y" * 100_000
    files = toy_files() | {
        "adapter_model.safetensors": weights_bytes(toy_tensors() | {odd: np.ones(1, np.int8)})
    }
    with pytest.raises(AdapterRejected) as refused:
        await local(worker, write_adapter(tmp_path / "a", files))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 2000


async def test_the_child_is_nice_and_loads_no_torch(worker: AdapterWorker, tmp_path: Path) -> None:
    await local(worker, write_adapter(tmp_path / "a"))
    assert worker.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) >= 10
    mapped = mapped_files(worker.pid)
    assert "numpy" in mapped
    assert "torch" not in mapped


async def test_a_slow_fetch_holds_nobody_up(worker: AdapterWorker, hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("org/slow", toy_files())
    hub.break_(f"org/slow/resolve/{commit}/adapter_model.safetensors", seconds=3.0)
    slow = asyncio.create_task(
        worker.download(AdapterRequest(Source.HUB, "org/slow"), lambda done, total: None)
    )
    await until(lambda: hub.count("org/slow/resolve/" + commit + "/adapter_model.safetensors") == 1)
    await local(worker, write_adapter(tmp_path / "a"))
    assert not slow.done()
    assert (await slow).manifest.revision == commit


async def test_a_killed_child_fails_its_jobs_and_is_replaced(
    own_worker: AdapterWorker, hub: FakeHub, tmp_path: Path
) -> None:
    commit = hub.add("org/victim", toy_files(seed=5))
    weights = f"org/victim/resolve/{commit}/adapter_model.safetensors"
    hub.break_(weights, seconds=5)
    request = AdapterRequest(Source.HUB, "org/victim")
    doomed = asyncio.create_task(own_worker.download(request, lambda done, total: None))
    await until(lambda: hub.count(weights) == 1)
    first = own_worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with pytest.raises(AdapterFetchFailed, match=r"worker ended \(status -9\); try again"):
        await doomed
    assert own_worker.pid is None
    assert (await local(own_worker, write_adapter(tmp_path / "a"))).manifest.modules == 2
    assert own_worker.pid not in (None, first)
    assert (await own_worker.download(request, lambda done, total: None)).manifest.revision == commit


async def test_a_hung_child_is_killed_and_replaced(own_worker: AdapterWorker, tmp_path: Path) -> None:
    bad = {
        "adapter_config.json": config_bytes(rank_pattern={HANGING_PATTERN: 2}),
        "adapter_model.safetensors": weights_bytes(toy_tensors()),
    }
    with pytest.raises(AdapterFetchFailed, match="hung and was killed"):
        await local(own_worker, write_adapter(tmp_path / "bad", bad))
    assert (await local(own_worker, write_adapter(tmp_path / "good"))).manifest.modules == 2


async def test_a_stopped_worker_starts_again(own_worker: AdapterWorker, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    await local(own_worker, directory)
    pid = own_worker.pid
    assert pid is not None
    await own_worker.stop()
    assert own_worker.pid is None
    assert not is_running(pid)
    await local(own_worker, directory)


async def test_an_abandoned_job_leaves_no_file(worker: AdapterWorker, tmp_path: Path) -> None:
    first, second = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b")
    await local(worker, second)
    job = asyncio.create_task(local(worker, first))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await local(worker, second)
    await until(lambda: spooled_files() == [])


async def test_a_command_that_does_not_run_is_a_failed_fetch(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    for command, match in (
        (("/nowhere/python",), "could not be started"),
        (("false",), r"ended \(status 1\)"),
        (("sh", "-c", "echo nonsense; cat"), "broke its protocol and was killed"),
    ):
        worker = AdapterWorker(TOY, NO_WEIGHTS, command=command)
        with pytest.raises(AdapterFetchFailed, match=match):
            await local(worker, directory)
        await worker.stop()


async def test_no_orphan_remains_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import asyncio
        from loraplex.shard.adapters.base_tensors import BaseTensors
        from loraplex.shard.adapters.layout import AdapterLayout
        from loraplex.shard.adapters.worker import AdapterWorker

        async def main():
            worker = AdapterWorker(AdapterLayout((), "float32", 8), BaseTensors({}))
            await worker.start()
            print(worker.pid, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=PIPE, stderr=DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    await parent.wait()
    await until(lambda: not is_running(child))
    await until(lambda: list(tmp_path.iterdir()) == [])
