"""The operators on a GPU: which kernels run for a site, on which rows, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from .device_tables import PARTS, VECTOR, DeviceTable, LoraTables
from .launch import Argument, Kernel, Launcher
from .ops import EmbeddingTable, Placed, Routing, SiteTable
from .placement import (
    DECODE,
    GATE_BLOCKS,
    HEADER_BYTES,
    PROMPT,
    SHRINK_WARPS,
    Family,
    Plan,
    Splits,
    expand_grid,
    identity_of,
    plain_grid,
    plan_tasks,
    shrink_grid,
    task_dtype,
    write_tasks,
)

BLOCK = 128
"""Threads."""
ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "float"}


class SideStream(Protocol):
    """Work beside the current stream's."""

    def fork(self) -> AbstractContextManager[None]:
        """Within it, launches go beside what the current stream is given from now on, behind all before."""
        ...

    def join(self) -> None:
        """What the current stream is given from now on waits for the work beside it."""
        ...


def _kernel(source: str, name: str, dtype: torch.dtype, family: Family) -> Kernel:
    numbers = {"ROWS": family.rows, "SPLITS": family.splits, "PARTS": PARTS}
    defines = (("ELEMENT", ELEMENTS[dtype]), *((key, str(value)) for key, value in numbers.items()))
    return Kernel(source, name, defines)


_HALVES = (torch.bfloat16, torch.float16)
_FAMILIES = (DECODE, PROMPT)
_SHRINK = {(t, f): _kernel("lora_shrink.cu", "lora_shrink", t, f) for t in _HALVES for f in _FAMILIES}
_EXPAND = {(t, f): _kernel("lora_expand.cu", "lora_expand", t, f) for t in _HALVES for f in _FAMILIES}
_GATE = {(t, f): _kernel("lora_expand.cu", "lora_gate", t, f) for t in _HALVES for f in _FAMILIES}
_PLAIN_SHRINK = {
    (t, f): _kernel("lora_plain.cu", "lora_shrink_plain", t, f) for t in ELEMENTS for f in _FAMILIES
}
_PLAIN_EXPAND = {
    (t, f): _kernel("lora_plain.cu", "lora_expand_plain", t, f) for t in ELEMENTS for f in _FAMILIES
}
_EMBED = {(t, f): _kernel("lora_plain.cu", "lora_embed", t, f) for t in ELEMENTS for f in _FAMILIES}

KERNELS: tuple[Kernel, ...] = tuple(
    kernel
    for family in (_SHRINK, _EXPAND, _GATE, _PLAIN_SHRINK, _PLAIN_EXPAND, _EMBED)
    for kernel in family.values()
)
"""Every specialisation that can be launched."""


@dataclass(frozen=True, slots=True)
class TaskList:
    """The tasks of one family of kernels in device memory."""

    family: Family
    address: int
    limit: int
    """How many tasks there may be; how many there are is known to the device only."""


