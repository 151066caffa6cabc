"""The operators on a CPU by the C++ extension: every task of a step at one site in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from . import _native
from .cpu import CpuLoraOps
from .device_tables import PARTS, RECORD_BYTES, DeviceTable, LoraTables
from .ops import EmbeddingTable, LoraDelta, Placed, Routing, SiteTable
from .placement import HEADER_BYTES, Chunks, Latest, identity_of, plan_tasks, write_tasks

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}
"""What the extension computes with, by its own numbers."""
ROWS = Chunks(rows=16, splits=1)
"""All rows', as the extension was built for."""

if _native.RECORD_BYTES != RECORD_BYTES:
    raise ImportError("the extension was built for tables of another shape: run `make setup` again")


@dataclass(frozen=True, slots=True)
class NativeRouting:
    """A routing, and its tasks where the extension reads them."""

    routing: Routing
    tasks: torch.Tensor
    """`Tasks` in lora_tables.cuh, all cut alike."""
    hidden: torch.Tensor
    """Room for x A^T, fp32."""


class NativeLoraOps:
    """`LoraOps` in fp32 over weights of fp32 or bf16, on the threads that torch uses.

    What the extension does not know, other dtypes, embeddings, and sites with more linears than a record has
    room for, is left to `CpuLoraOps`.
    """

    def __init__(self) -> None:
        self._others = CpuLoraOps()
        self._tables = LoraTables(torch.device("cpu"))
        self._latest: Latest[NativeRouting] = Latest()

    def site_table(self, widths: Sequence[int], *, shares: int = 1) -> SiteTable:
        if len(widths) > PARTS:
            return self._others.site_table(widths, shares=shares)
        return self._tables.site_table(widths, shares)

    def embedding_table(self) -> EmbeddingTable:
        return self._others.embedding_table()

    def place(self, routing: Routing, *, shares: int = 1) -> NativeRouting:
        """See `LoraOps.place`. Answers what it answered last where nothing has changed."""
        self._tables.update(max(routing.slots, default=0) // shares + 1)
        groups = identity_of(routing)
        wanted = None if groups is None else (routing.rows, shares, groups, self._tables.versions)
        return self._latest.of(wanted, lambda: self._place(routing, shares))

    def _place(self, routing: Routing, shares: int) -> NativeRouting:
        everything = replace(routing, decode_rows=routing.rows)
        plan = plan_tasks(everything, lambda key: self._tables.stacked_rank(key // shares), decode=ROWS)
        nbytes = HEADER_BYTES + plan.decode.nbytes
        tasks = torch.empty(nbytes, dtype=torch.uint8)
        write_tasks(tasks.numpy(), plan.decode, plan.stretches)
        return NativeRouting(routing, tasks, torch.empty(plan.hidden_values, dtype=torch.float32))

    def start_lora(self, x: torch.Tensor, placed: Placed, table: SiteTable) -> LoraDelta:
        """See `LoraOps.start_lora`. `add_to` computes everything: there is nothing to overlap it with."""
        assert isinstance(placed, NativeRouting)
        if not isinstance(table, DeviceTable) or x.dtype not in ELEMENTS:
            return self._others.start_lora(x, placed.routing, table)
        table.check(x.dtype)
        return NativeDelta(x, placed, table)

    def add_embedding(
        self, e: torch.Tensor, tokens: torch.Tensor, placed: Placed, table: EmbeddingTable
    ) -> None:
        assert isinstance(placed, NativeRouting)
        self._others.add_embedding(e, tokens, placed.routing, table)


@dataclass(frozen=True, slots=True)
class NativeDelta:
    """`LoraDelta` of one site in one step."""

    x: torch.Tensor
    placed: NativeRouting
    table: DeviceTable

    def add_to(self, y: torch.Tensor) -> None:
        if not self.table:
            return
        if y.stride(1) != 1:
            dense = y.contiguous()
            self._add_to(dense)
            y.copy_(dense)
            return
        self._add_to(y)

    def _add_to(self, y: torch.Tensor) -> None:
        x = self.x if self.x.stride(1) == 1 else self.x.contiguous()
        _native.lora(
            ELEMENTS[x.dtype],
            y.data_ptr(),
            y.stride(0),
            y.shape[1],
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            self.placed.hidden.data_ptr(),
            self.placed.tasks.data_ptr(),
            self.table.address,
            self.table.arena.stride,
            self.table.shares,
        )
