"""The wait for the first shard group, and when to give it up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

UNREACHABLE = 1
REFUSED = 2


class StartFailed(Exception):
    """The router cannot begin to serve. `code` is its exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Awaited(Protocol):
    """A shard group to which a connection is being made."""

    @property
    def addresses(self) -> tuple[str, ...]: ...
    @property
    def trouble(self) -> str:
        """Why the last try failed; empty before the first."""
        ...

    @property
    def ranks_differ(self) -> asyncio.Event: ...


async def until_ready(ready: Coroutine[Any, Any, None], groups: Sequence[Awaited], timeout: float) -> None:
    """Return when `ready` does: once one of the groups is there.

    Raises:
        StartFailed: none is there after `timeout` seconds, or the ranks of one do not form a group.
    """
    first = asyncio.create_task(ready)
    waits = [first, *(asyncio.create_task(each.ranks_differ.wait()) for each in groups)]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            return first.result()
    finally:
        for wait in waits:
            wait.cancel()
    for group in groups:
        if group.ranks_differ.is_set():
            raise StartFailed(REFUSED, group.trouble)
    addresses = ", ".join(address for group in groups for address in group.addresses)
    troubles = "; ".join(dict.fromkeys(group.trouble for group in groups if group.trouble))
    raise StartFailed(
        UNREACHABLE,
        f"no shard answers at {addresses} after {timeout:g} s (last error: {troubles or 'none yet'})",
    )
