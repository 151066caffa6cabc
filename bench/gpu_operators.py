"""The LoRA operators alone, against a loop of cuBLAS pairs, PEFT's mixed batch and a grouped Triton kernel.

Weights are rotated, so that they come from memory and not from the cache.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from loraplex.kernels.cuda import CudaLoraOps
from loraplex.kernels.launch import Launcher
from loraplex.kernels.ops import LoraPart, LoraWeights, route
from loraplex.kernels.side_stream import InOrder

from .gpu_timing import milliseconds, recorded

DTYPE = torch.bfloat16
CACHE_BYTES = 128 << 20
"""More than any cache that is measured."""
SITES = {"q/k/v": (4096, 2048, 3), "down": (14336, 4096, 1)}
"""Input, outputs of each linear, linears. Equally wide ones, for the sake of the comparison."""
TOLERANCE = 0.1
"""Relative L2: hundreds of sums, each rounded to bf16."""
OURS, LOOP, PEFT, TRITON = "ours", "cuBLAS loop", "PEFT mixed batch", "Triton grouped"


@dataclass(frozen=True, slots=True)
class Point:
    site: str
    rows: int
    adapters: int
    rank: int


def points() -> Iterator[Point]:
    """Rows 1 to 128, adapters from one to one a row, ranks 8 to 64."""
    for site in SITES:
        for rows in (1, 8, 32, 128):
            for adapters in sorted({1, min(8, rows), rows}):
                for rank in (8, 16, 64):
                    yield Point(site, rows, adapters, rank)


class Case:
    """One point's data: several sets of adapters, used in turn."""

    def __init__(self, point: Point, ops: CudaLoraOps, device: torch.device) -> None:
        self.point, self.ops = point, ops
        features, width, parts = SITES[point.site]
        rank, columns = point.rank, width * parts
        bytes_each = point.adapters * rank * (features * parts + columns) * DTYPE.itemsize
        self.sets = max(2, -(-CACHE_BYTES // bytes_each))
        shape = (self.sets, point.adapters)
        self.a = torch.empty(*shape, rank * parts, features, dtype=DTYPE, device=device).normal_(0, 0.02)
        self.b = torch.empty(*shape, rank, columns, dtype=DTYPE, device=device).normal_(0, 0.02)
        self.own = torch.arange(point.rows, device=device) * point.adapters // point.rows
        self.x = torch.randn(point.rows, features, dtype=DTYPE, device=device)
        self.y = torch.randn(point.rows, columns, dtype=DTYPE, device=device)
        self.width, self.parts = width, parts
        self.rows_of = torch.arange(point.rows, device=device).view(point.adapters, -1)
        entries = [((int(adapter), 1.0),) for adapter in self.own.tolist()]
        self.tables = [self._table(index) for index in range(self.sets)]
        self.placed = ops.place(route(entries, decode_rows=point.rows))

    def _table(self, index: int) -> object:
        table = self.ops.site_table([self.width] * self.parts)
        for adapter in range(self.point.adapters):
            b = self.b[index, adapter]
            parts = tuple(
                LoraPart(
                    part * self.point.rank,
                    part * self.width,
                    b[:, part * self.width : (part + 1) * self.width].contiguous(),
                )
                for part in range(self.parts)
            )
            table[adapter] = LoraWeights(self.a[index, adapter], parts)
        return table

    def ours(self) -> None:
        for table in self.tables:
            self.ops.start_lora(self.x, self.placed, table).add_to(self.y)  # type: ignore[arg-type]

    def loop(self) -> None:
        """Segment by segment: one product with A, one with each linear's B."""
        size = self.point.rows // self.point.adapters
        for a, b in zip(self.a, self.b, strict=True):
            for adapter in range(self.point.adapters):
                rows = slice(adapter * size, (adapter + 1) * size)
                hidden = self.x[rows] @ a[adapter].t()
                self._add(self.y[rows], hidden, b[adapter])

    def peft(self) -> None:
        """As PEFT's layers serve adapter names: gather the rows, two linears, scatter."""
        for a, b in zip(self.a, self.b, strict=True):
            for adapter in range(self.point.adapters):
                rows = self.rows_of[adapter]
                hidden = self.x.index_select(0, rows) @ a[adapter].t()
                delta = torch.zeros(len(rows), self.y.shape[1], dtype=DTYPE, device=self.y.device)
                self._add(delta, hidden, b[adapter])
                self.y.index_add_(0, rows, delta)

    def _add(self, y: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor) -> None:
        rank, width = self.point.rank, self.width
        for part in range(self.parts):
            columns = slice(part * width, (part + 1) * width)
            shrunk = hidden[:, part * rank : (part + 1) * rank]
            y[:, columns].addmm_(shrunk, b[:, columns])

    def triton(self) -> Callable[[], None]:
        from .triton_grouped import TritonGrouped

        processors = torch.cuda.get_device_properties(self.y.device).multi_processor_count
        grouped = TritonGrouped(self.own, self.point.rank, self.parts, processors)

        def run() -> None:
            for a, b in zip(self.a, self.b, strict=True):
                grouped.add_to(self.y, self.x, a, b)

        return run

    def result(self, form: Callable[[], None]) -> torch.Tensor:
        """What a form makes of zeros."""
        self.y.zero_()
        form()
        return self.y.float()


def compare(launcher: Launcher, device: torch.device) -> Iterator[tuple[Point, dict[str, float]]]:
    """Microseconds of each form at every point."""
    has_triton = importlib.util.find_spec("triton") is not None
    for point in points():
        # Operators of its own: tables are made for a model's hundred sites, not for all of these at once.
        case = Case(point, CudaLoraOps(launcher, device, InOrder()), device)
        forms = {OURS: case.ours, LOOP: case.loop, PEFT: case.peft}
        if has_triton:
            forms[TRITON] = case.triton()
        _check(case, forms)
        times = {
            name: 1e3 * milliseconds(recorded(form), repeats=5, warm=1) / case.sets
            for name, form in forms.items()
        }
        yield point, times


def _check(case: Case, forms: Mapping[str, Callable[[], None]]) -> None:
    """Refuse to time a form that computes something else than a loop of products does."""
    want = case.result(case.loop)
    for name, form in forms.items():
        distance = float((case.result(form) - want).norm() / want.norm())
        if not distance < TOLERANCE:
            raise SystemExit(f"{name} is wrong at {case.point}: relative error {distance:.3f}")
