"""The operators on a CPU: one group of rows after another, in fp32."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch.nn.functional import linear

from .ops import EmbeddingTable, LoraPart, LoraWeights, Placed, Routing, SiteTable, route
from .stacked import StackedTable, Steadiness, SteadyRouting, steady

_Rows = slice | torch.Tensor


class CpuLoraOps:
    """`LoraOps` in plain torch.

    Decode steps whose adapters stay have them stacked where that is faster, and apply them by one masked
    product (`stacked.py`). In other steps each group has products of its own, and half-precision weights are
    widened to fp32 as they are used: a small bf16 matmul costs tens of microseconds before it computes
    anything, an fp32 one does not, and nothing is rounded before the end. A group reads its own adapters
    only, so a faulty one cannot reach other rows. `bench/lora_cpu.py` compares these forms with others.
    """

    def __init__(self) -> None:
        self._steadiness = Steadiness()

    def site_table(self, widths: Sequence[int], *, shares: int = 1) -> SiteTable:
        return {} if shares > 1 else StackedTable()

    def embedding_table(self) -> EmbeddingTable:
        return {}

    def place(self, routing: Routing, *, shares: int = 1) -> Routing:
        return routing if shares > 1 else self._steadiness.place(routing)

    def start_lora(self, x: torch.Tensor, placed: Placed, table: SiteTable) -> _Delta:
        """See `LoraOps.start_lora`. `add_to` computes everything: there is nothing to overlap it with."""
        assert isinstance(placed, Routing)
        return _Delta(x, placed, table)

    def add_embedding(
        self, e: torch.Tensor, tokens: torch.Tensor, placed: Placed, table: EmbeddingTable
    ) -> None:
        """Apply every row's adapters to `e` in place; see `LoraOps.add_embedding`."""
        assert isinstance(placed, Routing)
        for group in placed.groups:
            adapters = [(table[slot], weight) for slot, weight in group.entries if slot in table]
            if not adapters:
                continue
            total = e[group.rows].float()
            ids = tokens[group.rows]
            for adapter, weight in adapters:
                if adapter.scale is not None:
                    total.mul_(adapter.scale)
                if last := len(adapter.a):
                    hidden = adapter.a[ids.clamp(max=last - 1)].float() * (ids < last)[:, None]
                    total.addmm_(hidden, adapter.b.float(), alpha=weight)
            e[group.rows] = total.to(e.dtype)


@dataclass(frozen=True, slots=True)
class _Delta:
    """`LoraDelta` of one site."""

    x: torch.Tensor
    routing: Routing
    table: SiteTable

    def add_to(self, y: torch.Tensor) -> None:
        if not self.routing.groups or not self.table:
            return
        if isinstance(self.routing, SteadyRouting) and stacking_pays(self.x.dtype):
            assert isinstance(self.table, StackedTable)
            if self.table.add_stacked(y, self.x, self.routing):
                return
        inputs = self.x.float()
        for group in self.routing.groups:
            adapters = [(self.table[slot], weight) for slot, weight in group.entries if slot in self.table]
            if adapters:
                _apply_to_rows(y, group.rows, inputs[group.rows], adapters)


@cache
def stacking_pays(dtype: torch.dtype) -> bool:
    """Whether this machine is faster with stacked adapters: measured once, in some milliseconds.

    It depends on what it multiplies: bfloat16 by pairs is as fast as it is read, fp32 is not.
    """
    slots, rank, hidden = range(8), 16, 1024
    table = StackedTable()
    for slot in slots:
        table[slot] = LoraWeights(_ones(rank, hidden, dtype), (LoraPart(0, 0, _ones(rank, hidden, dtype)),))
    routing = route([((slot, 1.0),) for slot in slots])
    x, y = _ones(len(slots), hidden, dtype), _ones(len(slots), hidden, dtype)
    stacked = _seconds(partial(table.add_stacked, y, x, steady(routing, routing.slots)))
    return stacked < _seconds(partial(_Delta(x, routing, table).add_to, y))


def _ones(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, columns), 1.0 / columns, dtype=dtype)


def _seconds(work: Callable[[], object]) -> float:
    """The best of a few times, after one that does not count."""
    work()
    times = []
    for _ in range(10):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


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
