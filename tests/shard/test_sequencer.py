"""Plans run in seq order on the device thread, and epochs end cleanly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from loraplex.proto import shard_pb2 as pb
from loraplex.shard.device import DeviceThread
from loraplex.shard.errors import BadPlan, EpochEnded
from loraplex.shard.sequencer import REORDER_LIMIT, Sequencer


class RecordingEngine:
    """Stands for StepEngine: notes what runs, where, and in which order."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.threads: set[str] = set()

    def run(self, plan: pb.StepPlan) -> pb.StepResult:
        self.threads.add(threading.current_thread().name)
        self.events.append((plan.epoch, plan.seq))
        if plan.ends:
            raise BadPlan("row 9 is not running")
        return pb.StepResult(epoch=plan.epoch, seq=plan.seq, last=True)

    def reset(self) -> None:
        self.events.append("reset")


@pytest.fixture
def thread() -> Iterator[DeviceThread]:
    thread = DeviceThread()
    thread.start()
    yield thread
    thread.stop()


def plan(seq: int, epoch: int = 1, **more: object) -> pb.StepPlan:
    return pb.StepPlan(epoch=epoch, seq=seq, **more)  # type: ignore[arg-type]


async def test_plans_run_in_seq_order_whatever_order_they_come_in(thread: DeviceThread) -> None:
    engine = RecordingEngine()
    sequencer = Sequencer(thread, engine)  # type: ignore[arg-type]
    answers = [sequencer.submit(plan(seq)) for seq in (2, 3, 1, 4)]
    assert [result.seq for result in await asyncio.gather(*answers)] == [2, 3, 1, 4]
    assert engine.events == ["reset", (1, 1), (1, 2), (1, 3), (1, 4)]
    assert engine.threads == {"device"}


async def test_a_later_epoch_resets_and_refuses_the_earlier_one(thread: DeviceThread) -> None:
    engine = RecordingEngine()
    sequencer = Sequencer(thread, engine)  # type: ignore[arg-type]
    await sequencer.submit(plan(1, epoch=5))
    await sequencer.submit(plan(1, epoch=8))
    with pytest.raises(EpochEnded, match="epoch 5"):
        sequencer.submit(plan(2, epoch=5))
    assert engine.events == ["reset", (5, 1), "reset", (8, 1)]
    sequencer.end_epoch()
    with pytest.raises(EpochEnded):
        sequencer.submit(plan(2, epoch=8))
    assert engine.events[-1] == "reset" or await sequencer.submit(plan(1, epoch=99))


async def test_doubles_and_gaps_are_refused(thread: DeviceThread) -> None:
    sequencer = Sequencer(thread, RecordingEngine())  # type: ignore[arg-type]
    await sequencer.submit(plan(1))
    with pytest.raises(BadPlan, match="already"):
        sequencer.submit(plan(1))
    sequencer.submit(plan(3))
    with pytest.raises(BadPlan, match="already"):
        sequencer.submit(plan(3))
    with pytest.raises(EpochEnded, match="seq 2 is missing"):
        sequencer.submit(plan(3 + REORDER_LIMIT))


async def test_a_failed_step_fails_its_own_answer(thread: DeviceThread) -> None:
    sequencer = Sequencer(thread, RecordingEngine())  # type: ignore[arg-type]
    with pytest.raises(BadPlan, match="row 9"):
        await sequencer.submit(plan(1, ends=[9]))


async def test_the_device_thread_tells_the_age_of_its_oldest_work(thread: DeviceThread) -> None:
    assert thread.oldest_age() == 0
    release = threading.Event()
    work = thread.submit(release.wait)
    await asyncio.sleep(0.05)
    assert thread.oldest_age() >= 0.04
    release.set()
    await work
    await asyncio.sleep(0)
    assert thread.oldest_age() == 0
