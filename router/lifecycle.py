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
from .fleet import Fleet
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
    """Moves versions of adapters between their states, on each group of its own.

    Args:
        tasks: of each group, by its index.
        fail: ends a waiting sequence with an error.
        turn_away: gives a waiting sequence that a group cannot serve to another, or ends it with the error.
        abandon: gives a group up, when a slot's content is not known any more.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        fleet: Fleet,
        tasks: tuple[AdapterTasks, ...],
        metrics: Metrics,
        *,
        fail: Callable[[Sequence, RouterError], None],
        turn_away: Callable[[Sequence, Group, RouterError], None],
        abandon: Callable[[Group, str], None],
    ) -> None:
        self._registry = registry
        self._fleet = fleet
        self._tasks = tasks
        self._metrics = metrics
        self._fail = fail
        self._turn_away = turn_away
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

    def demands(self, group: Group) -> list[Demand]:
        """Loads by name that this group is to fulfil, for the scheduler."""
        return self._wishes.demands(group.epoch)

    def wanted_on_disk(self, group: Group) -> Collection[str]:
        """Keys that calls wait to have on this group's disk, for the scheduler."""
        return self._wishes.for_disk(group.epoch)

    # What the API asks for.

    def wish_disk(self, message: DiskWished, now: float) -> None:
        """Note that an adapter shall be on disk; answered at once if it is, or has just failed."""
        adapter = message.adapter
        self._wishes.add_disk(adapter.key, message.done)
        if adapter.on_disk:
            self._wishes.on_disk(adapter.key)
        elif adapter.failing(now):
            self._wishes.not_on_disk(adapter.key, lambda: adapter.error(now))

    def end_disk_wait(self, message: DiskWaitEnded) -> None:
        self._wishes.remove_disk(message.adapter.key, message.done)

    def refuse_disk_waits(self, make_error: Callable[[], RouterError]) -> None:
        self._wishes.refuse_disk(make_error)

    def wish(self, message: LoadWished, ticket: int, now: float) -> None:
        """Note that an adapter shall become resident on some group; answered at once if it is."""
        adapter = message.adapter
        adapter.pinned |= message.pin
        self._wishes.add_load(Demand((adapter.key,), ticket, now), [message.done])
        if adapter.failing(now):
            self._wishes.not_loaded(adapter.key, lambda: adapter.error(now))
        elif self._fleet.is_resident((adapter.key,)):
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

    def status(self, adapter: Adapter) -> AdapterStatus:
        """Its state on the group that has come furthest; uses and waits of all groups together."""
        entries = self._fleet.entries(adapter.key)
        places = {entry.place for entry in entries}
        state = adapter.state
        if places & {Place.LOADING, Place.RESIDENT}:
            state = AdapterState.RESIDENT if Place.RESIDENT in places else AdapterState.LOADING
        failed = adapter.state is AdapterState.FAILED
        manifest, copies = adapter.manifest, adapter.copies.values()
        return AdapterStatus(
            name=adapter.name,
            source=str(adapter.source),
            state=state,
            digest=adapter.digest,
            bytes=max((entry.bytes for entry in entries), default=adapter.bytes),
            max_rank=manifest.max_rank if manifest else 0,
            modules=manifest.modules if manifest else 0,
            pinned=adapter.pinned,
            running=sum(entry.references for entry in entries),
            waiting=self._fleet.waiting(adapter.key) + self._wishes.waiting(adapter.key),
            bytes_done=max((copy.bytes_done for copy in copies), default=0),
            bytes_total=max((copy.bytes_total for copy in copies), default=0),
            error=adapter.failure.message if failed and adapter.failure else "",
            kind=manifest.kind if manifest else "",
            scaling=adapter.scaling,
            warnings=manifest.warnings if manifest else (),
        )

    # What the scheduler decided.

    def carry_out(self, work: AdapterWork, group: Group, now: float) -> None:
        """Start a group's fetches, loads and evictions of a plan, and refuse what it can never meet."""
        tasks = self._tasks[group.index]
        for key in work.evictions:
            self._metrics.adapter_evictions += 1
            self._unload(key, group)
        for key in work.fetches:
            if (adapter := self._registry.get(key)) is not None:
                self._registry.fetching(adapter, group.index)
                self._metrics.adapter_downloads += 1
                downloads = downloads_of(adapter, lambda: self._registry.digests_on_disk(group.index))
                tasks.fetch(key, group.epoch, downloads)
        for key in work.loads:
            if (adapter := self._registry.get(key)) is not None:
                slot = group.residency.begin_load(key, adapter.copy(group.index).bytes)
                tasks.load(key, group.epoch, adapter.digest, slot)
        for demand, error in work.rejects:
            self._refuse_demand(demand, group, error)

    def _unload(self, key: str, group: Group) -> None:
        self._tasks[group.index].unload(key, group.epoch, group.residency.begin_unload(key))

    def _refuse_demand(self, demand: Demand, group: Group, error: RouterError) -> None:
        """What waits for exactly these adapters on this group goes to another one, or ends."""
        for sequence in group.queues.naming(demand.keys[0]):
            if sequence.keys == demand.keys:
                self._turn_away(sequence, group, error)
        for key in demand.keys if len(demand.keys) == 1 else ():
            if not self._give_elsewhere(key, group):
                self._load_ends(key, error)

    def assign(self) -> None:
        """Give what calls wait for to the groups that are to bring it, anew where a group is gone."""
        for key in self._wishes.to_bring():
            group = self._fleet.of(self._wishes.given_to(key))
            if group is None or group.draining:
                self._give(key)

    def _give(self, key: str) -> bool:
        """To a group that has or fetches it, else to the one that serves it best. False: none is left."""
        adapter, refused_by = self._registry.get(key), self._wishes.refused_by(key)
        left = [group for group in self._fleet.accepting if group.epoch not in refused_by]
        near = [g for g in left if adapter and adapter.copy(g.index).state is not AdapterState.ABSENT]
        group = self._fleet.place((key,), 0, among=near or left)
        if group is not None:
            self._wishes.give(key, group.epoch)
        return group is not None

    def _give_elsewhere(self, key: str, group: Group) -> bool:
        """This group cannot have what was given to it. False if no other group is left."""
        if key not in self._wishes.to_bring() or self._wishes.given_to(key) != group.epoch:
            return True
        self._wishes.refuse_by(key, group.epoch)
        return self._give(key)

    def sweep(self) -> None:
        """Free closing versions that nobody uses any more, on every group."""
        for key in self._wishes.closing:
            adapter = self._registry.get(key)
            if adapter is None:
                self._wishes.closed(key)
            elif not (self._fleet.waiting(key) or adapter.leases or adapter.fetching):
                self._free(adapter)

    def _free(self, adapter: Adapter) -> None:
        for group in self._fleet:
            entry = group.residency.get(adapter.key)
            if entry is not None and entry.place is Place.RESIDENT and entry.references == 0:
                self._unload(adapter.key, group)
        if not self._fleet.entries(adapter.key):
            self._registry.forget(adapter)
            self._wishes.closed(adapter.key)

    def report(self, message: AdapterReport, now: float) -> None:
        """Take in what a task tells. One of an epoch that is over is dropped: `lost` dealt with it."""
        group = self._fleet.of(message.epoch)
        if group is not None:
            self._reports[type(message)](message, group, now)

    def _progressed(self, message: FetchProgressed, group: Group, now: float) -> None:
        if (adapter := self._registry.get(message.key)) is not None:
            copy = adapter.copies[group.index]
            copy.bytes_done, copy.bytes_total = message.progress.bytes_done, message.progress.bytes_total

    def _fetched(self, message: Fetched, group: Group, now: float) -> None:
        self._metrics.adapter_seconds["download"].observe(message.seconds)
        adapter, manifest = self._registry.get(message.key), message.manifest
        if adapter is None:
            return
        error = _mismatch(adapter, message)
        if error is not None:
            self._failed(adapter, group, error, now)
            return
        self._registry.fetched(adapter, group.index, manifest, now)
        for warning in manifest.warnings:
            log.warning("adapter %s: %s", adapter.name, warning)
        self._wishes.on_disk(adapter.key)
        named = self._registry.named(adapter)
        if adapter.candidate and named is not None and named.digest == manifest.digest:
            self._adopt(adapter, now)

    def _adopt(self, candidate: Adapter, now: float) -> None:
        """A load found the bytes that its name has: whoever wished it waits for that version."""
        known = self._registry.adopt(candidate, now)
        self._wishes.move_load(candidate.key, known.key)
        if self._fleet.is_resident((known.key,)):
            self._wishes.loaded(known.key, known)

    def _fetch_failed(self, message: FetchFailed, group: Group, now: float) -> None:
        if (adapter := self._registry.get(message.key)) is not None:
            self._failed(adapter, group, message.error, now)

    def _loaded(self, message: Loaded, group: Group, now: float) -> None:
        self._metrics.adapter_seconds["load"].observe(message.seconds)
        self._metrics.adapter_loads += 1
        group.residency.loaded(message.key, message.reply.bytes, now)
        adapter = self._registry.get(message.key)
        if adapter is None:
            return
        adapter.failures = adapter.copies[group.index].failures = 0
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
            self._abandon(group, f"the load of {message.key} was not answered")
        elif adapter is None:
            return
        elif isinstance(error, AdapterMemoryFull) and adapter.copies[group.index].failures < LOAD_TRIES:
            self._registry.postpone(adapter, group.index, now + LOAD_PAUSE)
        elif isinstance(error, AdapterNotFound) and adapter.copies[group.index].failures == 0:
            self._registry.postpone(adapter, group.index, now + LOAD_PAUSE)
            self._registry.absent(adapter, group.index, now + LOAD_PAUSE)
        else:
            self._failed(adapter, group, error, now)

    def _unloaded(self, message: Unloaded, group: Group, now: float) -> None:
        self._wishes.freed(message.key, group.residency.remove(message.key))

    def _unload_failed(self, message: UnloadFailed, group: Group, now: float) -> None:
        self._abandon(group, f"slot of {message.key} could not be freed: {message.error.message}")

    def lost(self, group: Group) -> None:
        """The group is gone, and with it all it held."""
        self._tasks[group.index].cancel()
        self._registry.lost(group.index)

    def revive(self, new_ticket: Callable[[], int], now: float) -> None:
        """A group came or went: pinned adapters that none has resident shall be so again."""
        for adapter in self._registry:
            if not adapter.pinned or adapter.closing or self._wishes.is_wanted(adapter.key):
                continue
            if not self._fleet.entries(adapter.key):
                self._wishes.add_load(Demand((adapter.key,), new_ticket(), now))

    def end(self, make_error: Callable[[], RouterError]) -> None:
        """Refuse everybody who still waits for an adapter."""
        candidates = [adapter for adapter in self._registry if adapter.candidate]
        self._wishes.refuse(make_error)
        for adapter in candidates:
            self._drop_candidate(adapter)

    def _failed(self, adapter: Adapter, group: Group, error: RouterError, now: float) -> None:
        """Remember it, unless only the shard was lost, and tell everybody who waits for this adapter: on this
        group alone, if another one has it or is about to."""
        if isinstance(error, ShardLost):
            self._registry.absent(adapter, group.index, now + LOAD_PAUSE)
            return
        named = type(error)(f"Adapter {adapter.name}: {error.message}", param="model")
        log.warning("adapter %s failed: %s", adapter.name, error.message)
        self._metrics.adapter_failures += 1
        if any(i != group.index and c.state is not AdapterState.ABSENT for i, c in adapter.copies.items()):
            self._registry.failed_here(adapter, group.index, named, now)
            for sequence in group.queues.naming(adapter.key):
                self._turn_away(sequence, group, named)
            if self._give_elsewhere(adapter.key, group):
                return
        else:
            self._registry.failed(adapter, group.index, named, now)
            for sequence in self._fleet.naming(adapter.key):
                self._fail(sequence, copy_of(named))
        self._wishes.not_on_disk(adapter.key, lambda: copy_of(named))
        self._load_ends(adapter.key, named)

    def _load_ends(self, key: str, error: RouterError) -> None:
        """A load by name has failed."""
        self._wishes.not_loaded(key, lambda: copy_of(error))
        adapter = self._registry.get(key)
        if adapter is not None and adapter.candidate:
            self._drop_candidate(adapter)

    def _drop_candidate(self, adapter: Adapter) -> None:
        """A load by name has failed: its name goes on standing for what it stood for."""
        adapter.candidate, adapter.closing = False, True
        self._wishes.add_closing(adapter.key)


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


def copy_of(error: RouterError) -> RouterError:
    """For one caller."""
    return type(error)(error.message, param=error.param, retry_after=error.retry_after)
