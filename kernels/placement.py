"""Launch planning: how rows become tasks, inputs become splits, and work becomes grids. No device.

A task is one entry of a chunk of rows that share their entry list (`Task` in lora_tables.cuh). Rows that
decode and rows of prompts are cut into chunks of their own, each served by kernels of their own, so that the
same row is always computed in the same order, whatever shares its batch with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from .ops import Entries, Routing, RowGroup


@dataclass(frozen=True, slots=True)
class Chunks:
    """How rows are cut into tasks."""

    rows: int
    """Of a task, at most."""
    splits: int
    """Partial sums that a product with A consists of, at most."""


@dataclass(frozen=True, slots=True)
class Family(Chunks):
    """The kernels that serve rows of one kind."""

    shrink_rows: int
    """That a block of the shrink takes at once."""
    expand_rows: int
    """That a warp of the expand takes at once."""
    expand_blocks: int
    """That a processor holds at once."""


DECODE = Family(rows=8, splits=4, shrink_rows=8, expand_rows=8, expand_blocks=5)
PROMPT = Family(rows=64, splits=2, shrink_rows=32, expand_rows=16, expand_blocks=3)
HEADER_BYTES = 16
"""Before the tasks: how many there are, and how many stretches of A the largest of their adapters has."""
STRETCH = 16
"""Rows of A that a block of the shrink takes at once."""
SPLIT = 2048
"""Inputs that are not worth splitting any more."""
DEPTH = 32
"""Inputs that a warp takes in one step."""
SHRINK_WARPS, WARPS = 16, 4
"""In a block of the shrink, and of the others."""
STRIP = 64
"""Columns of y that a warp takes at once."""
GATE_BLOCKS = 3
"""That a processor holds at once."""
SHRINK_BLOCKS = 2
"""For each processor."""
MANY_STRETCHES = 16
"""Of one task, that there are blocks for."""

Made = TypeVar("Made")

_NOTHING: Entries = ((-1, 0.0),)
"""What rows without entries are said to name."""

TaskArray = np.ndarray[Any, np.dtype[np.void]]
RowIds = np.ndarray[Any, np.dtype[np.int32]]


def task_dtype(rows: int) -> np.dtype[np.void]:
    """`Task` for chunks of at most `rows` rows."""
    return np.dtype(
        [
            ("slot", "i4"),
            ("weight", "f4"),
            ("hidden", "i4"),
            ("count", "i4"),
            ("length", "i4"),
            ("unused", "i4", 3),
            ("row", "i4", rows),
        ]
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """The tasks of one routing. Rows without entries have tasks too, without a slot: for kernels that do
    a step's next work at once for all of its rows."""

    decode: TaskArray
    prompt: TaskArray
    hidden_values: int
    """Room for every task's x A^T, at the site with the highest ranks and the most splits."""
    stretches: int
    """Of STRETCH rows, that the A of any of these slots has at any one site."""


