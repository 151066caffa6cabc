"""Progress in bytes over several files, reported at a bounded rate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total; 0 while unknown)."""


class ProgressMeter:
    """Counts the bytes of one fetch. Used from one thread."""

    def __init__(self, report: OnProgress, interval: float = 0.1) -> None:
        self._report = report
        self._interval = interval
        self._last_report = float("-inf")
        self._finished = 0
        self._current = 0
        self.total = 0

    def advance(self, count: int) -> None:
        """`count` more bytes of the current file have arrived; a negative count takes some back."""
        self._current += count
        now = time.monotonic()
        if now - self._last_report >= self._interval:
            self._last_report = now
            self._report(self._finished + self._current, self.total)

    def restart_file(self) -> None:
        """The current file begins again."""
        self._current = 0

    def finish_file(self, size: int) -> None:
        """The current file is there, `size` bytes long, fetched or already on disk. Always reports."""
        self._finished += size
        self._current = 0
        self._last_report = time.monotonic()
        self._report(self._finished, self.total)


async def repeated(
    progress: asyncio.Queue[tuple[int, int] | None], seconds: float
) -> AsyncIterator[tuple[int, int]]:
    """What comes into the queue until None; the newest again after every `seconds` without news."""
    newest = (0, 0)
    while True:
        try:
            step = await asyncio.wait_for(progress.get(), seconds)
        except TimeoutError:
            yield newest
            continue
        if step is None:
            return
        newest = step
        yield newest
