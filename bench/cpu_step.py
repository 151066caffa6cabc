"""How long is a step on a CPU, and where does its time go?

Runs a shard's own engine, without sockets: rows of one model, each with an adapter of its own in turn.
Prompts go into one step, decode steps follow. Prints a table, and with --profile the pieces of a decode step.

    python -m bench.cpu_step MODEL [--adapters DIR…] [--rows N…] [--context N] [--threads N] [--profile]
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from loraplex.kernels import native_decoder
from loraplex.kernels.native_decoder import NativeDecoderOps
from loraplex.kernels.native_lora import NativeDelta, NativeLoraOps
from loraplex.proto import shard_pb2 as pb
from loraplex.shard import engine
from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.pack import Packer
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import read_packed
from loraplex.shard.attention_native import NativeAttention
from loraplex.shard.config import ShardConfig
from loraplex.shard.decoder_native import NativeLayers
from loraplex.shard.engine import StepEngine
from loraplex.shard.linear import DenseWeight
from loraplex.shard.load import load_model
from loraplex.shard.packed_weight import packed
from loraplex.shard.rows import RowTable
from loraplex.shard.sampling import Sampler

STEPS = 32


@dataclass(frozen=True, slots=True)
class Times:
    """Of some rows with some adapters. Milliseconds."""

    rows: int
    adapters: int
    prefill: float
    decode_best: float
    decode_median: float

    def __str__(self) -> str:
        cells = (f"{self.prefill:.1f}", f"{self.decode_best:.2f}", f"{self.decode_median:.2f}")
        return f"| {self.rows} | {self.adapters} | " + " | ".join(cells) + " |"


class Shard:
    """One model's engine, with adapters in slots 0, 1, … of its pool."""

    def __init__(self, model: str, adapters: Sequence[str]) -> None:
        slots = max(1, len(adapters))
        config = ShardConfig(model=model, device="cpu", max_adapters=slots, adapter_memory=1 << 40)
        loaded = load_model(config)
        self._pool = AdapterPool(loaded.sites, slots=slots, budget=config.adapter_memory)
        with tempfile.TemporaryDirectory() as folder:
            for slot, directory in enumerate(adapters):
                target = Path(folder, f"{slot}.packed")
                packed = Packer(loaded.layout, FileLimits()).pack(Path(directory), target, loaded.base)
                self._pool.load(slot, packed.digest, read_packed(target, packed.file.index, pin=False))
        self._block_size = loaded.kv.block_size
        self._engine = StepEngine(
            loaded.model,
            loaded.kv,
            RowTable(config.max_num_seqs, -(-loaded.max_model_len // self._block_size)),
            Sampler(),
            slot_is_resident=lambda slot: self._pool.digest_of(slot) is not None,
        )
        self._sequence = itertools.count(1)

    def _step(self, plan: pb.StepPlan) -> float:
        """Run a plan; its milliseconds."""
        plan.epoch, plan.seq = 1, next(self._sequence)
        began = time.perf_counter()
        self._engine.run(plan)
        return 1e3 * (time.perf_counter() - began)

    def begin(self, rows: int, adapters: int, context: int) -> float:
        """Start rows with prompts of so many tokens; milliseconds of that step."""
        self._engine.reset()
        blocks = -(-(context + 2 * STEPS) // self._block_size)
        plan, table = pb.StepPlan(), pb.BlockTableDelta()
        for row in range(rows):
            slot = [pb.AdapterEntry(slot=row % adapters, weight=1.0)] if adapters else []
            spans = [pb.AdapterSpan(entries=slot)] if slot else []
            plan.starts.add(row=row, prompt_length=context, spans=spans)
            table.rows.add(row=row, blocks=range(1 + row * blocks, 1 + (row + 1) * blocks))
            tokens = [10 + (7 * row + index) % 500 for index in range(context)]
            plan.chunks.add(row=row, start=0, tokens=tokens, last=True)
        plan.block_tables.append(table)
        return self._step(plan)

    def decode(self, rows: int) -> float:
        """One token for each row; milliseconds."""
        return self._step(pb.StepPlan(decode_rows=range(rows)))

    def measure(self, rows: int, adapters: int, context: int) -> Times:
        prefill = min(self.begin(rows, adapters, context) for _ in range(3))
        decode = [self.decode(rows) for _ in range(STEPS)]
        return Times(rows, adapters, prefill, min(decode), median(decode))


PIECES: Mapping[str, tuple[Any, str]] = {
    "products with the base's weights": (
        type(packed(DenseWeight(torch.zeros(32, 32, dtype=torch.bfloat16), None))),
        "apply",
    ),
    "adapters": (NativeDelta, "add_to"),
    "adapters' rows to tasks": (NativeLoraOps, "place"),
    "attention": (NativeAttention, "attend"),
    "norms": (native_decoder, "_norm"),
    "gates": (NativeDecoderOps, "silu_mul"),
    "positions and cache": (NativeDecoderOps, "rope_kv"),
    "plan to batch": (engine, "build_batch"),
    "sampling": (Sampler, "sample"),
}
"""What the time of a step is told apart by: who computes it, and the name of what is called."""


@contextmanager
def timed(pieces: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Within it, the seconds spent in each piece add up."""
    spent = dict.fromkeys(pieces, 0.0)

    def timing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return timed_call

    with ExitStack() as stack:
        for name, (owner, attribute) in pieces.items():
            replacement = timing(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, replacement))
        yield spent


def print_profile(shard: Shard, rows: int, adapters: int, context: int) -> None:
    """Where the time of a decode step goes: milliseconds of each piece, and of all between them. For this the
    layers are run piece by piece, not in one call."""
    shard.begin(rows, adapters, context)
    with timed(PIECES) as spent, patch.object(NativeLayers, "run", lambda *_: None):
        total = sum(shard.decode(rows) for _ in range(STEPS)) / STEPS
    pieces = {name: 1e3 * seconds / STEPS for name, seconds in spent.items()}
    pieces["everything between"] = total - sum(pieces.values())
    print(f"\n| a decode step of {rows} rows, {adapters} adapters | ms | share |\n|---|---:|---:|")
    for name, milliseconds in (*pieces.items(), ("in all", total)):
        print(f"| {name} | {milliseconds:.2f} | {milliseconds / total:.0%} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapters", nargs="*", default=[])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shard = Shard(options.model, options.adapters)
    print("| rows | adapters | prefill ms | decode ms, best | median |\n|---:|---:|---:|---:|---:|")
    for rows in options.rows:
        for adapters in sorted({0, min(rows, len(options.adapters))}):
            print(shard.measure(rows, adapters, options.context), flush=True)
            if options.profile:
                print_profile(shard, rows, adapters, options.context)


if __name__ == "__main__":
    main()
