"""A worker process that talks to a fake hub; both live as long as a test module."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.protocol import WorkerSettings
from loraplex.shard.adapters.sources.retry import RetryPolicy
from loraplex.shard.adapters.worker import AdapterWorker

from ...fakes.hub import FakeHub
from .layouts import NO_WEIGHTS, TOY

FAST = WorkerSettings(limits=FileLimits(config=10_000), retry=RetryPolicy(base_delay=0.01, max_delay=0.5))


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def hub_home(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """HF_HOME of the workers started under this fixture; their HF_ENDPOINT is the fake hub."""
    home = tmp_path_factory.mktemp("hf")
    spool = tmp_path_factory.mktemp("spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(tempfile, "tempdir", str(spool))
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        yield home
    assert list(spool.iterdir()) == [], "workers clean up behind themselves"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(hub_home: Path) -> AsyncIterator[AdapterWorker]:
    worker = AdapterWorker(TOY, NO_WEIGHTS, settings=FAST)
    await worker.start()
    yield worker
    await worker.stop()
