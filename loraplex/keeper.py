"""Keeps one shard group running: its ranks start together, die together, and are started again together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .child import Child, Program, describe_exit

REFUSED = 2
"""Exit code of a child that refuses its configuration or its model: another try cannot help."""


class LaunchFailed(Exception):
    """The server cannot be started or kept up. `code` is the launcher's exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a dead group is started again. Times are seconds."""

    deaths: int = 5
    """So many deaths in a row end the server."""
    window: float = 60.0
    """A death after so much good service begins a new row."""
    first_delay: float = 0.5
    max_delay: float = 10.0

    def delay(self, deaths: int) -> float:
        """How long to wait after the given number of deaths in a row; doubles each time."""
        return min(self.max_delay, self.first_delay * 2.0 ** min(deaths - 1, 30))


class GroupKeeper:
    """Owns the processes of one group from start to stop.

    A rank that ends takes the others with it: they wait for it in the middle of a step, and cannot go on.

    Args:
        programs: makes what to start, one program for each rank; called for every start.
        restarts: when to start a dead group again, and when to give up.
        log: takes every line, the children's and ours; called from several threads.
        among: the keepers of all groups. While another one serves, a group that has been ready once is not
            given up.
    """

    def __init__(
        self,
        programs: Callable[[], Sequence[Program]],
        restarts: RestartPolicy,
        log: Callable[[str], None],
        *,
        among: Sequence[GroupKeeper] = (),
    ) -> None:
        self._programs = programs
        self._restarts = restarts
        self._log = log
        self._among = among
        self._children: list[Child] = []
        self.ready = asyncio.Event()
        """Set once every rank has been ready for the first time."""
        self.serves = False
        """Every rank is ready."""

    async def keep(self) -> NoReturn:
        """Start the group, and start it again whenever it dies.

        Raises LaunchFailed where it refuses or keeps dying. Nothing of it is left running then.
        """
        deaths = 0
        while True:
            served, last_words = await self._run_once()
            deaths = 1 if served >= self._restarts.window else deaths + 1
            await self._pause_after(deaths, last_words)

    async def stop(self, patience: float) -> None:
        """SIGTERM to every rank, SIGKILL after `patience` seconds; returns when all have exited."""
        await asyncio.gather(*(child.stop(patience) for child in self._children))

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for child in self._children:
            child.kill()

    @property
    def label(self) -> str:
        return ", ".join(child.program.label for child in self._children)

    async def _run_once(self) -> tuple[float, str]:
        """Seconds that the group served until a rank died, 0 if it never was ready; that rank's last line."""
        self._children = [Child(program, self._log) for program in self._programs()]
        exits = [child.exited for child in self._children]
        started = time.monotonic()
        starting = asyncio.gather(*(child.until_ready() for child in self._children))
        either: list[asyncio.Future[Any]] = [starting, *exits]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        self.serves = is_ready = starting.done() and all(starting.result())
        ready_at = time.monotonic()
        if is_ready:
            self._announce(ready_at - started)
            await asyncio.wait(exits, return_when=asyncio.FIRST_COMPLETED)
        self.serves = False
        dead = [child for child in self._children if child.exited.done()]
        self.kill()
        await asyncio.wait(exits)
        await asyncio.wait({starting})
        first = next((child for child in dead if child.exited.result() == REFUSED), dead[0])
        code = first.exited.result()
        if not is_ready and code == REFUSED and not self._is_spare():
            raise LaunchFailed(REFUSED, f"{first.program.label} refused to start: {first.last_line}")
        self._log(f"{first.program.label} died ({describe_exit(code)})")
        return time.monotonic() - ready_at if is_ready else 0.0, first.last_line

    def _is_spare(self) -> bool:
        return self.ready.is_set() and any(other.serves for other in self._among if other is not self)

    def _announce(self, seconds: float) -> None:
        again = " again" if self.ready.is_set() else ""
        are = "are" if len(self._children) > 1 else "is"
        self._log(f"{self.label} {are} ready{again} after {seconds:.1f} s")
        self.ready.set()

    async def _pause_after(self, deaths: int, last_words: str) -> None:
        if deaths >= self._restarts.deaths and not self._is_spare():
            raise LaunchFailed(
                1, f"{self.label} died {deaths} times in a row, giving up; its last line: {last_words}"
            )
        delay = self._restarts.delay(deaths)
        verb = "start" if len(self._children) > 1 else "starts"
        self._log(f"{self.label} {verb} again in {delay:.1f} s")
        await asyncio.sleep(delay)
