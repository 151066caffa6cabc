"""One rank of a group, without a router: loads a model and adapters, runs fixed steps, tells what came of it.

One job after another: a line of JSON each on standard input, and one on standard output.

    python -m tests.shard.parallel.rank_main RANK
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from loraplex.proto import shard_pb2 as pb
from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.layout import AdapterLayout
from loraplex.shard.adapters.norms import GroupNorms
from loraplex.shard.adapters.pack import Packer
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import PackedAdapter, read_packed
from loraplex.shard.config import ShardConfig
from loraplex.shard.engine import StepEngine
from loraplex.shard.load import LoadedModel, load_model
from loraplex.shard.parallel.ranks import Alone, ProcessGroup
from loraplex.shard.parallel.sampling import GroupSampler
from loraplex.shard.rows import RowTable
from loraplex.shard.sampling import Sampler

from ..dense import packed
from ..test_served_changes import of_every_kind, resized


@dataclass(frozen=True)
class Job:
    """What a group does. Row i has the prompt i and the adapter i, if there is one."""

    model: str
    prompts: Sequence[Sequence[int]]
    adapters: Sequence[str | None]
    """Directories, or the names of adapters that `made` makes; None: the base."""
    output_tokens: int = 8
    size: int = 1
    master: str = ""
    dtype: str = "float32"


def made(name: str, layout: AdapterLayout) -> PackedAdapter | None:
    """`every:N`: an adapter that makes the Nth kind of change; `vocabulary:N`: one that knows N token ids."""
    kind, _, number = name.partition(":")
    draw = np.random.default_rng(3)
    if kind == "every":
        return packed(layout, of_every_kind(layout, draw)[int(number)])
    if kind == "vocabulary":
        return packed(layout, resized(layout, draw, int(number), 3))
    return None


@dataclass
class Done:
    """What one rank has to tell."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    """Of each prompt's tokens but the first; of rank 0 alone."""
    prefill_calls: dict[str, int] = field(default_factory=dict)
    decode_calls: dict[str, int] = field(default_factory=dict)
    """Collectives of the first step and of the second."""
    weight_bytes: int = 0
    adapter_bytes: list[int] = field(default_factory=list)
    layers: int = 0


class Runner:
    """A loaded rank and its steps."""

    def __init__(self, job: Job, rank: int) -> None:
        config = ShardConfig(
            model=job.model,
            device="cpu",
            dtype=job.dtype,
            kv_memory=4 << 20,
            max_adapters=16,
            max_num_seqs=16,
            rank=rank,
            world_size=job.size,
            master=job.master,
        )
        self.loaded: LoadedModel = load_model(config)
        self._job = job
        self._pool = AdapterPool(self.loaded.sites, slots=16, budget=1 << 30)
        self.bytes: list[int] = []
        self._slots = {name: slot for slot, name in enumerate(dict.fromkeys(filter(None, job.adapters)))}
        for name, slot in self._slots.items():
            adapter = made(name, self.loaded.layout) or self._read(name)
            self._pool.load(slot, name, adapter)
            self.bytes.append(adapter.nbytes)
        ranks = self.loaded.ranks
        self._engine = StepEngine(
            self.loaded.model,
            self.loaded.kv,
            RowTable(16, -(-self.loaded.max_model_len // self.loaded.kv.block_size)),
            Sampler() if ranks.size == 1 else GroupSampler(Sampler(), ranks),
            slot_is_resident=lambda slot: self._pool.digest_of(slot) is not None,
        )

    def _read(self, directory: str) -> PackedAdapter:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "packed")
            packer = Packer(self.loaded.layout, FileLimits())
            packed = packer.pack(Path(directory), target, self.loaded.base)
            adapter, ranks = read_packed(target, packed.file.index, pin=False), self.loaded.ranks
        if not isinstance(ranks, ProcessGroup):
            return adapter
        return asyncio.run(GroupNorms(ranks.rank, ranks.size, ranks.board).complete(packed.digest, adapter))

    def run(self) -> Done:
        rows = range(len(self._job.prompts))
        prefill, prefill_calls = self._counted(self._prefill())
        done = Done([[] for _ in rows], [[] for _ in rows])
        for row in prefill.rows:
            done.tokens[row.row] += row.tokens
            done.logprobs[row.row] += [entry.logprob for entry in row.prompt_logprobs]
        calls: dict[str, int] = {}
        for step in range(1, self._job.output_tokens):
            result, calls = self._counted(pb.StepPlan(epoch=1, seq=1 + step, decode_rows=rows))
            for row in result.rows:
                done.tokens[row.row] += row.tokens
        done.prefill_calls, done.decode_calls = prefill_calls, calls
        done.weight_bytes, done.adapter_bytes = self.loaded.weight_bytes, self.bytes
        done.layers = len(self.loaded.kv.layers)
        return done

    def _prefill(self) -> pb.StepPlan:
        plan, size = pb.StepPlan(epoch=1, seq=1), self.loaded.kv.block_size
        table, free = pb.BlockTableDelta(), 1
        for row, (prompt, adapter) in enumerate(zip(self._job.prompts, self._job.adapters, strict=True)):
            blocks = -(-(len(prompt) + self._job.output_tokens) // size)
            entries = [] if adapter is None else [pb.AdapterEntry(slot=self._slots[adapter], weight=1.0)]
            plan.starts.add(
                row=row,
                prompt_length=len(prompt),
                spans=[pb.AdapterSpan(entries=entries)] if entries else [],
                output=pb.RowStart.PROMPT_LOGPROBS,
            )
            table.rows.add(row=row, blocks=range(free, free + blocks))
            plan.chunks.add(row=row, start=0, tokens=prompt, last=True)
            free += blocks
        plan.block_tables.append(table)
        return plan

    def _counted(self, plan: pb.StepPlan) -> tuple[pb.StepResult, dict[str, int]]:
        """Run a plan; its result and its collectives."""
        ranks: Any = self.loaded.ranks
        if isinstance(ranks, Alone):
            return self._engine.run(plan), {}
        assert isinstance(ranks, ProcessGroup)
        ranks.calls.clear()
        result = self._engine.run(plan)
        return result, dict(ranks.calls)


def main(rank: int) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        print(json.dumps(asdict(Runner(job, rank).run())), flush=True)
        if job.size > 1:
            dist.barrier()  # a rank that leaves takes the connections of those with it that are still busy
            dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
