"""Send a trace: each request at its own time, or so many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from .workloads import Request, Trace

Send = Callable[[int, Request], Awaitable[None]]
"""Sends one request, known by its index in the trace, and returns when its answer has ended."""


async def drive(trace: Trace, send: Send) -> float:
    """Send every request of a trace and wait for the answers.

    Answers how late the latest request was sent, in seconds, against the time in its trace: much more than a
    few milliseconds says that the client itself could not keep up. Cancelling it cancels what is under way.
    """
    if trace.concurrency is None:
        return await _at_their_times(trace, send)
    await _so_many_at_once(trace, trace.concurrency, send)
    return 0.0


async def _at_their_times(trace: Trace, send: Send) -> float:
    started, latest = time.perf_counter(), 0.0
    async with asyncio.TaskGroup() as group:
        for index, request in enumerate(trace.requests):
            await asyncio.sleep(started + request.at - time.perf_counter())
            latest = max(latest, time.perf_counter() - started - request.at)
            group.create_task(_awaited(send(index, request)))
    return latest


async def _so_many_at_once(trace: Trace, concurrency: int, send: Send) -> None:
    waiting = iter(enumerate(trace.requests))

    async def worker() -> None:
        for index, request in waiting:
            await send(index, request)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(trace.requests))):
            group.create_task(worker())


async def _awaited(sending: Awaitable[None]) -> None:
    await sending
