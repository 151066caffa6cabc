"""Commands in seq order, whatever order their streams deliver them in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..proto import shard_pb2 as pb
from .device import DeviceThread
from .engine import StepEngine
from .errors import BadPlan, EpochEnded

REORDER_LIMIT = 16
"""Plans that may wait for an earlier one; the router keeps two in flight."""


class Sequencer:
    """Hands plans to the device thread in (epoch, seq) order. Used from the service's loop only.

    A plan of a later epoch begins it: rows are forgotten and plans of earlier epochs are refused.
    """

    def __init__(self, thread: DeviceThread, engine: StepEngine) -> None:
        self._thread = thread
        self._engine = engine
        self._epoch = 0
        self._next_seq = 1
        self._early: dict[int, Callable[[], None]] = {}

    def submit(self, plan: pb.StepPlan) -> asyncio.Future[pb.StepResult]:
        """Queue a plan behind all earlier ones; the future holds its result or a ShardError."""
        if plan.epoch > self._epoch:
            self._begin_epoch(plan.epoch)
        if plan.epoch < self._epoch:
            raise EpochEnded(f"epoch {plan.epoch} has ended; the current one is {self._epoch}")
        if plan.seq < self._next_seq or plan.seq in self._early:
            raise BadPlan(f"seq {plan.seq} was already given; the next one is {self._next_seq}")
        if plan.seq - self._next_seq > REORDER_LIMIT:
            raise EpochEnded(f"seq {self._next_seq} is missing")
        answer: asyncio.Future[pb.StepResult] = asyncio.get_running_loop().create_future()
        self._early[plan.seq] = lambda: self._run(plan, answer)
        while (run := self._early.pop(self._next_seq, None)) is not None:
            self._next_seq += 1
            run()
        return answer

    def end_epoch(self) -> None:
        """The router has closed its stream in order: free every row."""
        self._begin_epoch(self._epoch + 1)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._next_seq = 1
        self._early.clear()
        self._thread.submit(self._engine.reset)

    def _run(self, plan: pb.StepPlan, answer: asyncio.Future[pb.StepResult]) -> None:
        def deliver(done: asyncio.Future[pb.StepResult]) -> None:
            if answer.done():
                return
            error = done.exception()
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(done.result())

        self._thread.submit(lambda: self._engine.run(plan)).add_done_callback(deliver)
