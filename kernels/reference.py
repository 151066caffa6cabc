"""The operator in float64, one row and one entry at a time: what every backend is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .ops import Entries, SiteTable


def reference_delta(
    x: torch.Tensor, row_entries: Sequence[Entries], table: SiteTable, out_features: int
) -> torch.Tensor:
    """What the adapters add to the site's output, exactly as the contract's formula reads.

    Args:
        x: [rows, in], any float dtype.
        row_entries: the entries of every row, one list per row of x.
        table: the site's adapters; an entry whose slot is absent adds nothing.
        out_features: sum of the site's outputs.

    Returns:
        [rows, out_features], float64.
    """
    if len(row_entries) != x.shape[0]:
        raise ValueError(f"{len(row_entries)} entry lists for {x.shape[0]} rows")
    delta = torch.zeros(x.shape[0], out_features, dtype=torch.float64)
    for row, entries in enumerate(row_entries):
        for slot, weight in entries:
            if slot not in table:
                continue
            adapter = table[slot]
            for part in adapter.parts:
                rank, width = part.b.shape
                a = adapter.a[part.rank_offset : part.rank_offset + rank].double()
                hidden = a @ x[row].double()
                columns = slice(part.out_offset, part.out_offset + width)
                delta[row, columns] += weight * (hidden @ part.b.double())
    return delta
