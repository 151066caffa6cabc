"""The operators on a CPU: one group of rows after another, in fp32."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .ops import EmbeddingTable, LoraWeights, Routing, SiteTable

_Rows = slice | torch.Tensor


class CpuLoraOps:
    """`LoraOps` in plain torch.

    Half-precision weights are widened to fp32 as they are used: a small bf16 matmul costs tens of
    microseconds before it computes anything, an fp32 one does not, and nothing is rounded before the
    end. A group reads its own adapters only, so a faulty one cannot reach other rows.
    `bench/lora_cpu.py` compares this form with the others.
    """

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, routing: Routing, table: SiteTable) -> None:
        """Apply every row's adapters to `y` in place; see `LoraOps.add_lora`."""
        if not routing.groups:
            return
        inputs = x.float()
        for group in routing.groups:
            adapters = [(table[slot], weight) for slot, weight in group.entries if slot in table]
            if adapters:
                _apply_to_rows(y, group.rows, inputs[group.rows], adapters)

    def add_embedding(
        self, e: torch.Tensor, tokens: torch.Tensor, routing: Routing, table: EmbeddingTable
    ) -> None:
        """Apply every row's adapters to `e` in place; see `LoraOps.add_embedding`."""
        for group in routing.groups:
            adapters = [(table[slot], weight) for slot, weight in group.entries if slot in table]
            if not adapters:
                continue
            total = e[group.rows].float()
            ids = tokens[group.rows]
            for adapter, weight in adapters:
                last = len(adapter.a) - 1
                hidden = adapter.a[ids.clamp(max=last)].float() * (ids <= last)[:, None]
                if adapter.scale is not None:
                    total.mul_(adapter.scale)
                total.addmm_(hidden, adapter.b.float(), alpha=weight)
            e[group.rows] = total.to(e.dtype)


def _apply_to_rows(
    y: torch.Tensor, rows: _Rows, inputs: torch.Tensor, adapters: list[tuple[LoraWeights, float]]
) -> None:
    """Apply `adapters` one after another to these rows of `y`; `inputs` is their x [count, in] in fp32."""
    target = y[rows]
    total = target.float()
    for adapter, weight in adapters:
        hidden = linear(inputs, adapter.a.float())
        for part in adapter.parts:
            rank, width = part.b.shape
            columns = total[:, part.out_offset : part.out_offset + width]
            if part.scale is not None:
                columns.mul_(part.scale)
            if part.shift is not None:
                columns.add_(part.shift, alpha=weight)
            if rank:
                shrunk = hidden[:, part.rank_offset : part.rank_offset + rank]
                columns.addmm_(shrunk, part.b.float(), alpha=weight)
    if isinstance(rows, torch.Tensor):
        y.index_copy_(0, rows, total.to(y.dtype))
    elif total is not target:
        target.copy_(total)
