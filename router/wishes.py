"""Who waits for an adapter: to have it on disk, resident, or gone. Part of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from .errors import RouterError
from .scheduler import Demand
from .versions import Adapter

_T = TypeVar("_T")


@dataclass(slots=True)
class _Load:
    demand: Demand
    waiters: list[asyncio.Future[Adapter]] = field(default_factory=list)


@dataclass(slots=True)
class _Closing:
    waiters: list[asyncio.Future[int]] = field(default_factory=list)
    freed: int = 0


@dataclass(slots=True)
class _Task:
    """Which group is to do what calls wait for, and which could not."""

    epoch: int = 0
    refused_by: frozenset[int] = frozenset()


class Wishes:
    """Futures of API calls, by the key of the version they wait for. A call that has gone is not told.

    A version that shall come to a disk, or to a device, is given to one group at a time.
    """

    def __init__(self) -> None:
        self._disk: dict[str, list[asyncio.Future[None]]] = {}
        self._loads: dict[str, _Load] = {}
        self._closing: dict[str, _Closing] = {}
        self._tasks: dict[str, _Task] = {}

    def __bool__(self) -> bool:
        return bool(self._disk or self._loads or self._closing)

    def for_disk(self, epoch: int) -> Collection[str]:
        """Keys that somebody waits to have on disk, of those given to this group."""
        return [key for key in self._disk if self._tasks[key].epoch == epoch]

    def demands(self, epoch: int) -> list[Demand]:
        """What shall become resident, though no request names it, of what was given to this group."""
        return [load.demand for key, load in self._loads.items() if self._tasks[key].epoch == epoch]

    @property
    def closing(self) -> list[str]:
        """Keys that shall be freed once nobody uses them."""
        return list(self._closing)

    def waiting(self, key: str) -> int:
        """Calls that wait to have it on disk."""
        return len(self._disk.get(key, ()))

    def is_wanted(self, key: str) -> bool:
        """It shall become resident."""
        return key in self._loads

    # Which group brings it.

    def given_to(self, key: str) -> int:
        """The epoch of the group that it was given to last."""
        return self._tasks[key].epoch

    def refused_by(self, key: str) -> frozenset[int]:
        return self._tasks[key].refused_by

    def to_bring(self) -> list[str]:
        """Keys that some group shall have on disk or resident."""
        return list(self._tasks)

    def give(self, key: str, epoch: int) -> None:
        self._tasks[key].epoch = epoch

    def refuse_by(self, key: str, epoch: int) -> None:
        """This group cannot have it."""
        self._tasks[key].refused_by |= {epoch}

    def _settle(self, key: str) -> None:
        if key not in self._disk and key not in self._loads:
            self._tasks.pop(key, None)

    # Disk.

    def add_disk(self, key: str, done: asyncio.Future[None]) -> None:
        self._disk.setdefault(key, []).append(done)
        self._tasks.setdefault(key, _Task())

    def remove_disk(self, key: str, done: asyncio.Future[None]) -> None:
        waiters = self._disk.get(key, [])
        if done in waiters:
            waiters.remove(done)
        if not waiters:
            self._take_disk(key)

    def on_disk(self, key: str) -> None:
        _answer(self._take_disk(key), None)

    def not_on_disk(self, key: str, make_error: Callable[[], RouterError]) -> None:
        _refuse(self._take_disk(key), make_error)

    def _take_disk(self, key: str) -> list[asyncio.Future[None]]:
        waiters = self._disk.pop(key, [])
        self._settle(key)
        return waiters

    def refuse_disk(self, make_error: Callable[[], RouterError]) -> None:
        """Refuse everybody who waits for a disk."""
        for key in list(self._disk):
            self.not_on_disk(key, make_error)

    # Loads.

    def add_load(self, demand: Demand, waiters: Iterable[asyncio.Future[Adapter]] = ()) -> None:
        """Note that this demand's one adapter shall become resident."""
        (key,) = demand.keys
        self._loads.setdefault(key, _Load(demand)).waiters.extend(waiters)
        self._tasks.setdefault(key, _Task())

    def move_load(self, key: str, to: str) -> None:
        """Whoever wished one version resident wishes another one instead, which is as old a wish."""
        load = self._loads.pop(key)
        self._settle(key)
        self.add_load(Demand((to,), load.demand.ticket, load.demand.since), load.waiters)

    def loaded(self, key: str, adapter: Adapter) -> None:
        """`adapter`: the version that the name stands for now."""
        _answer(self._take_load(key), adapter)

    def not_loaded(self, key: str, make_error: Callable[[], RouterError]) -> None:
        _refuse(self._take_load(key), make_error)

    def _take_load(self, key: str) -> list[asyncio.Future[Adapter]]:
        load = self._loads.pop(key, None)
        self._settle(key)
        return load.waiters if load else []

    # Ends.

    def add_closing(self, key: str, waiters: Iterable[asyncio.Future[int]] = ()) -> None:
        self._closing.setdefault(key, _Closing()).waiters.extend(waiters)

    def freed(self, key: str, size: int) -> None:
        """One group has freed so many bytes of its device; does nothing unless it is closing."""
        if key in self._closing:
            self._closing[key].freed += size

    def closed(self, key: str) -> None:
        """No group has it any more."""
        closing = self._closing.pop(key)
        _answer(closing.waiters, closing.freed)

    def refuse(self, make_error: Callable[[], RouterError]) -> None:
        """Refuse everybody. What is closing goes on closing."""
        self.refuse_disk(make_error)
        for key in list(self._loads):
            self.not_loaded(key, make_error)
        for closing in self._closing.values():
            _refuse(closing.waiters, make_error)
            closing.waiters = []


def _answer(waiters: Iterable[asyncio.Future[_T]], value: _T) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(value)


def _refuse(waiters: Iterable[asyncio.Future[_T]], make_error: Callable[[], RouterError]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_exception(make_error())
