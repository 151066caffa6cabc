"""The operator contract: how rows of a batch find their adapters, and what a backend computes.

For token row t with entries (slot s, weight w), at a site whose linears share one input, each entry in
turn and for each part i of s, with y over that part's columns o_i : o_i + out_i:

    y[t] = k_s,i * y[t] + w * (c_s,i + (x[t] A_s,i^T) B_s,i)

where the scale k (DoRA, IA3) is 1 and the shift c (biases) is 0 for plain LoRA. An adapter with a scale
is never summed with another. At the embedding, A is indexed by the token instead of multiplied:

    e[t] = k_s * e[t] + w * A_s[token[t]] B_s

A *site* is a set of base linears that read the same input (q/k/v, gate/up, or a single one); their
outputs lie side by side in y. An adapter need not cover every linear of a site.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Entries = tuple[tuple[int, float], ...]
"""The adapters of one row, as (slot, weight). Empty: the base alone."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The rows that share one entry list. `rows` is a slice where they are adjacent, else int64 indices."""

    entries: Entries
    rows: slice | torch.Tensor
    count: int


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows of one step grouped by identical entry list; rows without entries appear in no group.

    One worker applies a group's entries in order, so two workers never add to the same row.
    """

    groups: tuple[RowGroup, ...]
    slots: tuple[int, ...]
    """Distinct slots named by any group, ascending."""
    decode_rows: int = 0
    """So many of the first rows decode, the others belong to prompts. A backend may serve the two by
    different kernels: the same row always by the same one."""
    rows: int = 0
    """How many there are in all, those without entries included; 0 only where there are no groups."""


@dataclass(frozen=True, slots=True)
class LoraPart:
    """One linear's share of an adapter at a site."""

    rank_offset: int
    """First row of this part in the site's stacked A."""
    out_offset: int
    """First column of this linear's output in y."""
    b: torch.Tensor
    """[rank, out], contiguous, alpha over rank folded in. Rank 0 where only scale or shift apply."""
    scale: torch.Tensor | None = None
    """[out] fp32: multiplies the base's output."""
    shift: torch.Tensor | None = None
    """[out] fp32: added, times the entry's weight."""


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter at one site, at its true rank."""

    a: torch.Tensor
    """[sum of the parts' ranks, in], contiguous."""
    parts: tuple[LoraPart, ...]


SiteTable = MutableMapping[int, LoraWeights]
"""Slot to weights at one site. A slot whose adapter leaves the site alone is absent."""


@dataclass(frozen=True, slots=True)
class EmbeddingLora:
    """One adapter at the embedding, at its true rank."""

    a: torch.Tensor
    """[vocabulary, rank], contiguous: a row for each token id."""
    b: torch.Tensor
    """[rank, hidden], contiguous, alpha over rank folded in."""
    scale: torch.Tensor | None = None
    """[hidden] fp32: multiplies the base's embedding."""


EmbeddingTable = MutableMapping[int, EmbeddingLora]
"""Slot to weights at an embedding."""


class Placed(Protocol):
    """A routing where its backend reads it. Made by `LoraOps.place`, opaque to everybody else."""


class LoraDelta(Protocol):
    """What adapters bring to one site's output in one step; begun, and perhaps still being computed."""

    def add_to(self, y: torch.Tensor) -> None:
        """Apply it to `y` [rows, sum of the site's outputs], the base's output, in place."""
        ...


class LoraOps(Protocol):
    """A backend. One instance serves every site of a model; what it keeps is in the tables it makes."""

    def site_table(self, widths: Sequence[int], *, shares: int = 1) -> SiteTable:
        """An empty table for one site whose linears have these outputs. With `shares`, one slot of an adapter
        stands for that many entries: the keys are slot * shares + share."""
        ...

    def embedding_table(self) -> EmbeddingTable:
        """An empty table for an embedding."""
        ...

    def place(self, routing: Routing, *, shares: int = 1) -> Placed:
        """Put a routing where the operators read it. `shares`: as of the tables it will be used with."""
        ...

    def start_lora(self, x: torch.Tensor, placed: Placed, table: SiteTable) -> LoraDelta:
        """Begin what every row's adapters make of the site's input x [rows, in], any float dtype.

        Accumulates in fp32. A row's result does not depend on the other rows' adapters.
        """
        ...

    def add_embedding(
        self, e: torch.Tensor, tokens: torch.Tensor, placed: Placed, table: EmbeddingTable
    ) -> None:
        """Apply every row's adapters to the embeddings `e` in place.

        Args:
            e: [rows, hidden], the base's embeddings, any float dtype.
            tokens: [rows] int64. A token beyond an adapter's vocabulary gets nothing from its A and B.
            placed: groups of these rows.
            table: the adapters resident at this embedding.
        """
        ...


def route(row_entries: Sequence[Entries], *, decode_rows: int = 0) -> Routing:
    """Group rows by identical entry list, in order of first appearance; the first `decode_rows` decode."""
    members: dict[Entries, list[int]] = {}
    for row, entries in enumerate(row_entries):
        if entries:
            members.setdefault(entries, []).append(row)
    groups = tuple(RowGroup(entries, _compact(rows), len(rows)) for entries, rows in members.items())
    return Routing(groups, tuple(sorted(_distinct_slots(members))), decode_rows, len(row_entries))


def _distinct_slots(entry_lists: Iterable[Entries]) -> set[int]:
    return {slot for entries in entry_lists for slot, _ in entries}


def _compact(rows: list[int]) -> slice | torch.Tensor:
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, dtype=torch.int64)
