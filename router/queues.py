"""Requests that wait: one FIFO per adapter set, all of them bounded together."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

from .errors import Overloaded, TooManyRequests
from .sequence import Sequence

AdapterSet = tuple[str, ...]
"""Distinct adapter keys, sorted. Empty: the base alone."""

RETRY_AFTER = 1.0
"""Seconds after which a refused request should try again."""


class Claimant(Protocol):
    """What waits and counts against the bounds: a sequence, or a call whose adapters are being fetched."""

    @property
    def keys(self) -> AdapterSet: ...

    @property
    def tenant(self) -> str: ...

    @property
    def prompt_length(self) -> int: ...

    counted: bool


@dataclass(slots=True)
class _Share:
    requests: int = 0
    tokens: int = 0

    def fits(self, tokens: int, max_requests: int, max_tokens: int) -> bool:
        """A first request always fits, however long its prompt."""
        if self.requests == 0:
            return True
        return self.requests < max_requests and self.tokens + tokens <= max_tokens


@dataclass(slots=True)
class QueueBounds:
    """How many requests and prompt tokens may wait, in all and for one adapter set or tenant.

    One adapter set, and one named tenant, may use half of the whole. A sequence that was preempted or
    lost its shard waits without being counted: it was accepted before.
    """

    max_requests: int
    max_tokens: int
    _whole: _Share = field(default_factory=_Share)
    _shares: dict[tuple[str, object], _Share] = field(default_factory=dict)

    def take(self, claimant: Claimant) -> None:
        """Count a new one.

        Raises:
            Overloaded: everything is full.
            TooManyRequests: the share of this adapter or tenant is used up.
        """
        tokens = claimant.prompt_length
        if not self._whole.fits(tokens, self.max_requests, self.max_tokens):
            raise Overloaded("The server's queue is full; try again shortly.", retry_after=RETRY_AFTER)
        names = self._names(claimant)
        half = max(1, self.max_requests // 2), max(1, self.max_tokens // 2)
        for name in names:
            if not self._shares.get(name, _Share()).fits(tokens, *half):
                raise TooManyRequests(
                    f"Too many requests of this {name[0]} are waiting; try again shortly.",
                    retry_after=RETRY_AFTER,
                )
        for share in (self._whole, *(self._shares.setdefault(name, _Share()) for name in names)):
            share.requests += 1
            share.tokens += tokens
        claimant.counted = True

    def give_back(self, claimant: Claimant) -> None:
        """Stop counting one that waits no longer. Does nothing for one that is not counted."""
        if not claimant.counted:
            return
        claimant.counted = False
        names = self._names(claimant)
        for share in (self._whole, *(self._shares[name] for name in names)):
            share.requests -= 1
            share.tokens -= claimant.prompt_length
        for name in names:
            if self._shares[name].requests == 0:
                del self._shares[name]

    @staticmethod
    def _names(claimant: Claimant) -> list[tuple[str, object]]:
        names: list[tuple[str, object]] = [("adapter", claimant.keys)]
        if claimant.tenant:
            names.append(("tenant", claimant.tenant))
        return names


class Queues:
    """FIFO per adapter set, ordered by ticket; empty queues do not exist."""

    def __init__(self) -> None:
        self._queues: dict[AdapterSet, OrderedDict[int, Sequence]] = {}
        self._naming: Counter[str] = Counter()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.ticket in self._queues.get(sequence.keys, ())

    def add(self, sequence: Sequence) -> None:
        """Append a new sequence, which is younger than all others."""
        self._queues.setdefault(sequence.keys, OrderedDict())[sequence.ticket] = sequence
        self._naming.update(sequence.keys)
        self._count += 1

    def put_back(self, sequence: Sequence) -> None:
        """Give a sequence that ran or waited already its place by age."""
        queue = self._queues.get(sequence.keys, OrderedDict())
        if not queue or next(reversed(queue)) < sequence.ticket:
            self.add(sequence)
            return
        older = list(takewhile(lambda other: other.ticket < sequence.ticket, queue.values()))
        self.add(sequence)
        for front in (sequence, *reversed(older)):
            queue.move_to_end(front.ticket, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands. KeyError if it does not wait."""
        queue = self._queues[sequence.keys]
        del queue[sequence.ticket]
        if not queue:
            del self._queues[sequence.keys]
        self._naming.subtract(sequence.keys)
        for key in sequence.keys:
            if self._naming[key] == 0:
                del self._naming[key]
        self._count -= 1

    def waiting(self, key: str) -> int:
        """Sequences that wait and name this adapter."""
        return self._naming.get(key, 0)

    def naming(self, key: str) -> list[Sequence]:
        """Sequences that wait and name this adapter, oldest first within each queue."""
        return [s for keys, queue in self._queues.items() if key in keys for s in queue.values()]

    def heads(self) -> list[Sequence]:
        """The oldest sequence of every queue, in no particular order."""
        return [next(iter(queue.values())) for queue in self._queues.values()]

    def by_age(self, ready: Callable[[AdapterSet], bool]) -> Iterator[Sequence]:
        """Sequences of the queues that `ready` lets pass, oldest first over all of them."""
        chosen = [queue.values() for keys, queue in self._queues.items() if ready(keys)]
        return heapq.merge(*chosen, key=lambda sequence: sequence.ticket)

    def all(self) -> list[Sequence]:
        """Every sequence that waits, oldest first."""
        return list(self.by_age(lambda _: True))
