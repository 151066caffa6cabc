"""Adapters side by side at a site: one masked product for all of them instead of several for each.

A step multiplies x [rows, in] with the A of every stacked adapter at once, forgets what a row has from
adapters that are not its own, and multiplies the rest with every B:

    y += (mask * (x [A_1 .. A_n]^T)) [B_1 .. B_n]

It does more arithmetic than one adapter after another, and reads each weight once, in the dtype it has.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from .ops import LoraPart, LoraWeights, Routing
from .placement import Latest, identity_of

SLOTS = 4
ROWS = 64
"""From so many adapters on, and up to so many rows, stacked adapters are faster (`bench/lora_cpu.py`)."""
STEPS = 4
"""Adapters are stacked once so many steps in a row have had no others: stacking costs about two steps."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteadyRouting(Routing):
    """A routing among adapters that stay for a while."""

    stacked: tuple[int, ...]
    """Slots, the routing's among them; ascending."""
    member: torch.Tensor
    """bool [rows, stacked]: whose row it is."""


class Steadiness:
    """Tells which slots to stack, step by step."""

    def __init__(self) -> None:
        self._stacked: frozenset[int] = frozenset()
        self._next: frozenset[int] = frozenset()
        self._steps = 0
        """In a row, in which all adapters were among the next ones."""
        self._latest: Latest[SteadyRouting] = Latest()

    def place(self, routing: Routing) -> Routing:
        """Count one step, and answer its routing: the same object while nothing changes."""
        if not _pays(routing) or not self._covers(frozenset(routing.slots)):
            return routing
        groups = identity_of(routing)
        wanted = None if groups is None else (routing.rows, groups, self._stacked)
        return self._latest.of(wanted, lambda: steady(routing, tuple(sorted(self._stacked))))

    def _covers(self, slots: frozenset[int]) -> bool:
        """Whether these are stacked; changes what is."""
        if slots <= self._stacked and len(self._stacked) <= 2 * len(slots):
            return True
        if not slots <= self._next or len(self._next) > 2 * len(slots):
            self._next, self._steps = slots, 0
        self._steps += 1
        if self._steps < STEPS:
            return False
        self._stacked = self._next
        return True


def _pays(routing: Routing) -> bool:
    if not 0 < routing.rows <= ROWS or len(routing.slots) < SLOTS:
        return False
    return all(weight == 1.0 for group in routing.groups for _, weight in group.entries)


def steady(routing: Routing, stacked: tuple[int, ...]) -> SteadyRouting:
    """A routing whose slots are among the stacked ones, which ascend."""
    place = {slot: index for index, slot in enumerate(stacked)}
    member = torch.zeros(routing.rows, len(stacked), dtype=torch.bool)
    for group in routing.groups:
        for slot, _ in group.entries:
            member[group.rows, place[slot]] = True
    return SteadyRouting(
        routing.groups, routing.slots, routing.decode_rows, routing.rows, stacked=stacked, member=member
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """The linears of all stacked adapters that add to the same columns."""

    first: int
    """Of its rows in A."""
    out_offset: int
    b: torch.Tensor
    """[sum of ranks, out]"""


@dataclass(frozen=True, slots=True)
class _Stack:
    """Copies of the adapters at one site."""

    a: torch.Tensor
    """[sum of all parts' ranks, in]"""
    owner: torch.Tensor
    """int64 [rows of A]: the place of a row's adapter among the stacked slots."""
    parts: tuple[_Part, ...]


class StackedTable(UserDict[int, LoraWeights]):
    """A `SiteTable` that keeps a stack of its adapters until one of its slots changes."""

    def __init__(self) -> None:
        super().__init__()
        self._slots: tuple[int, ...] | None = None
        """What is stacked, or was found not to be stackable."""
        self._stack: _Stack | None = None
        self._mask: tuple[SteadyRouting, torch.Tensor] | None = None

    def __setitem__(self, slot: int, weights: LoraWeights) -> None:
        self._forget()
        super().__setitem__(slot, weights)

    def __delitem__(self, slot: int) -> None:
        self._forget()
        super().__delitem__(slot)

    def add_stacked(self, y: torch.Tensor, x: torch.Tensor, placed: SteadyRouting) -> bool:
        """Apply every row's adapters to `y` in place; False, and nothing done, where they cannot be stacked.

        Adds in fp32 and rounds y once; in half precision x A^T is rounded too, as PEFT rounds it.
        """
        if self._slots != placed.stacked:
            self._forget()
            self._slots, self._stack = placed.stacked, _stack(self.data, placed.stacked)
        stack = self._stack
        if stack is None or not stack.a.dtype == x.dtype == y.dtype:
            return False
        hidden = linear(x, stack.a).masked_fill_(self._strangers(stack, placed), 0.0)
        for part in stack.parts:
            rank, width = part.b.shape
            columns = y[:, part.out_offset : part.out_offset + width]
            columns.addmm_(hidden[:, part.first : part.first + rank], part.b)
        return True

    def _strangers(self, stack: _Stack, placed: SteadyRouting) -> torch.Tensor:
        """bool [rows, rows of A]: where the adapter is not the row's."""
        if self._mask is None or self._mask[0] is not placed:
            self._mask = placed, ~placed.member[:, stack.owner]
        return self._mask[1]

    def _forget(self) -> None:
        self._slots = self._stack = self._mask = None


def _stack(table: Mapping[int, LoraWeights], slots: tuple[int, ...]) -> _Stack | None:
    """None where an adapter does more than add a product, or has what is not a number: it would reach all."""
    found = [(place, table[slot]) for place, slot in enumerate(slots) if slot in table]
    if not found or not all(_can_be_stacked(adapter, found[0][1].a.dtype) for _, adapter in found):
        return None
    by_columns: dict[tuple[int, int], list[tuple[int, LoraWeights, LoraPart]]] = {}
    for place, adapter in found:
        for part in adapter.parts:
            by_columns.setdefault((part.out_offset, part.b.shape[1]), []).append((place, adapter, part))
    a, owners, parts, first = [], [], [], 0
    for (out_offset, _), members in by_columns.items():
        b = torch.cat([part.b for _, _, part in members])
        parts.append(_Part(first, out_offset, b))
        first += len(b)
        for place, adapter, part in members:
            a.append(adapter.a[part.rank_offset : part.rank_offset + len(part.b)])
            owners += [place] * len(part.b)
    return _Stack(torch.cat(a), torch.tensor(owners), tuple(parts))


def _can_be_stacked(adapter: LoraWeights, dtype: torch.dtype) -> bool:
    if adapter.a.dtype != dtype or any(
        part.scale is not None or part.shift is not None for part in adapter.parts
    ):
        return False
    return all(
        bool(torch.isfinite(weights).all()) for weights in (adapter.a, *(part.b for part in adapter.parts))
    )
