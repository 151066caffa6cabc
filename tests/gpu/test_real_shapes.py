"""The operators at the shapes of an 8B model, where blocks and splits are as many as they get."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from loraplex.kernels.ops import Entries, LoraWeights, route
from loraplex.kernels.reference import reference_lora

from ..kernels.conftest import MakeAdapter
from ..kernels.target import Target

SITES = {
    "q/k/v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate/up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
RANKS = (16, 8, 64, 3)
FACTOR = 1.5
"""How many times as far from the exact result a row may be as torch's products in the same dtype are."""
REPEATS = 10


def torch_lora(
    y: torch.Tensor, x: torch.Tensor, row_entries: Sequence[Entries], table: dict[int, LoraWeights]
) -> torch.Tensor:
    """The operator by torch, each product rounded to its dtype."""
    result = y.clone()
    for row, entries in enumerate(row_entries):
        for slot, weight in entries:
            for part in table[slot].parts:
                rank, width = part.b.shape
                hidden = x[row] @ table[slot].a[part.rank_offset : part.rank_offset + rank].T
                result[row, part.out_offset : part.out_offset + width] += weight * (hidden @ part.b)
    return result


def row_errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative L2 distance of each row."""
    return (got.double() - want).norm(dim=1) / want.norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prompt"])
@pytest.mark.parametrize("site", SITES)
def test_rows_are_as_near_to_exact_as_torch_and_always_the_same(
    site: str, decode: bool, dtype: torch.dtype, make_adapter: MakeAdapter, target: Target
) -> None:
    features, widths = SITES[site]
    made = {
        slot: make_adapter([rank] * len(widths), features, widths, dtype) for slot, rank in enumerate(RANKS)
    }
    table = target.adapters(made)
    entries: list[Entries] = [((row % 5, 1.0),) if row % 5 < len(RANKS) else () for row in range(33)]
    entries += [((0, 1.0),)] * 70 + [((2, 0.5), (1, -1.0))]
    with target.device:
        y, x = torch.randn(len(entries), sum(widths)).to(dtype), torch.randn(len(entries), features).to(dtype)
    ops = target.ops()
    resident = ops.site_table(widths)
    resident.update(table)
    placed = ops.place(route(entries, decode_rows=len(entries) if decode else 0))
    results = []
    for _ in range(REPEATS):
        placed.hidden.fill_(torch.nan)
        got = y.clone()
        ops.start_lora(x, placed, resident).add_to(got)
        results.append(got)
    assert all(torch.equal(result, results[0]) for result in results)
    want = reference_lora(y, x, entries, table)
    errors = row_errors(results[0], want)
    if dtype == torch.float32:
        assert errors.max() < 1e-5
    else:
        assert (errors <= FACTOR * row_errors(torch_lora(y, x, entries, table), want)).all()
