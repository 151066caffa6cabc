"""How far a download is, told often enough that nobody takes it for dead."""

from __future__ import annotations

import asyncio

from loraplex.shard.adapters.progress import repeated


async def test_silence_repeats_the_newest_news() -> None:
    queue: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
    told = repeated(queue, 0.01)
    assert await anext(told) == (0, 0), "nothing is known yet, but it goes on"
    queue.put_nowait((3, 10))
    assert (3, 10) in [await anext(told) for _ in range(3)]
    assert await anext(told) == (3, 10)
    queue.put_nowait((10, 10))
    queue.put_nowait(None)
    rest = [step async for step in told]
    assert rest[-1] == (10, 10)