def plan_tasks(
    routing: Routing, stacked_rank: Callable[[int], int], decode: Chunks = DECODE, prompt: Chunks = PROMPT
) -> Plan:
    """Cut a routing into tasks.

    Args:
        routing: groups of rows; the first `decode_rows` of all rows decode.
        stacked_rank: for a slot, the most rows that its A has at any one site.
    """
    rows, ends = _rows_by_list(routing)
    decoding = np.concatenate([[0], np.cumsum(rows < routing.decode_rows)])
    begins = np.concatenate([[0], ends[:-1]])
    cuts = begins + decoding[ends] - decoding[begins]
    lists = [*(group.entries for group in routing.groups), ()]
    spans = list(zip(lists, begins.tolist(), cuts.tolist(), ends.tolist(), strict=True))
    decoding_spans = [_Span(entries, begin, cut) for entries, begin, cut, _ in spans]
    prompt_spans = [_Span(entries, cut, end) for entries, _, cut, end in spans]
    first, used = _tasks(rows, decoding_spans, decode, stacked_rank, 0)
    second, used = _tasks(rows, prompt_spans, prompt, stacked_rank, used)
    return Plan(first, second, used, -(-max(map(stacked_rank, routing.slots), default=0) // STRETCH))


def identity_of(routing: Routing) -> list[tuple[Entries, int, int]] | None:
    """Equal for routings of equal groups; None where rows of a group are scattered."""
    groups = []
    for group in routing.groups:
        if not isinstance(group.rows, slice):
            return None
        groups.append((group.entries, group.rows.start, group.rows.stop))
    return groups


class Latest(Generic[Made]):
    """Keeps what was made last, for as long as it would be made alike: from one decode step to the next while
    no sequence begins or ends."""

    def __init__(self) -> None:
        self._kept: tuple[object, Made] | None = None

    def of(self, made_from: object | None, make: Callable[[], Made]) -> Made:
        """What `make` gives, or gave. `made_from`: None where that cannot be compared."""
        if made_from is not None and self._kept is not None and self._kept[0] == made_from:
            return self._kept[1]
        made = make()
        self._kept = None if made_from is None else (made_from, made)
        return made


class _Span(NamedTuple):
    """Rows begin .. end - 1 of all lists' rows, which share these entries."""

    entries: Entries
    begin: int
    end: int


def _rows_by_list(routing: Routing) -> tuple[RowIds, np.ndarray[Any, np.dtype[np.int64]]]:
    """The rows of one group after another, ascending, at last those of no group; and where each ends."""
    groups = [_row_ids(group) for group in routing.groups]
    bare = np.ones(routing.rows, dtype=np.bool_)
    if groups:
        bare[np.concatenate(groups)] = False
    groups.append(np.flatnonzero(bare).astype(np.int32))
    return np.concatenate(groups), np.cumsum([len(rows) for rows in groups])


def _row_ids(group: RowGroup) -> RowIds:
    if isinstance(group.rows, slice):
        return np.arange(group.rows.start, group.rows.stop, dtype=np.int32)
    return group.rows.numpy(force=True).astype(np.int32)


def _tasks(
    rows: RowIds,
    spans: Iterable[_Span],
    chunks: Chunks,
    stacked_rank: Callable[[int], int],
    hidden: int,
) -> tuple[TaskArray, int]:
    """The tasks of these spans of `rows`, whose hidden values begin at `hidden`; and where they end."""
    chunk_rows = chunks.rows
    fields: list[tuple[int, float, int, int, int]] = []
    firsts: list[int] = []
    for entries, begin, end in spans:
        for first in range(begin, end, chunk_rows):
            count = min(chunk_rows, end - first)
            for index, (slot, weight) in enumerate(entries or _NOTHING):
                fields.append((slot, weight, hidden, count, 0 if index else len(entries)))
                firsts.append(first)
                if slot >= 0:
                    hidden += chunks.splits * count * -(-stacked_rank(slot) // 8) * 8
    tasks = np.zeros(len(fields), task_dtype(chunk_rows))
    if fields:
        for name, column in zip(
            ("slot", "weight", "hidden", "count", "length"), zip(*fields, strict=True), strict=True
        ):
            tasks[name] = column
        lanes = np.arange(chunk_rows)
        at = np.minimum(np.array(firsts)[:, None] + lanes, len(rows) - 1)
        tasks["row"] = np.where(lanes < tasks["count"][:, None], rows[at], 0)
    return tasks, hidden


def write_tasks(target: np.ndarray[Any, np.dtype[np.uint8]], tasks: TaskArray, stretches: int) -> None:
    """Lay `tasks` out as `Tasks` in lora_tables.cuh."""
    target[:8].view(np.int32)[:] = len(tasks), stretches
    target[HEADER_BYTES : HEADER_BYTES + tasks.nbytes] = tasks.view(np.uint8)


@dataclass(frozen=True, slots=True)
class Splits:
    """How the inputs of a site are split: a warp has `slice` of them, a block its warps' slices."""

    count: int
    slice: int

    @classmethod
    def of(cls, in_features: int, family: Family) -> Splits:
        """Follows from the shape alone, so that sums have one order."""
        count = max(1, min(family.splits, -(-in_features // SPLIT)))
        return cls(count, -(-in_features // (count * SHRINK_WARPS * DEPTH)) * DEPTH)


def shrink_grid(tasks: int, family: Family, splits: int, processors: int) -> tuple[int, int, int]:
    """Of persistent blocks."""
    items = tasks * (family.rows // family.shrink_rows) * MANY_STRETCHES
    return max(1, min(items, -(-SHRINK_BLOCKS * processors // splits))), splits, 1


def expand_grid(tasks: int, family: Family, columns: int, blocks: int) -> tuple[int, int, int]:
    """Of persistent blocks, at most as many as the device holds at once."""
    units = tasks * -(-columns // STRIP) * (family.rows // family.expand_rows)
    return max(1, min(-(-units // WARPS), blocks)), 1, 1


def plain_grid(tasks: int, chunk_rows: int, processors: int) -> tuple[int, int, int]:
    """Of the kernels without tensor cores: a block for each row, eight a processor."""
    return max(1, min(tasks * chunk_rows, 8 * processors)), 1, 1
