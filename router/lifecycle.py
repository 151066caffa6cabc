"""An adapter's way from absent to resident and back, as messages and plans move it. Part of the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

from .adapters import AdapterRegistry
from .client import AdapterState, AdapterStatus
from .downloads import downloads_of
from .errors import AdapterNotFound, AdapterRejected, RouterError, ShardLost
from .fetches import AdapterTasks
from .group import Group
from .messages import (
    AdapterReport,
    DiskWaitEnded,
    DiskWished,
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
from .versions import Adapter
from .wishes import Wishes

log = logging.getLogger(__name__)

LOAD_PAUSE = 0.5
"""Seconds before an adapter is loaded or fetched again for which the shard had no room or no answer."""
LOAD_TRIES = 6


class AdapterLifecycle:
    """Moves versions of adapters between their states.

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
        self._wishes = Wishes()
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
        """Somebody waits for an adapter, or one waits to be freed."""
        return bool(self._wishes)

    @property
    def demands(self) -> list[Demand]:
        """Loads by name that are not fulfilled yet, for the scheduler."""
        return self._wishes.demands

    @property
    def wanted_on_disk(self) -> Collection[str]:
        """Keys that calls wait to have on disk, for the scheduler."""
        return self._wishes.for_disk

    # What the API asks for.

    def wish_disk(self, message: DiskWished, now: float) -> None:
        """Note that an adapter shall be on disk; answered at once if it is, or has just failed."""
        adapter = message.adapter
        self._wishes.add_disk(adapter.key, message.done)
        if adapter.on_disk:
            self._wishes.on_disk(adapter.key)
        elif adapter.state is AdapterState.FAILED and adapter.retry_at > now:
            self._wishes.not_on_disk(adapter.key, lambda: adapter.error(now))

    def end_disk_wait(self, message: DiskWaitEnded) -> None:
        self._wishes.remove_disk(message.adapter.key, message.done)

    def refuse_disk_waits(self, make_error: Callable[[], RouterError]) -> None:
        self._wishes.refuse_disk(make_error)

    def wish(self, message: LoadWished, group: Group | None, ticket: int, now: float) -> None:
        """Note that an adapter shall become resident; answered at once if it is."""
        adapter = message.adapter
        adapter.pinned |= message.pin
        self._wishes.add_load(Demand((adapter.key,), ticket, now), [message.done])
        if adapter.state is AdapterState.FAILED and adapter.retry_at > now:
            self._wishes.not_loaded(adapter.key, lambda: adapter.error(now))
        elif group is not None and group.residency.ready((adapter.key,)):
            self._wishes.loaded(adapter.key, adapter)

    def unpin(self, message: Unpinned) -> None:
        message.adapter.pinned = False
        if not message.done.done():
            message.done.set_result(None)

    def close(self, message: UnloadWished) -> None:
        """Free a version once nobody uses it: `sweep` does it. Who wished it loaded is refused."""
        adapter = message.adapter
        self._wishes.not_loaded(
            adapter.key, lambda: AdapterNotFound(f"Adapter {adapter.name} was unloaded.", param="model")
        )
        self._wishes.add_closing(adapter.key, [message.done])

    def status(self, adapter: Adapter, group: Group | None) -> AdapterStatus:
        entry = group.residency.get(adapter.key) if group else None
        places = {Place.LOADING: AdapterState.LOADING, Place.RESIDENT: AdapterState.RESIDENT}
        state = adapter.state if entry is None else places.get(entry.place, adapter.state)
        failed = adapter.failure is not None and adapter.state is AdapterState.FAILED
        manifest = adapter.manifest
        return AdapterStatus(
            name=adapter.name,
            source=str(adapter.source),
            state=state,
            digest=adapter.digest,
            bytes=entry.bytes if entry else adapter.bytes,
            max_rank=manifest.max_rank if manifest else 0,
            modules=manifest.modules if manifest else 0,
            pinned=adapter.pinned,
            running=entry.references if entry else 0,
            waiting=self._queues.waiting(adapter.key) + self._wishes.waiting(adapter.key),
            bytes_done=adapter.bytes_done,
            bytes_total=adapter.bytes_total,
            error=adapter.failure.message if failed and adapter.failure else "",
            kind=manifest.kind if manifest else "",
            scaling=adapter.scaling,
            warnings=manifest.warnings if manifest else (),
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
                downloads = downloads_of(adapter, self._registry.digests_on_disk)
                self._tasks.fetch(key, group.epoch, downloads)
        for key in work.loads:
            if (adapter := self._registry.get(key)) is not None:
                slot = group.residency.begin_load(key, adapter.bytes)
                self._tasks.load(key, group.epoch, adapter.digest, slot)
        for demand, error in work.rejects:
            for key in demand.keys:
                self._give_up(key, error, only=demand.keys)

    def sweep(self, group: Group | None) -> None:
        """Free closing versions that nobody uses any more."""
        for key in self._wishes.closing:
            adapter = self._registry.get(key)
            if adapter is None:
                self._wishes.closed(key, 0)
                continue
            entry = group.residency.get(key) if group else None
            if self._queues.waiting(key) or adapter.leases or adapter.state is AdapterState.FETCHING:
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
        adapter, manifest = self._registry.get(message.key), message.manifest
        if adapter is None:
            return
        error = _mismatch(adapter, message)
        if error is not None:
            self._failed(adapter, error, now)
            return
        self._registry.fetched(adapter, manifest, now)
        for warning in manifest.warnings:
            log.warning("adapter %s: %s", adapter.name, warning)
        self._wishes.on_disk(adapter.key)
        named = self._registry.named(adapter)
        if adapter.candidate and named is not None and named.digest == manifest.digest:
            self._adopt(adapter, group, now)

    def _adopt(self, candidate: Adapter, group: Group, now: float) -> None:
        """A load found the bytes that its name has: whoever wished it waits for that version."""
        known = self._registry.adopt(candidate, now)
        self._wishes.move_load(candidate.key, known.key)
        if group.residency.ready((known.key,)):
            self._wishes.loaded(known.key, known)

    def _fetch_failed(self, message: FetchFailed, group: Group, now: float) -> None:
        if (adapter := self._registry.get(message.key)) is not None:
            self._failed(adapter, message.error, now)

    def _loaded(self, message: Loaded, group: Group, now: float) -> None:
        self._metrics.adapter_seconds["load"].observe(message.seconds)
        self._metrics.adapter_loads += 1
        group.residency.loaded(message.key, message.reply.bytes, now)
        adapter = self._registry.get(message.key)
        if adapter is None:
            return
        adapter.failures = 0
        if adapter.candidate:
            self._supersede(adapter)
        self._wishes.loaded(adapter.key, adapter)

    def _supersede(self, candidate: Adapter) -> None:
        """From here on the name stands for this version; the one before it drains."""
        before = self._registry.promote(candidate)
        if before is not None:
            self._wishes.loaded(before.key, candidate)
            self._wishes.add_closing(before.key)

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
        if adapter is not None and self._wishes.is_closing(message.key) and not self._used(adapter):
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
            if adapter.pinned and not adapter.closing and not self._wishes.is_wanted(adapter.key):
                self._wishes.add_load(Demand((adapter.key,), new_ticket(), now))

    def end(self, make_error: Callable[[], RouterError]) -> None:
        """Refuse everybody who still waits for an adapter."""
        candidates = [adapter for adapter in self._registry if adapter.candidate]
        self._wishes.refuse(make_error)
        for adapter in candidates:
            self._drop_candidate(adapter)

    def _failed(self, adapter: Adapter, error: RouterError, now: float) -> None:
        """Remember it, unless only the shard was lost; tell everybody who waits for this adapter."""
        if isinstance(error, ShardLost):
            self._registry.absent(adapter, now + LOAD_PAUSE)
            return
        named = type(error)(f"Adapter {adapter.name}: {error.message}", param="model")
        log.warning("adapter %s failed: %s", adapter.name, error.message)
        self._metrics.adapter_failures += 1
        self._registry.failed(adapter, named, now)
        self._wishes.not_on_disk(adapter.key, lambda: _copy(named))
        self._give_up(adapter.key, named)

    def _give_up(self, key: str, error: RouterError, only: tuple[str, ...] | None = None) -> None:
        """End whoever waits for this adapter: waiting sequences (only of one adapter set) and its loads."""
        for sequence in self._queues.naming(key):
            if only is None or sequence.keys == only:
                self._fail_waiting(sequence, _copy(error))
        if only is None or only == (key,):
            self._wishes.not_loaded(key, lambda: _copy(error))
            adapter = self._registry.get(key)
            if adapter is not None and adapter.candidate:
                self._drop_candidate(adapter)

    def _drop_candidate(self, adapter: Adapter) -> None:
        """A load by name has failed: its name goes on standing for what it stood for."""
        adapter.candidate, adapter.closing = False, True
        self._wishes.add_closing(adapter.key)

    def _used(self, adapter: Adapter) -> bool:
        return bool(self._queues.waiting(adapter.key) or adapter.leases)

    def _closed(self, adapter: Adapter, freed: int) -> None:
        self._registry.forget(adapter)
        self._wishes.closed(adapter.key, freed)


def _mismatch(adapter: Adapter, message: Fetched) -> AdapterRejected | None:
    """Why what was fetched cannot be this version."""
    manifest = message.manifest
    if adapter.manifest is not None and adapter.digest != manifest.digest:
        return AdapterRejected(
            f"its source holds other bytes now (digest {manifest.digest}, before {adapter.digest}): "
            "load it again to use them"
        )
    if manifest.alone and adapter.scaling != 1:
        return AdapterRejected(
            f"it takes no scaling but 1, not {adapter.scaling:g}, since it is {manifest.alone}: "
            "load it without scaling"
        )
    return None


def _copy(error: RouterError) -> RouterError:
    """For one caller."""
    return type(error)(error.message, param=error.param, retry_after=error.retry_after)
