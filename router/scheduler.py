"""What the next step does: a pure function over the router's state. No I/O, no clock, no mutation.

A step decodes every running sequence, goes on with unfinished prompts, admits waiting sequences, and
says which adapters to fetch, load, evict or drain. Its rules:

- Blocks: a decode row that needs one gets one; when they run out the youngest sequences are preempted.
- Tokens: decode rows cost one each, the rest of the step's budget is the prompts', oldest first. Rows
  are limited so that a quarter of the budget is always left for prompts.
- Admission: by age over all queues. A sequence whose adapters are not resident is passed over; one for
  which blocks are short stops admission, so that it is not starved by smaller ones.
- Adapters: room goes to the oldest that waits. It may evict what is idle, unpinned and not wanted by an
  older one; after `patience` seconds a resident adapter is drained for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from .blocks import BlockPool
from .client import AdapterState
from .errors import AdapterRejected, Overloaded, RouterError
from .queues import Queues
from .residency import Place, Residency
from .sequence import Sequence
from .versions import Adapter


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step and one group may hold."""

    step_tokens: int
    rows: int
    patience: float
    """Seconds that a sequence waits for room for its adapter before another one is drained."""

    @classmethod
    def within(cls, *, step_tokens: int, rows: int, patience: float) -> Limits:
        """Fewer rows where a full step of decode rows would leave prompts less than a quarter."""
        return cls(step_tokens, max(1, min(rows, step_tokens - step_tokens // 4)), patience)


@dataclass(frozen=True, slots=True)
class Demand:
    """Somebody wants these adapters resident: the oldest sequence of a queue, or a load by name."""

    keys: tuple[str, ...]
    ticket: int
    since: float


@dataclass(frozen=True, slots=True)
class State:
    """A view of one group and of what the engine owns. The scheduler reads it and changes nothing."""

    limits: Limits
    queues: Queues
    running: list[Sequence]
    """In order of admission."""
    pool: BlockPool
    residency: Residency
    adapter: Callable[[str], Adapter | None]
    wishes: Iterable[Demand] = ()
    """Loads by name, which have no sequence."""
    wanted_on_disk: Collection[str] = ()
    """Keys that calls wait to have on disk, before they have a sequence."""
    group: int = 0
    """Index of the group, for the adapters' copies."""
    pinned: Callable[[Adapter], bool] = attrgetter("pinned")
    """It must not leave this group."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens start .. start + length - 1 of a sequence; after the last chunk a token is sampled."""

    sequence: Sequence
    start: int
    length: int
    last: bool


@dataclass(slots=True)
class AdapterWork:
    """Keys to fetch to disk, to load, to evict, and not to admit to; demands that can never be met."""

    fetches: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    evictions: list[str] = field(default_factory=list)
    draining: list[str] = field(default_factory=list)
    rejects: list[tuple[Demand, RouterError]] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """One step, and the adapter work that goes with it. Nobody changes it once made."""

    preempt: list[Sequence] = field(default_factory=list)
    """Youngest first."""
    decode: list[Sequence] = field(default_factory=list)
    grow: list[Sequence] = field(default_factory=list)
    """Decode rows that get one more block."""
    admit: list[Sequence] = field(default_factory=list)
    """Each has a chunk, and gets blocks for its prompt and the first token after it."""
    chunks: list[Chunk] = field(default_factory=list)
    adapters: AdapterWork = field(default_factory=AdapterWork)

    @property
    def has_work(self) -> bool:
        """The step runs a forward pass."""
        return bool(self.decode or self.chunks)


def plan(state: State, now: float) -> Plan:
    """The next step. `now`: seconds on the same clock as the sequences' arrival."""
    result = Plan(adapters=plan_adapters(state, now))
    prompts, free = _decode(state, result)
    budget = _go_on_with_prompts(prompts, state.limits.step_tokens - len(result.decode), result)
    if len(state.queues) and not result.preempt:
        _admit(state, free, budget, result)
    return result


def plan_adapters(state: State, now: float) -> AdapterWork:
    """The adapter work alone, for a moment when no further step can be sent."""
    demands = [Demand(s.keys, s.ticket, s.queued_at) for s in state.queues.heads() if s.keys]
    demands += state.wishes
    if not state.wanted_on_disk and all(state.residency.ready(demand.keys) for demand in demands):
        return AdapterWork()
    return _AdapterPlanner(state, now).work(demands)


def admission_tokens(sequence: Sequence) -> int:
    """Tokens that need blocks at admission: the prompt and one more, if one follows."""
    return min(sequence.target + 1, sequence.last_position)


def may_admit(need: int, free: int, running: int) -> bool:
    """Of so many free blocks a sequence may take what it needs: some are left for those that run to grow."""
    return free - need >= running // 4


def _decode(state: State, result: Plan) -> tuple[list[Sequence], int]:
    """Fill decode, grow and preempt; answers the running sequences with prompt left, and free blocks."""
    decode, grow = result.decode, result.grow
    prompts: list[Sequence] = []
    for sequence in state.running:
        if sequence.computed < sequence.target:
            prompts.append(sequence)
            continue
        decode.append(sequence)
        if sequence.computed == sequence.capacity:
            grow.append(sequence)
    free = state.pool.free_count
    for victim in reversed(state.running):
        if len(grow) <= free:
            break
        result.preempt.append(victim)
        free += len(victim.blocks)
        for members in (decode, grow, prompts):
            if members and members[-1] is victim:
                members.pop()
    return prompts, free - len(grow)


def _go_on_with_prompts(prompts: list[Sequence], budget: int, result: Plan) -> int:
    for sequence in prompts:
        if budget <= 0:
            break
        budget -= _add_chunk(sequence, budget, result)
    return budget


def _add_chunk(sequence: Sequence, budget: int, result: Plan) -> int:
    left = sequence.target - sequence.computed
    length = min(left, budget)
    result.chunks.append(Chunk(sequence, sequence.computed, length, length == left))
    return length


def _admit(state: State, free: int, budget: int, result: Plan) -> None:
    rows = state.limits.rows - len(state.running)
    if rows <= 0 or budget <= 0:
        return
    barred = {*result.adapters.draining, *result.adapters.evictions}

    def ready(keys: tuple[str, ...]) -> bool:
        return state.residency.ready(keys) and barred.isdisjoint(keys)

    running = len(state.running)
    for sequence in state.queues.by_age(ready):
        if rows == 0 or budget <= 0:
            break
        need = state.pool.blocks_for(admission_tokens(sequence))
        if not may_admit(need, free, running):
            break
        result.admit.append(sequence)
        budget -= _add_chunk(sequence, budget, result)
        free -= need
        rows -= 1
        running += 1


class _AdapterPlanner:
    """Hands out slots and bytes to demands, oldest first. Lives for one call of `plan_adapters`."""

    def __init__(self, state: State, now: float) -> None:
        self._residency = state.residency
        self._running = state.running
        self._adapter = state.adapter
        self._group = state.group
        self._pinned = state.pinned
        self._wanted_on_disk = state.wanted_on_disk
        self._patience = state.limits.patience
        self._now = now
        self._result = AdapterWork()
        self._slots, self._bytes = state.residency.free_slots, state.residency.free_bytes
        self._coming_slots = self._coming_bytes = 0
        """Room of adapters that are being unloaded, not promised to anybody yet."""
        self._protected: set[str] = set()

    def work(self, demands: list[Demand]) -> AdapterWork:
        for entry in self._residency.entries():
            if entry.place is Place.UNLOADING:
                self._coming_slots += 1
                self._coming_bytes += entry.bytes
        for demand in sorted(demands, key=lambda demand: demand.ticket):
            if not self._residency.ready(demand.keys):
                self._serve(demand)
            self._protected.update(demand.keys)
        for key in self._wanted_on_disk:
            if adapter := self._adapter(key):
                self._fetch(adapter)
        return self._result

    def _serve(self, demand: Demand) -> None:
        missing = self._missing(demand)
        if not missing:
            return
        error = self._impossible(demand)
        if error is not None:
            self._result.rejects.append((demand, error))
            return
        slots, size = len(missing), sum(self._size(adapter) for adapter in missing)
        if slots <= self._slots and size <= self._bytes:
            self._result.loads += [adapter.key for adapter in missing]
            self._slots -= slots
            self._bytes -= size
        elif self._evict_for(demand, slots, size):
            self._promise(slots, size)
        elif (
            self._now - max(demand.since, *(a.copy(self._group).fetched_at for a in missing)) > self._patience
        ):
            self._drain_for(demand, slots, size)

    def _missing(self, demand: Demand) -> list[Adapter]:
        """Adapters to load for this demand; none while one of them is not on disk or is being moved."""
        missing: list[Adapter] = []
        waiting = False
        for key in demand.keys:
            adapter, entry = self._adapter(key), self._residency.get(key)
            if adapter is None or entry is not None:
                waiting |= entry is not None and entry.place is not Place.RESIDENT
            elif self._may_load(adapter):
                missing.append(adapter)
            else:
                waiting = True
                if (refusal := adapter.refusal(self._group, self._now)) is not None:
                    self._result.rejects.append((demand, refusal))
                self._fetch(adapter)
        return [] if waiting else [a for a in missing if a.key not in self._result.loads]

    def _may_load(self, adapter: Adapter) -> bool:
        copy = adapter.copy(self._group)
        return copy.on_disk and copy.retry_at <= self._now

    def _fetch(self, adapter: Adapter) -> None:
        """Have it fetched, unless that is under way or its last failure is too fresh."""
        copy = adapter.copy(self._group)
        if (
            copy.state is AdapterState.ABSENT
            and max(copy.retry_at, adapter.retry_at) <= self._now
            and adapter.key not in self._result.fetches
        ):
            self._result.fetches.append(adapter.key)

    def _size(self, adapter: Adapter) -> int:
        return adapter.copy(self._group).bytes

    def _impossible(self, demand: Demand) -> RouterError | None:
        """Why this demand can never be met: larger than the pool, or pinned adapters leave no room."""
        wanted = [adapter for key in demand.keys if (adapter := self._adapter(key))]
        size = sum(self._size(adapter) for adapter in wanted)
        names = ", ".join(adapter.name for adapter in wanted)
        pool = self._residency
        if len(wanted) > pool.slots or size > pool.budget:
            return AdapterRejected(
                f"{names} needs {size} bytes and {len(wanted)} slots of the device; "
                f"the server has {pool.budget} bytes and {pool.slots} slots for adapters."
            )
        pinned = [
            entry
            for entry in pool.entries()
            if entry.key not in demand.keys
            and (adapter := self._adapter(entry.key))
            and self._pinned(adapter)
        ]
        slots_left = pool.slots - len(pinned)
        bytes_left = pool.budget - sum(entry.bytes for entry in pinned)
        if len(wanted) > slots_left or size > bytes_left:
            return Overloaded(f"Pinned adapters leave no room for {names}; unpin one.", retry_after=60.0)
        return None

    def _evict_for(self, demand: Demand, slots: int, size: int) -> bool:
        """Choose idle adapters to evict, least recently used first, until the demand fits. All or nothing."""
        have_slots, have_bytes = self._slots + self._coming_slots, self._bytes + self._coming_bytes
        victims: list[str] = []
        idle = [e for e in self._residency.entries() if e.references == 0 and self._movable(e.key, demand)]
        for entry in sorted(idle, key=lambda entry: entry.last_used):
            if slots <= have_slots and size <= have_bytes:
                break
            victims.append(entry.key)
            have_slots += 1
            have_bytes += entry.bytes
        if slots > have_slots or size > have_bytes:
            return False
        self._evict(victims)
        return True

    def _drain_for(self, demand: Demand, slots: int, size: int) -> None:
        """Keep all room for this demand, and let adapters with least work left run out for it."""
        pool = self._residency
        movable = [e for e in pool.entries() if self._movable(e.key, demand)]
        self._evict([e.key for e in movable if e.references == 0])
        slots -= self._slots + self._coming_slots
        size -= self._bytes + self._coming_bytes
        self._slots = self._bytes = self._coming_slots = self._coming_bytes = 0
        work = {
            e.key: sum(s.remaining for s in self._running if e.key in s.keys) for e in movable if e.references
        }
        for key in sorted(work, key=lambda key: work[key]):
            if slots <= 0 and size <= 0:
                break
            entry = pool.get(key)
            assert entry is not None
            self._result.draining.append(key)
            slots -= 1
            size -= entry.bytes

    def _movable(self, key: str, demand: Demand) -> bool:
        adapter, entry = self._adapter(key), self._residency.get(key)
        return (
            entry is not None
            and entry.place is Place.RESIDENT
            and not (adapter and self._pinned(adapter))
            and key not in demand.keys
            and key not in self._protected
            and key not in self._result.evictions
            and key not in self._result.draining
        )

    def _evict(self, keys: list[str]) -> None:
        for key in keys:
            entry = self._residency.get(key)
            assert entry is not None
            self._result.evictions.append(key)
            self._coming_slots += 1
            self._coming_bytes += entry.bytes

    def _promise(self, slots: int, size: int) -> None:
        """Set room aside that is free now or comes from evictions."""
        now_slots, now_bytes = min(slots, self._slots), min(size, self._bytes)
        self._slots -= now_slots
        self._bytes -= now_bytes
        self._coming_slots -= slots - now_slots
        self._coming_bytes -= size - now_bytes
