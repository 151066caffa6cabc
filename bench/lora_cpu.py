"""Which form of the LoRA operator is fastest on this CPU?

Times one linear's adapters in several forms over decode and prefill batches, and prints each as a share
of the base GEMM of the same rows. Without the extension `loop, fp32` is served and, where adapters stay,
`stacked` (loraplex.kernels.cpu, loraplex.kernels.stacked).

    python bench/lora_cpu.py [--threads N] [--seconds S] [--dtype bfloat16|float32]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import linear

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import Entries, LoraPart, LoraWeights, Routing, RowGroup, route
from loraplex.kernels.reference import reference_lora
from loraplex.kernels.stacked import StackedTable, SteadyRouting, steady


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    rows: int
    adapters: int
    rank: int

    def __str__(self) -> str:
        return f"{self.hidden} | {self.rows} | {self.adapters} | {self.rank}"


SHAPES = tuple(
    Shape(hidden, rows, adapters, rank)
    for hidden in (256, 2048)
    for rank in (16, 64)
    for rows, adapters in ((1, 1), (8, 8), (32, 1), (32, 8), (32, 32), (512, 4))
)


@dataclass(frozen=True, slots=True)
class Case:
    """One batch over one square linear. Rows of one adapter are adjacent."""

    base: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    routing: Routing
    steady: SteadyRouting
    table: StackedTable

    @property
    def groups(self) -> Iterator[tuple[RowGroup, LoraWeights, torch.Tensor]]:
        for group in self.routing.groups:
            weights = self.table[group.entries[0][0]]
            yield group, weights, weights.parts[0].b


def build(shape: Shape, dtype: torch.dtype) -> Case:
    def random(*size: int) -> torch.Tensor:
        scaled: torch.Tensor = torch.randn(*size) / size[-1] ** 0.5
        return scaled.to(dtype)

    table = StackedTable()
    for slot in range(shape.adapters):
        b = random(shape.rank, shape.hidden)
        table[slot] = LoraWeights(random(shape.rank, shape.hidden), (LoraPart(0, 0, b),))
    entries = [((row * shape.adapters // shape.rows, 1.0),) for row in range(shape.rows)]
    x = torch.randn(shape.rows, shape.hidden).to(dtype)
    base = random(shape.hidden, shape.hidden)
    routing = route(entries)
    return Case(base, x, torch.zeros_like(x), routing, steady(routing, routing.slots), table)


def loop_fp32(case: Case) -> None:
    CpuLoraOps().start_lora(case.x, case.routing, case.table).add_to(case.y)


def loop_native(case: Case) -> None:
    for group, weights, b in case.groups:
        case.y[group.rows].addmm_(case.x[group.rows] @ weights.a.T, b)


def stacked(case: Case) -> None:
    if not case.table.add_stacked(case.y, case.x, case.steady):
        raise SystemExit("these adapters cannot be stacked")


def gather_bmm(case: Case) -> None:
    counts = torch.tensor([group.count for group, _, _ in case.groups])
    a = torch.stack([weights.a for _, weights, _ in case.groups]).repeat_interleave(counts, 0)
    b = torch.stack([b for _, _, b in case.groups]).repeat_interleave(counts, 0)
    case.y.add_(torch.bmm(torch.bmm(case.x.unsqueeze(1), a.mT), b).squeeze(1))


FORMS: dict[str, Callable[[Case], None]] = {
    "loop, fp32": loop_fp32,
    "loop, own dtype": loop_native,
    "stacked": stacked,
    "gather + bmm": gather_bmm,
}


def check(case: Case, name: str) -> None:
    """Refuse to time a form that computes something else."""
    case.y.zero_()
    FORMS[name](case)
    entries: list[Entries] = [()] * len(case.x)
    for group in case.routing.groups:
        for row in torch.arange(len(case.x))[group.rows].tolist():
            entries[row] = group.entries
    want = reference_lora(torch.zeros_like(case.y), case.x, entries, case.table)
    error = ((case.y.double() - want).norm() / want.norm()).item()
    if error > 0.02:
        raise SystemExit(f"{name} is wrong: relative error {error:.3f}")


def microseconds(function: Callable[[], object], seconds: float) -> float:
    """The best of many repetitions: neighbours on the machine only ever add time."""
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=0.1, help="time spent on each cell")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.dtype}; share of the base GEMM\n")
    print("hidden | rows | adapters | rank | base µs | " + " | ".join(FORMS))
    print("|".join(["---:"] * (5 + len(FORMS))))
    for shape in SHAPES:
        case = build(shape, getattr(torch, options.dtype))
        base = microseconds(partial(linear, case.x, case.base), options.seconds)
        cells = []
        for name, form in FORMS.items():
            check(case, name)
            cells.append(microseconds(partial(form, case), options.seconds) / base)
        print(f"{shape} | {base:.0f} | " + " | ".join(f"{cell:.2f}" for cell in cells), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
