"""Steps, a prefill, a load and the operators on a GPU, at the shapes of Llama 3 8B with random weights.

    python -m bench.gpu [--layers N] [--only step,prefill,load,operators] [--json FILE]

Times of steps are those of the captured graph, by events; another column has the time that the host sees
from a batch to its greedy tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loraplex.kernels.ops import Entries
from loraplex.shard.adapters.upload import CudaUploader
from loraplex.shard.graphs import GraphedModel

from .gpu_model import Served, decode_batch, llama_8b, prompt_batch, random_adapter
from .gpu_operators import OURS, compare
from .gpu_timing import copy_rate, milliseconds, wall_milliseconds

CONTEXT, ROWS, SLOTS = 512, (32, 128), 144
RANK_64 = 128
"""The first slot of the adapters of rank 64; those of rank 16 lie before it."""
ADAPTED = ((32, 1, 16), (32, 8, 16), (32, 32, 16), (32, 8, 64), (128, 1, 16), (128, 8, 16), (128, 128, 16))
"""Rows, adapters among them, rank."""
SLOPE = 0.028
"""Milliseconds a step that an adapter of rank 16 may add."""


class Bench:
    """Measures one served model; collects figures by name and prints them as they come."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._device = device
        self._rate = copy_rate(device)
        self.figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "layers": layers,
            "copy_bytes_per_s": self._rate,
        }
        config = llama_8b(layers)
        began = time.perf_counter()
        self._served = Served.of(
            config, device, rows=max(ROWS), context=4 * CONTEXT, slots=SLOTS, adapter_bytes=20 << 30
        )
        assembled = self._served.assembled
        assert assembled.graphs is not None
        self._model = assembled.model
        self._graphs = assembled.graphs
        self._graphed = GraphedModel(assembled.model, assembled.graphs, self._served.pool.are_plain)
        embedding = config.vocab_size * config.hidden_size * 2
        self._weight_bytes = assembled.weight_bytes - embedding
        self._token_bytes = assembled.block_bytes // assembled.kv.block_size
        self._base: dict[int, float] = {}
        print(f"{self.figures['device']}, torch {torch.__version__}, copies {self._rate / 1e12:.2f} TB/s")
        print(f"{layers} layers ready after {time.perf_counter() - began:.1f} s\n")

    def _step(self, entries: Sequence[Entries]) -> tuple[float, float]:
        """Milliseconds of a captured decode step, and of the whole of it as the host sees it."""
        batch = decode_batch(entries, CONTEXT)
        self._graphed.forward(batch)
        captured = self._graphs.recorded(len(entries), bool(batch.token_routing.groups))
        device = milliseconds(captured.replay, repeats=60, warm=20)
        return device, wall_milliseconds(lambda: self._graphed.forward(batch).argmax(-1).tolist())

    def base(self) -> None:
        """Base steps, before any adapter is here."""
        print("| base decode step, context 512 | ms | floor | ratio | host sees |\n|---|---:|---:|---:|---:|")
        for rows in ROWS:
            device, host = self._step([()] * rows)
            floor = 1e3 * (self._weight_bytes + rows * CONTEXT * self._token_bytes) / self._rate
            self._base[rows] = device
            self.figures[f"base_{rows}"] = {"ms": device, "floor_ms": floor, "host_ms": host}
            print(f"| {rows} rows | {device:.3f} | {floor:.3f} | {device / floor:.3f} | {host:.2f} |")

    def load_adapters(self) -> None:
        """128 of rank 16 and 8 of rank 64, resident on the device."""
        for slot in range(RANK_64 + 8):
            rank = 64 if slot >= RANK_64 else 16
            adapter = random_adapter(self._served.assembled.layout, rank, self._device)
            self._served.load(slot, adapter)

    def adapted(self) -> None:
        """What adapters add to those steps."""
        print("\n| rows | adapters | rank | added ms | 28 us A r/16 | c | host sees |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
        for rows, adapters, rank in ADAPTED:
            first = RANK_64 if rank == 64 else 0
            device, host = self._step([((first + row % adapters, 1.0),) for row in range(rows)])
            added, slope = device - self._base[rows], SLOPE * adapters * rank / 16
            self.figures[f"added_{rows}x{adapters}r{rank}"] = {"ms": added, "c": added - slope}
            cells = f"{added:.3f} | {slope:.3f} | {added - slope:.3f} | {host:.2f}"
            print(f"| {rows} | {adapters} | {rank} | {cells} |")
        device, _ = self._step([()] * ROWS[0])
        share = device / self._base[ROWS[0]] - 1
        self.figures["base_with_residents"] = share
        print(f"\nbase-only step with {RANK_64 + 8} adapters resident: {100 * share:+.2f} %")

    def prefill(self) -> None:
        """2048 tokens: four prompts, each of its own adapter, or of none."""
        times = {}
        for name, entries in (("base", [()] * 4), ("adapters", [((slot, 1.0),) for slot in range(4)])):
            batch = prompt_batch(entries, CONTEXT)
            times[name] = milliseconds(lambda batch=batch: self._model.forward(batch), repeats=9)  # type: ignore[misc]
        share = times["base"] / times["adapters"]
        self.figures["prefill_2048"] = times | {"share": share}
        base, adapted = times["base"], times["adapters"]
        print(f"\nprefill of 2048 tokens: base {base:.2f} ms, over 4 adapters {adapted:.2f} ms")
        print(f"{100 * share:.1f} % of base")

    def load(self) -> None:
        """An adapter of rank 16 from pinned memory to the device, and what steps feel of it."""
        layout = self._served.assembled.layout
        host = random_adapter(layout, 16, self._device)
        pinned = type(host)(host.index, host.buffer.cpu().pin_memory())
        uploader, pool, slot = CudaUploader(self._device), self._served.pool, SLOTS - 1

        def once() -> None:
            reservation = pool.reserve(slot, "loaded", pinned.nbytes)
            assert reservation is not None
            pool.commit(reservation, uploader.upload(pinned))

        times = []
        for _ in range(9):
            began = time.perf_counter()
            once()
            times.append(1e3 * (time.perf_counter() - began))
            pool.unload(slot)
        alone, beside, loads = self._beside_uploads(uploader, pinned)
        self.figures["load"] = {
            "bytes": pinned.nbytes,
            "ms": sorted(times)[len(times) // 2],
            "step_ms": alone,
            "step_beside_loads_ms": beside,
        }
        print(f"\n{pinned.nbytes / 1e6:.1f} MB from pinned memory to resident: {sorted(times)[4]:.2f} ms")
        print(f"a step of {ROWS[0]} rows beside {loads} loads: {beside:.3f} ms, alone {alone:.3f} ms")
        print(f"longer by {100 * (beside / alone - 1):.1f} %")

    def _beside_uploads(self, uploader: CudaUploader, pinned: Any) -> tuple[float, float, int]:
        """Milliseconds of a step alone and beside one upload after another; how many there were."""
        batch = decode_batch([()] * ROWS[0], CONTEXT)
        self._graphed.forward(batch)
        step = self._graphs.recorded(ROWS[0], False).replay
        alone, done, count = milliseconds(step, repeats=60), threading.Event(), 0

        def upload() -> None:
            nonlocal count
            while not done.is_set():
                uploader.upload(pinned)
                count += 1

        thread = threading.Thread(target=upload)
        thread.start()
        beside = milliseconds(step, repeats=60)
        done.set()
        thread.join()
        return alone, beside, count


def operators(device: torch.device) -> list[dict[str, Any]]:
    """The operators alone: a line for each point, and at how many we are not the fastest."""
    from loraplex.kernels.cupy_launcher import CupyLauncher

    print("\n| site | rows | adapters | rank | ours us | others |\n|---|---:|---:|---:|---:|---|")
    results: list[dict[str, Any]] = []
    slower = 0
    for point, times in compare(CupyLauncher(device), device):
        ours = times.pop(OURS)
        slower += min(times.values()) < ours
        others = ", ".join(f"{name} {time / ours:.2f}" for name, time in times.items())
        shape = f"{point.site} | {point.rows} | {point.adapters} | {point.rank}"
        print(f"| {shape} | {ours:.1f} | {others} |", flush=True)
        results.append(asdict(point) | {"us": {OURS: ours} | times})
    print("\nothers: how many times as long they take")
    print(f"another form is faster at {slower} of {len(results)} points", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default="step,prefill,load,operators")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    device, figures = torch.device("cuda", 0), {}
    for name, found in measure(options.only.split(","), options.layers, device):
        figures[name] = found
        if options.json is not None:
            options.json.write_text(json.dumps(figures, indent=1))
    return 0


def measure(parts: Sequence[str], layers: int, device: torch.device) -> Iterator[tuple[str, Any]]:
    """The figures of these parts by name, as they come."""
    if {"step", "prefill", "load"} & {*parts}:
        bench = Bench(layers, device)
        bench.base()
        bench.load_adapters()
        for part, work in (("step", bench.adapted), ("prefill", bench.prefill), ("load", bench.load)):
            if part in parts:
                work()
                yield from bench.figures.items()
    if "operators" in parts:
        yield "operators", operators(device)


if __name__ == "__main__":
    sys.exit(main())
