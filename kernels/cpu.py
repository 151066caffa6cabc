"""The operator on a CPU: one group of rows after another, in fp32."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .ops import LoraWeights, Routing, SiteTable


class CpuLoraOps:
    """`LoraOps` in plain torch.

    Half-precision weights are widened to fp32 as they are used: a small bf16 matmul costs tens of
    microseconds before it computes anything, an fp32 one does not, and nothing is rounded before the
    end. A group reads its own adapters only, so a faulty one cannot reach other rows.
    `bench/lora_cpu.py` compares this form with the others.
    """

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, routing: Routing, table: SiteTable) -> None:
        """Add every row's adapter delta to `y` in place; see `LoraOps.add_lora`."""
        if not routing.groups:
            return
        inputs = x.float()
        for group in routing.groups:
            adapters = [(table[slot], weight) for slot, weight in group.entries if slot in table]
            if adapters:
                _add_to_rows(y, group.rows, inputs[group.rows], adapters)


def _add_to_rows(
    y: torch.Tensor,
    rows: slice | torch.Tensor,
    inputs: torch.Tensor,
    adapters: list[tuple[LoraWeights, float]],
) -> None:
    """Add the weighted sum of `adapters` to these rows of `y`; `inputs` is their x [count, in] in fp32."""
    target = y[rows]
    total = target.float()
    for adapter, weight in adapters:
        hidden = linear(inputs, adapter.a.float())
        for part in adapter.parts:
            rank, width = part.b.shape
            columns = total[:, part.out_offset : part.out_offset + width]
            shrunk = hidden[:, part.rank_offset : part.rank_offset + rank]
            columns.addmm_(shrunk, part.b.float(), alpha=weight)
    if isinstance(rows, torch.Tensor):
        y.index_copy_(0, rows, total.to(y.dtype))
    elif total is not target:
        target.copy_(total)
