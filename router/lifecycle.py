"""An adapter's way from absent to resident and back, as messages and plans move it. Part of the loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .adapters import Adapter, AdapterRegistry
from .client import AdapterState, AdapterStatus
from .errors import AdapterNotFound, RouterError, ShardLost
from .fetches import AdapterTasks
from .group import Group
from .messages import (
    AdapterReport,
    Fetched,
    FetchFailed,
    FetchProgressed,
    Loaded,
    LoadFailed,
    LoadWished,
    Unloaded,
    UnloadFailed,
    UnloadWished,
    Unpinned,
)
from .metrics import Metrics
from .queues import Queues
from .residency import Place
from .rpc_errors import AdapterMemoryFull
from .scheduler import AdapterWork, Demand
from .sequence import Sequence

log = logging.getLogger(__name__)

LOAD_PAUSE = 0.5
"""Seconds before an adapter is loaded or fetched again for which the shard had no room or no answer."""
LOAD_TRIES = 6


@dataclass(slots=True)
class _Wish:
    demand: Demand
    waiters: list[asyncio.Future[None]]


class AdapterLifecycle:
    """Moves adapters between their states. Sole owner of wishes and of adapters that are closing.

    Args:
        fail_waiting: ends a waiting sequence with an error.
        abandon: gives the group up, when a slot's content is not known any more.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        queues: Queues,
        tasks: AdapterTasks,
        metrics: Metrics,
        *,
        fail_waiting: Callable[[Sequence, RouterError], None],
        abandon: Callable[[str], None],
    ) -> None:
        self._registry = registry
        self._queues = queues
        self._tasks = tasks
        self._metrics = metrics
        self._fail_waiting = fail_waiting
        self._abandon = abandon
        self._wishes: dict[str, _Wish] = {}
        self._closing: dict[str, list[asyncio.Future[int]]] = {}
        self._reports: dict[type, Callable[[Any, Group, float], None]] = {
            FetchProgressed: self._progressed,
            Fetched: self._fetched,
            FetchFailed: self._fetch_failed,
            Loaded: self._loaded,
            LoadFailed: self._load_failed,
            Unloaded: self._unloaded,
            UnloadFailed: self._unload_failed,
        }

    @property
    def busy(self) -> bool:
        """Somebody waits for an adapter to be loaded or unloaded."""
        return bool(self._wishes or self._closing)

    @property
    def demands(self) -> list[Demand]:
        """Loads by name that are not fulfilled yet, for the scheduler."""
        return [wish.demand for wish in self._wishes.values()]

    # What the API asks for.

    def wish(self, message: LoadWished, group: Group | None, ticket: int, now: float) -> None:
        """Note that an adapter shall become resident; answered at once if it is."""
        adapter = message.adapter
        adapter.pinned |= message.pin
        if adapter.state is AdapterState.FAILED and adapter.retry_at > now:
            _fail(message.done, adapter.error(now))
        elif group is not None and group.residency.ready((adapter.key,)):
            _answer(message.done, None)
        else:
            wish = self._wishes.setdefault(adapter.key, _Wish(Demand((adapter.key,), ticket, now), []))
            wish.waiters.append(message.done)

    def unpin(self, message: Unpinned) -> None:
        message.adapter.pinned = False
        _answer(message.done, None)

    def close(self, message: UnloadWished) -> None:
        """Free an adapter once nobody names it: `sweep` does it. Who wished it loaded is refused."""
        wish = self._wishes.pop(message.adapter.key, None)
        for waiter in wish.waiters if wish else ():
            _fail(waiter, AdapterNotFound(f"Adapter {message.adapter.name} was unloaded.", param="model"))
        self._closing.setdefault(message.adapter.key, []).append(message.done)

    def status(self, adapter: Adapter, group: Group | None) -> AdapterStatus:
        entry = group.residency.get(adapter.key) if group else None
        places = {Place.LOADING: AdapterState.LOADING, Place.RESIDENT: AdapterState.RESIDENT}
        state = adapter.state if entry is None else places.get(entry.place, adapter.state)
        failed = adapter.failure is not None and adapter.state is AdapterState.FAILED
        return AdapterStatus(
            name=adapter.name,
            source=str(adapter.source),
            state=state,
            digest=adapter.digest,
            bytes=entry.bytes if entry else adapter.bytes,
            max_rank=adapter.max_rank,
            modules=adapter.modules,
            pinned=adapter.pinned,
            running=entry.references if entry else 0,
            waiting=self._queues.waiting(adapter.key),
            bytes_done=adapter.bytes_done,
            bytes_total=adapter.bytes_total,
            error=adapter.failure.message if failed and adapter.failure else "",
            warnings=adapter.warnings,
        )

    # What the scheduler decided.

    def carry_out(self, work: AdapterWork, group: Group, now: float) -> None:
        """Start the fetches, loads and evictions of a plan, and refuse what can never be met."""
        for key in work.evictions:
            self._metrics.adapter_evictions += 1
            self._tasks.unload(key, group.epoch, group.residency.begin_unload(key))
        for key in work.fetches:
            if (adapter := self._registry.get(key)) is not None:
                self._registry.fetching(adapter)
                self._metrics.adapter_downloads += 1
                self._tasks.fetch(adapter, group.epoch)
        for key in work.loads:
            if (adapter := self._registry.get(key)) is not None:
                slot = group.residency.begin_load(key, adapter.bytes)
                self._tasks.load(key, group.epoch, adapter.digest, slot)
        for demand, error in work.rejects:
            for key in demand.keys:
                self._give_up(key, error, only=demand.keys)

    def sweep(self, group: Group | None) -> None:
        """Free closing adapters that nobody uses any more."""
        for key in list(self._closing):
            adapter = self._registry.get(key)
            if adapter is None:
                continue
            entry = group.residency.get(key) if group else None
            if self._queues.waiting(key) or adapter.state is AdapterState.FETCHING:
                continue
            if entry is None or group is None:
                self._closed(adapter, 0)
            elif entry.place is Place.RESIDENT and entry.references == 0:
                self._tasks.unload(key, group.epoch, group.residency.begin_unload(key))

    def report(self, message: AdapterReport, group: Group | None, now: float) -> None:
        """Take in what a task tells. One of an epoch that is over is dropped: `reset` dealt with it."""
        if group is not None and message.epoch == group.epoch:
            self._reports[type(message)](message, group, now)

    def _progressed(self, message: FetchProgressed, group: Group, now: float) -> None:
        if (adapter := self._registry.get(message.key)) is not None:
            adapter.bytes_done = message.progress.bytes_done
            adapter.bytes_total = message.progress.bytes_total

    def _fetched(self, message: Fetched, group: Group, now: float) -> None:
        self._metrics.adapter_seconds["download"].observe(message.seconds)
        if (adapter := self._registry.get(message.key)) is not None:
            self._registry.fetched(adapter, message.manifest, now)
            for warning in adapter.warnings:
                log.warning("adapter %s: %s", adapter.name, warning)

    def _fetch_failed(self, message: FetchFailed, group: Group, now: float) -> None:
        if (adapter := self._registry.get(message.key)) is not None:
            self._failed(adapter, message.error, now)

    def _loaded(self, message: Loaded, group: Group, now: float) -> None:
        self._metrics.adapter_seconds["load"].observe(message.seconds)
        self._metrics.adapter_loads += 1
        group.residency.loaded(message.key, message.reply.bytes, now)
        if (adapter := self._registry.get(message.key)) is not None:
            adapter.failures = 0
        if (wish := self._wishes.pop(message.key, None)) is not None:
            for waiter in wish.waiters:
                _answer(waiter, None)

    def _load_failed(self, message: LoadFailed, group: Group, now: float) -> None:
        group.residency.remove(message.key)
        adapter, error = self._registry.get(message.key), message.error
        if isinstance(error, ShardLost):
            self._abandon(f"the load of {message.key} was not answered")
        elif adapter is None:
            return
        elif isinstance(error, AdapterMemoryFull) and adapter.failures < LOAD_TRIES:
            adapter.failures += 1
            adapter.retry_at = now + LOAD_PAUSE
        elif isinstance(error, AdapterNotFound) and adapter.failures == 0:
            adapter.failures += 1
            self._registry.absent(adapter, now + LOAD_PAUSE)
        else:
            self._failed(adapter, error, now)

    def _unloaded(self, message: Unloaded, group: Group, now: float) -> None:
        freed = group.residency.remove(message.key)
        adapter = self._registry.get(message.key)
        if adapter is not None and message.key in self._closing and not self._queues.waiting(message.key):
            self._closed(adapter, freed)

    def _unload_failed(self, message: UnloadFailed, group: Group, now: float) -> None:
        self._abandon(f"slot of {message.key} could not be freed: {message.error.message}")

    def reset(self) -> None:
        """The group is gone, and with it all it held."""
        self._tasks.cancel()
        self._registry.reset()

    def revive(self, new_ticket: Callable[[], int], now: float) -> None:
        """A group is back: pinned adapters shall be resident again."""
        for adapter in self._registry:
            if adapter.pinned and not adapter.closing and adapter.key not in self._wishes:
                self._wishes[adapter.key] = _Wish(Demand((adapter.key,), new_ticket(), now), [])

    def end(self, make_error: Callable[[], RouterError]) -> None:
        """Refuse everybody who still waits for an adapter."""
        for wish in self._wishes.values():
            for waiter in wish.waiters:
                _fail(waiter, make_error())
        for waiters in self._closing.values():
            for closing in waiters:
                _fail(closing, make_error())
        self._wishes.clear()
        self._closing.clear()

    def _failed(self, adapter: Adapter, error: RouterError, now: float) -> None:
        """Remember it, unless only the shard was lost; tell everybody who waits for this adapter."""
        if isinstance(error, ShardLost):
            self._registry.absent(adapter, now + LOAD_PAUSE)
            return
        named = type(error)(f"Adapter {adapter.name}: {error.message}", param="model")
        log.warning("adapter %s failed: %s", adapter.name, error.message)
        self._metrics.adapter_failures += 1
        self._registry.failed(adapter, named, now)
        self._give_up(adapter.key, named)

    def _give_up(self, key: str, error: RouterError, only: tuple[str, ...] | None = None) -> None:
        """End whoever waits for this adapter: waiting sequences (only of one adapter set) and its loads."""

        def fresh() -> RouterError:
            return type(error)(error.message, param=error.param, retry_after=error.retry_after)

        for sequence in self._queues.naming(key):
            if only is None or sequence.keys == only:
                self._fail_waiting(sequence, fresh())
        if only is None or only == (key,):
            wish = self._wishes.pop(key, None)
            for waiter in wish.waiters if wish else ():
                _fail(waiter, fresh())

    def _closed(self, adapter: Adapter, freed: int) -> None:
        self._registry.forget(adapter)
        for waiter in self._closing.pop(adapter.key):
            _answer(waiter, freed)


def _answer(
    future: asyncio.Future[object] | asyncio.Future[None] | asyncio.Future[int], value: object
) -> None:
    if not future.done():
        future.set_result(value)  # type: ignore[arg-type]


def _fail(future: asyncio.Future[None] | asyncio.Future[int], error: RouterError) -> None:
    if not future.done():
        future.set_exception(error)
