"""Work on a device that is recorded once and repeated in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Captured(Protocol):
    """Recorded work. A repetition reads what its inputs hold by then."""

    output: torch.Tensor

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], torch.Tensor]], Captured]
"""Records the work of a function that has run once before."""


class CudaCapture:
    """`Capture` by CUDA graphs that share one pool of memory: they run one after another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = work()
        return _CapturedGraph(graph, output)


class _CapturedGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()
