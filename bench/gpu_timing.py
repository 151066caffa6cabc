"""Times on a GPU, by events around replays of captured work."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def milliseconds(work: Callable[[], object], *, repeats: int = 20, warm: int = 3) -> float:
    """Median time of `work` as the device sees it."""
    for _ in range(warm):
        work()
    torch.cuda.synchronize()
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    times: list[float] = []
    for _ in range(repeats):
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return median(times)


def wall_milliseconds(work: Callable[[], object], *, repeats: int = 20) -> float:
    """Median time of `work`, which ends with a transfer to the host, as the host sees it."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times)


def recorded(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as one launch."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.numel() / milliseconds(lambda: target.copy_(source))
