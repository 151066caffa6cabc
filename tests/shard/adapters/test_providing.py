"""A worker that asks for a base weight is never left waiting."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.base_weights import WeightFile
from loraplex.shard.adapters.worker import AdapterWorker
from loraplex.shard.errors import AdapterFetchFailed

from .layouts import NO_WEIGHTS, TOY

ASKS = """
import sys, time
for line in (sys.stdin.readline(), sys.stdin.readline()):
    assert line
print('{"type":"Wanted","request":1,"name":"model.norm.weight"}', flush=True)
time.sleep(60)
"""
"""A worker that asks for one weight as soon as it has a job, and waits."""


class FullDisk(BaseTensors):
    def __init__(self) -> None:
        super().__init__({})

    def write(self, name: str, path: Path, *, held: bool = False) -> WeightFile:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("base", "why"), [(FullDisk(), "No space left on device"), (NO_WEIGHTS, "no such weight")]
)
async def test_a_weight_that_cannot_be_given_fails_the_job_with_the_cause(
    base: BaseTensors, why: str
) -> None:
    worker = AdapterWorker(TOY, base, command=[sys.executable, "-c", ASKS])
    with pytest.raises(AdapterFetchFailed, match=f"could not be given model.norm.weight: .*{why}"):
        await asyncio.wait_for(worker.pack("a", Path("/nowhere"), "digest"), 30)
    assert worker.pid is None
    await worker.stop()
