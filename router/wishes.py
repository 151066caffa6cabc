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


class Wishes:
    """Futures of API calls, by the key of the version they wait for. A call that has gone is not told."""

    def __init__(self) -> None:
        self._disk: dict[str, list[asyncio.Future[None]]] = {}
        self._loads: dict[str, _Load] = {}
        self._closing: dict[str, list[asyncio.Future[int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._disk or self._loads or self._closing)

    @property
    def for_disk(self) -> Collection[str]:
        """Keys that somebody waits to have on disk."""
        return self._disk.keys()

    @property
    def demands(self) -> list[Demand]:
        """What shall become resident, though no request names it."""
        return [load.demand for load in self._loads.values()]

    @property
    def closing(self) -> list[str]:
        """Keys that shall be freed once nobody uses them."""
        return list(self._closing)

    def waiting(self, key: str) -> int:
        """Calls that wait to have it on disk."""
        return len(self._disk.get(key, ()))

    def is_closing(self, key: str) -> bool:
        return key in self._closing

    def is_wanted(self, key: str) -> bool:
        """It shall become resident."""
        return key in self._loads

    # Disk.

    def add_disk(self, key: str, done: asyncio.Future[None]) -> None:
        self._disk.setdefault(key, []).append(done)

    def remove_disk(self, key: str, done: asyncio.Future[None]) -> None:
        waiters = self._disk.get(key, [])
        if done in waiters:
            waiters.remove(done)
        if not waiters:
            self._disk.pop(key, None)

    def on_disk(self, key: str) -> None:
        _answer(self._disk.pop(key, ()), None)

    def not_on_disk(self, key: str, make_error: Callable[[], RouterError]) -> None:
        _refuse(self._disk.pop(key, ()), make_error)

    def refuse_disk(self, make_error: Callable[[], RouterError]) -> None:
        """Refuse everybody who waits for a disk."""
        for key in list(self._disk):
            self.not_on_disk(key, make_error)

    # Loads.

    def add_load(self, demand: Demand, waiters: Iterable[asyncio.Future[Adapter]] = ()) -> None:
        """Note that this demand's one adapter shall become resident."""
        (key,) = demand.keys
        self._loads.setdefault(key, _Load(demand)).waiters.extend(waiters)

    def move_load(self, key: str, to: str) -> None:
        """Whoever wished one version resident wishes another one instead, which is as old a wish."""
        load = self._loads.pop(key)
        self.add_load(Demand((to,), load.demand.ticket, load.demand.since), load.waiters)

    def loaded(self, key: str, adapter: Adapter) -> None:
        """`adapter`: the version that the name stands for now."""
        _answer(self._take_load(key), adapter)

    def not_loaded(self, key: str, make_error: Callable[[], RouterError]) -> None:
        _refuse(self._take_load(key), make_error)

    def _take_load(self, key: str) -> list[asyncio.Future[Adapter]]:
        load = self._loads.pop(key, None)
        return load.waiters if load else []

    # Ends.

    def add_closing(self, key: str, waiters: Iterable[asyncio.Future[int]] = ()) -> None:
        self._closing.setdefault(key, []).extend(waiters)

    def closed(self, key: str, freed: int) -> None:
        """`freed`: bytes of the device."""
        _answer(self._closing.pop(key), freed)

    def refuse(self, make_error: Callable[[], RouterError]) -> None:
        """Refuse everybody. What is closing goes on closing."""
        self.refuse_disk(make_error)
        for key in list(self._loads):
            self.not_loaded(key, make_error)
        for key, waiters in self._closing.items():
            _refuse(waiters, make_error)
            self._closing[key] = []


def _answer(waiters: Iterable[asyncio.Future[_T]], value: _T) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(value)


def _refuse(waiters: Iterable[asyncio.Future[_T]], make_error: Callable[[], RouterError]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_exception(make_error())
