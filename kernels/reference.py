"""The operators in float64, one row and one entry at a time: what every backend is tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .ops import EmbeddingLora, Entries, LoraWeights


def reference_lora(
    y: torch.Tensor, x: torch.Tensor, row_entries: Sequence[Entries], table: Mapping[int, LoraWeights]
) -> torch.Tensor:
    """What `LoraOps.start_lora(x, …).add_to(y)` makes of `y`, exactly as the contract's formula reads.

    Args:
        y: [rows, out], the base's output, any float dtype; left as it is.
        x: [rows, in], any float dtype.
        row_entries: the entries of every row, one list per row of x.
        table: the site's adapters; an entry whose slot is absent changes nothing.

    Returns:
        [rows, out], float64.
    """
    result = y.double()
    for row, slot, weight in _applied(row_entries, len(y), table):
        adapter = table[slot]
        for part in adapter.parts:
            rank, width = part.b.shape
            columns = slice(part.out_offset, part.out_offset + width)
            a = adapter.a[part.rank_offset : part.rank_offset + rank].double()
            added = (a @ x[row].double()) @ part.b.double()
            if part.shift is not None:
                added = part.shift.double() + added
            if part.scale is not None:
                result[row, columns] *= part.scale.double()
            result[row, columns] += weight * added
    return result


def reference_embedding(
    e: torch.Tensor, tokens: torch.Tensor, row_entries: Sequence[Entries], table: Mapping[int, EmbeddingLora]
) -> torch.Tensor:
    """What `LoraOps.add_embedding` makes of `e`; arguments and result as there and in `reference_lora`."""
    result = e.double()
    for row, slot, weight in _applied(row_entries, len(e), table):
        adapter = table[slot]
        token = int(tokens[row])
        if adapter.scale is not None:
            result[row] *= adapter.scale.double()
        if token < len(adapter.a):
            result[row] += weight * (adapter.a[token].double() @ adapter.b.double())
    return result


def _applied(
    row_entries: Sequence[Entries], rows: int, table: Mapping[int, LoraWeights] | Mapping[int, EmbeddingLora]
) -> list[tuple[int, int, float]]:
    """(row, slot, weight) of every entry that changes something, in order."""
    if len(row_entries) != rows:
        raise ValueError(f"{len(row_entries)} entry lists for {rows} rows")
    return [
        (row, slot, weight)
        for row, entries in enumerate(row_entries)
        for slot, weight in entries
        if slot in table
    ]