class DeviceRouting:
    """A routing in device memory, and the room for what its rows make of A.

    Made for one step, or reserved: then it keeps its addresses and is filled anew before each replay of the
    graphs that were captured with it.
    """

    def __init__(
        self, device: torch.device, *, decode: int, prompt: int, hidden: int, reserved: bool = False
    ) -> None:
        """`decode`, `prompt`: tasks; `hidden`: values of x A^T."""
        self.is_reserved = reserved
        decode_bytes, prompt_bytes = (
            HEADER_BYTES + tasks * task_dtype(family.rows).itemsize
            for tasks, family in ((decode, DECODE), (prompt, PROMPT))
        )
        self._prompt_offset = -(-decode_bytes // 16) * 16
        self._buffer = torch.zeros(self._prompt_offset + prompt_bytes, dtype=torch.uint8, device=device)
        self._staging = torch.zeros_like(self._buffer, device="cpu", pin_memory=device.type == "cuda")
        self.hidden = torch.empty(max(1, hidden), dtype=torch.float32, device=device)
        self.holds: object = None
        """What its tasks were made from, where somebody wants to know."""
        address = self._buffer.data_ptr()
        families = (
            TaskList(DECODE, address, decode),
            TaskList(PROMPT, address + self._prompt_offset, prompt),
        )
        self.lists = tuple(tasks for tasks in families if tasks.limit)

    def write(self, plan: Plan) -> bool:
        """Take the tasks of a plan, in the order of the current stream. False, and nothing changes, where
        they do not fit."""
        staging = self._staging.numpy()
        limits = {tasks.family: tasks.limit for tasks in self.lists}
        fits = len(plan.decode) <= limits.get(DECODE, 0) and len(plan.prompt) <= limits.get(PROMPT, 0)
        if not fits or plan.hidden_values > self.hidden.numel():
            return False
        write_tasks(staging, plan.decode, plan.stretches)
        write_tasks(staging[self._prompt_offset :], plan.prompt, plan.stretches)
        self._buffer.copy_(self._staging, non_blocking=True)
        return True


class CudaLoraOps:
    """`LoraOps` by kernels of our own.

    Half precision goes over tensor cores wherever rows are made of whole 16-byte vectors, which the shapes of
    a site decide; fp32 and odd shapes over plain kernels. In a captured step the products with A run beside
    the base's own.
    """

    def __init__(self, launcher: Launcher, device: torch.device, side: SideStream) -> None:
        self._launcher = launcher
        self._device = device
        self._side = side
        self._tables = LoraTables(device)

    def site_table(self, widths: Sequence[int], *, shares: int = 1) -> SiteTable:
        return self._tables.site_table(widths, shares, vector=VECTOR)

    def embedding_table(self) -> EmbeddingTable:
        return self._tables.embedding_table()

    def place(self, routing: Routing, *, shares: int = 1) -> DeviceRouting:
        plan = self._plan(routing, shares)
        placed = DeviceRouting(
            self._device, decode=len(plan.decode), prompt=len(plan.prompt), hidden=plan.hidden_values
        )
        placed.write(plan)
        return placed

    def reserve(self, *, rows: int, slots: int, hidden: int) -> DeviceRouting:
        """Room for the routing of up to `rows` decode rows, for captured steps. No table can be added later.

        Args:
            slots: how many there are.
            hidden: values of x A^T, all rows and ranks together; a routing that needs more does not fit.
        """
        self._tables.fix(slots)
        return DeviceRouting(
            self._device, decode=rows, prompt=0, hidden=DECODE.splits * hidden, reserved=True
        )

    def fill(self, reserved: DeviceRouting, routing: Routing, rows: int) -> bool:
        """Put a routing, padded to so many rows, into reserved room, in the order of the current stream.
        False, and nothing changes, where it does not fit. Nothing is done where it is there already, as it is
        from one decode step to the next while no sequence begins or ends."""
        groups = identity_of(routing)
        wanted = None if groups is None else (rows, groups, self._tables.versions)
        if wanted is not None and reserved.holds == wanted:
            return True
        plan = self._plan(replace(routing, decode_rows=rows, rows=rows), 1)
        if not reserved.write(plan):
            return False
        reserved.holds = wanted
        return True

    def _plan(self, routing: Routing, shares: int) -> Plan:
        """A routing's tasks; brings the device's tables up to date."""
        self._tables.update(max(routing.slots, default=0) // shares + 1)
        return plan_tasks(routing, lambda key: self._tables.stacked_rank(key // shares))

    def start_lora(self, x: torch.Tensor, placed: Placed, table: SiteTable) -> CudaDelta:
        """See `LoraOps.start_lora`. x [rows, in] is read until `add_to`."""
        assert isinstance(placed, DeviceRouting)
        assert isinstance(table, DeviceTable)
        table.check(x.dtype)
        delta = CudaDelta(self._launcher, self._side, x, placed, table)
        delta.start()
        return delta

    def add_embedding(
        self, e: torch.Tensor, tokens: torch.Tensor, placed: Placed, table: EmbeddingTable
    ) -> None:
        assert isinstance(placed, DeviceRouting)
        assert isinstance(table, DeviceTable)
        if not table and not placed.is_reserved:
            return
        table.check(e.dtype)
        columns = np.int32(e.shape[1])
        for tasks in placed.lists:
            self._launcher.launch(
                _EMBED[e.dtype, tasks.family],
                plain_grid(tasks.limit, tasks.family.rows, self._launcher.processors),
                BLOCK,
                (e.data_ptr(), e.stride(0), columns, tokens.data_ptr(), tasks.address, *_table(table)),
            )


class CudaDelta:
    """`LoraDelta` of one site in one step."""

    def __init__(
        self, launcher: Launcher, side: SideStream, x: torch.Tensor, placed: DeviceRouting, table: DeviceTable
    ) -> None:
        self._launcher = launcher
        self._side = side
        self._placed = placed
        self._table = table
        in_features = x.shape[1]
        self._is_vectored = table.is_vectored and x.dtype in _HALVES and in_features % VECTOR == 0
        self._x = x if x.stride(1) == 1 and (not self._is_vectored or _is_aligned(x)) else x.contiguous()
        self._is_idle = not table and not placed.is_reserved

    def start(self) -> None:
        """Launch the products with A."""
        if self._is_idle:
            return
        if not self._placed.is_reserved:
            self._shrink()
            return
        with self._side.fork():
            self._shrink()

    def add_to(self, y: torch.Tensor) -> None:
        """Launch the products with B, which add to `y`."""
        if self._is_idle:
            return
        if self._placed.is_reserved:
            self._side.join()
        if not self._is_vectored or _is_aligned(y):
            self._expand(y)
            return
        rows, columns = y.shape
        aligned = y.new_empty(rows, -(-columns // VECTOR) * VECTOR)[:, :columns].copy_(y)
        self._expand(aligned)
        y.copy_(aligned)

    @property
    def is_gated(self) -> bool:
        """Whether `gate_into` is worth it: where there are prompts. In a decode step its warps would have two
        parts of B to wait for, one after the other."""
        has_prompts = any(tasks.family is PROMPT for tasks in self._placed.lists)
        return self._is_vectored and has_prompts and not self._is_idle

    def gate_into(self, out: torch.Tensor, y: torch.Tensor) -> None:
        """Launch the products with B and what follows at once in an MLP: out [rows, width] = silu(gate) * up
        of what y [rows, 2 * width] would become by `add_to`, rows without adapters included."""
        if self._placed.is_reserved:
            self._side.join()
        columns, processors = y.shape[1], self._launcher.processors
        for tasks in self._placed.lists:
            limit = self._limit(tasks)
            self._launcher.launch(
                _GATE[y.dtype, tasks.family],
                expand_grid(limit, tasks.family, columns // 2, GATE_BLOCKS * processors),
                BLOCK,
                (out.data_ptr(), *self._expand_arguments(tasks, y)),
            )

    def _limit(self, tasks: TaskList) -> int:
        """How many tasks a grid is made for."""
        return min(tasks.limit, len(self._x)) if self._placed.is_reserved else tasks.limit

    def _shrink(self) -> None:
        x, processors = self._x, self._launcher.processors
        for tasks in self._placed.lists:
            arguments: tuple[Argument, ...] = (
                self._placed.hidden.data_ptr(),
                x.data_ptr(),
                x.stride(0),
                tasks.address,
                *_table(self._table),
                np.int32(x.shape[1]),
            )
            family, limit = tasks.family, self._limit(tasks)
            if not self._is_vectored:
                grid = plain_grid(limit, family.rows, processors)
                self._launcher.launch(_PLAIN_SHRINK[x.dtype, family], grid, BLOCK, arguments)
                continue
            splits = Splits.of(x.shape[1], family)
            self._launcher.launch(
                _SHRINK[x.dtype, family],
                shrink_grid(limit, family, splits.count, processors),
                32 * SHRINK_WARPS,
                (*arguments, np.int32(splits.slice)),
            )

    def _expand(self, y: torch.Tensor) -> None:
        processors = self._launcher.processors
        for tasks in self._placed.lists:
            family, limit = tasks.family, self._limit(tasks)
            if self._is_vectored:
                kernel = _EXPAND[y.dtype, family]
                grid = expand_grid(limit, family, y.shape[1], family.expand_blocks * processors)
            else:
                kernel, grid = _PLAIN_EXPAND[y.dtype, family], plain_grid(limit, family.rows, processors)
            self._launcher.launch(kernel, grid, BLOCK, self._expand_arguments(tasks, y))

    def _expand_arguments(self, tasks: TaskList, y: torch.Tensor) -> tuple[Argument, ...]:
        splits = Splits.of(self._x.shape[1], tasks.family).count
        return (
            y.data_ptr(),
            y.stride(0),
            np.int32(y.shape[1]),
            self._placed.hidden.data_ptr(),
            *((np.int32(splits),) if self._is_vectored else ()),
            tasks.address,
            *_table(self._table),
        )


def _table(table: DeviceTable) -> tuple[Argument, ...]:
    return table.address, table.arena.stride, np.int32(table.shares)


def _is_aligned(values: torch.Tensor) -> bool:
    """Whether every row [in or out] begins at a 16-byte boundary."""
    return values.data_ptr() % 16 == 0 and values.stride(0) % VECTOR == 0
