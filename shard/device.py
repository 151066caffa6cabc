"""The device a shard runs on, and the one thread that touches it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import TypeVar

import torch

T = TypeVar("T")

ALIGNMENT = 16
"""Bytes; of every tensor in a packed copy."""


def resolve(name: str) -> torch.device:
    """The torch device for "auto", "cpu" or "cuda". "auto" takes a GPU where torch sees one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that nobody uses, what torch keeps back for later included."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor on a device. A GPU gets it in the order of the current stream, and the host does not
    wait for what that stream still does, as it would with an ordinary copy."""
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def send(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Small CPU tensors to a device in one copy, which may still be under way in the current stream."""
    ends = list(accumulate(-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in tensors))
    spans = [(end, each) for end, each in zip([0, *ends], tensors, strict=False)]
    host = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, each in spans:
        _part(host, start, each).copy_(each)
    there = host.to(device, non_blocking=True)
    return [_part(there, start, each) for start, each in spans]


def _part(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes of a buffer from `start` on, as a tensor of the same kind."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


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

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` there and wait for it. For a caller without a loop. Raises what it raises."""
        future: Future[T] = Future()
        self._tasks.put(lambda: _fulfil(future, work))
        return future.result()

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
