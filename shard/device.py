"""The device a shard runs on, and the one thread that touches it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


def resolve(name: str) -> torch.device:
    """The torch device for "auto", "cpu" or "cuda". "auto" takes a GPU only if there is one to use."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class DeviceThread:
    """Runs callables one after another on a thread of its own: the only one that touches the device."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._started: dict[int, float] = {}
        self._next_ticket = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what was submitted, then end the thread."""
        self._tasks.put(None)
        self._thread.join()

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Queue `work`; the answer arrives on the calling loop. Called from the loop's thread only."""
        loop = asyncio.get_running_loop()
        future: Future[T] = Future()
        ticket = self._next_ticket = self._next_ticket + 1
        self._started[ticket] = time.monotonic()
        future.add_done_callback(lambda _: self._started.pop(ticket, None))
        self._tasks.put(lambda: _fulfil(future, work))
        return asyncio.wrap_future(future, loop=loop)

    def oldest_age(self) -> float:
        """Seconds since the oldest unfinished work was submitted; 0 when idle."""
        started = tuple(self._started.values())
        return time.monotonic() - min(started) if started else 0.0

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - the edge of the thread: the waiter gets the error
        future.set_exception(error)
    else:
        future.set_result(result)
