"""The shard groups that serve, and what waits while there is none. Part of the loop."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from .adapters import AdapterRegistry
from .client import AdapterState
from .group import Group
from .placement import GroupView, choose
from .queues import AdapterSet, Queues
from .residency import Place, Resident
from .scheduler import admission_tokens, may_admit
from .sequence import Sequence


class Fleet:
    """Groups by epoch, in order of their index. A sequence waits in the queues of its group; `lobby` holds
    those that have none, since no group is there."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self.lobby = Queues()
        self._registry = registry
        self._groups: dict[int, Group] = {}

    def __iter__(self) -> Iterator[Group]:
        return iter(tuple(self._groups.values()))

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def accepting(self) -> list[Group]:
        """Groups that may be given work."""
        return [group for group in self._groups.values() if not group.draining]

    def of(self, epoch: int) -> Group | None:
        """The group of this epoch; None if the epoch is over."""
        return self._groups.get(epoch)

    def add(self, group: Group) -> None:
        groups = sorted((*self._groups.values(), group), key=lambda group: group.index)
        self._groups = {group.epoch: group for group in groups}

    def remove(self, group: Group) -> None:
        del self._groups[group.epoch]

    # What waits.

    @property
    def waiting_count(self) -> int:
        return sum(len(queues) for queues in self._queues())

    def waiting(self, key: str) -> int:
        """Sequences that wait and name this adapter."""
        return sum(queues.waiting(key) for queues in self._queues())

    def naming(self, key: str) -> list[Sequence]:
        """Sequences that wait and name this adapter."""
        return [sequence for queues in self._queues() for sequence in queues.naming(key)]

    def waiting_sequences(self) -> list[Sequence]:
        """All that wait, oldest first."""
        waiting = [sequence for queues in self._queues() for sequence in queues.all()]
        return sorted(waiting, key=lambda sequence: sequence.ticket)

    def waits(self, sequence: Sequence) -> bool:
        return sequence in self._queues_of(sequence)

    def queue(self, sequence: Sequence, group: Group | None) -> None:
        """Let it wait for this group, in its place by age; None: for any to come."""
        sequence.epoch = group.epoch if group else 0
        if group is not None:
            group.load.add(sequence)
        self._queues_of(sequence).put_back(sequence)

    def unqueue(self, sequence: Sequence) -> None:
        """Take a waiting sequence out; it belongs to no group then."""
        self._queues_of(sequence).remove(sequence)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """It is over, or leaves its group for another."""
        group = self._groups.get(sequence.epoch)
        if group is not None:
            group.load.remove(sequence)
        sequence.epoch = 0

    def _queues_of(self, sequence: Sequence) -> Queues:
        group = self._groups.get(sequence.epoch)
        return self.lobby if group is None else group.queues

    def _queues(self) -> Iterator[Queues]:
        yield self.lobby
        for group in self._groups.values():
            yield group.queues

    # Adapters.

    def entries(self, key: str) -> list[Resident]:
        """An adapter's slots, one for each group that has it or is about to."""
        found = (group.residency.get(key) for group in self._groups.values())
        return [entry for entry in found if entry is not None]

    def is_resident(self, keys: AdapterSet) -> bool:
        """Some group has all of them."""
        return any(group.residency.ready(keys) for group in self._groups.values())

    def has_other_copy(self, key: str, group: Group) -> bool:
        """Some other group has it resident."""
        return any(other is not group and other.residency.ready((key,)) for other in self._groups.values())

    # Placement.

    def place(self, keys: AdapterSet, tokens: int, *, among: list[Group]) -> Group | None:
        """The group that serves these adapters best; None if there is none to choose from."""
        if not among:
            return None
        return among[choose([self._view(group) for group in among], keys, tokens, self._rank)]

    def takeovers(self, group: Group) -> list[Sequence]:
        """What waits elsewhere and cannot start there, but could start on this group now, oldest first: its
        adapters are resident here, and there are rows and blocks for it."""
        others = [other for other in self._groups.values() if other is not group and other.queues]
        rows, free, running = len(group.free_rows), group.pool.free_count, len(group.running)
        chosen: list[Sequence] = []
        for sequence in merge(*(o.queues.by_age(group.residency.ready) for o in others), key=_ticket):
            if self._may_start(sequence) or group.epoch in sequence.refused_by or not group.holds(sequence):
                continue
            need = group.pool.blocks_for(admission_tokens(sequence))
            if rows == 0 or not may_admit(need, free, running):
                break
            chosen.append(sequence)
            rows, free, running = rows - 1, free - need, running + 1
        return chosen

    def _may_start(self, sequence: Sequence) -> bool:
        """The next steps of its own group may admit it."""
        group = self._groups[sequence.epoch]
        need = group.pool.blocks_for(admission_tokens(sequence))
        roomy = bool(group.free_rows) and may_admit(need, group.pool.free_count, len(group.running))
        return roomy and group.residency.ready(sequence.keys)

    def _view(self, group: Group) -> GroupView:
        return GroupView(group.load.tokens, group.load.by_adapter, lambda key: self._state(key, group))

    def _state(self, key: str, group: Group) -> AdapterState:
        entry, adapter = group.residency.get(key), self._registry.get(key)
        if entry is not None and entry.place is not Place.UNLOADING:
            return AdapterState.RESIDENT if entry.place is Place.RESIDENT else AdapterState.LOADING
        return adapter.copy(group.index).state if adapter else AdapterState.ABSENT

    def _rank(self, key: str) -> int:
        adapter = self._registry.get(key)
        return adapter.manifest.max_rank if adapter and adapter.manifest else 0


def _ticket(sequence: Sequence) -> int:
    return sequence.ticket
