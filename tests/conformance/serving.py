"""A shard without sockets: loaded as a shard loads, adapters packed as its worker packs them, and plans."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AttentionInterface

from loraplex.kernels.load import Backend
from loraplex.proto import shard_pb2 as pb
from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.pack import PackedDirectory, Packer
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import PackedAdapter, read_packed
from loraplex.shard.attention import NAME, register
from loraplex.shard.config import ShardConfig
from loraplex.shard.engine import StepEngine
from loraplex.shard.graphs import with_graphs
from loraplex.shard.load import load_model
from loraplex.shard.rows import RowTable
from loraplex.shard.sampling import Sampler

TOKENS = 8
"""Greedy tokens of every answer."""
BLOCK = 4
SLOTS = 32
MAX_RANK = 64
_FIRST_CHUNK = 5
"""Prompts come in two chunks, so that most rows begin and end in the middle of a step."""
_WHOLE = 1000
"""Alternatives asked for beside each token: all there are."""


@dataclass(frozen=True)
class Use:
    """An adapter of a row."""

    slot: int
    weight: float = 1.0
    start: int = 0
    """Token position from which it applies."""


@dataclass(frozen=True)
class Ask:
    """One row of a batch."""

    prompt: tuple[int, ...]
    uses: tuple[Use, ...] = ()

    def spans(self) -> list[pb.AdapterSpan]:
        """From each position at which an adapter begins: all that have begun by then."""
        return [
            pb.AdapterSpan(
                start=start,
                entries=[
                    pb.AdapterEntry(slot=use.slot, weight=use.weight)
                    for use in self.uses
                    if use.start <= start
                ],
            )
            for start in sorted({use.start for use in self.uses})
        ]


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: torch.Tensor
    """fp32 [len(prompt) - 1 + TOKENS, vocabulary]: what follows each token but the last."""


class Served:
    """One base with its pool and engine."""

    def __init__(
        self,
        directory: Path,
        spool: Path,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        backend: Backend | None = None,
    ) -> None:
        config = ShardConfig(
            model=str(directory),
            device=device,
            dtype=dtype,
            kv_memory=1 << 22,
            block_size=BLOCK,
            max_rank=MAX_RANK,
            max_adapters=SLOTS,
            max_num_seqs=SLOTS,
        )
        loaded = load_model(config, backend=backend)
        self._attention = AttentionInterface()[NAME]
        self._spool = spool
        self._device = loaded.device
        self._names = itertools.count()
        self.layout = loaded.layout
        self.base_tensors = loaded.base
        self.vocab_size = loaded.vocab_size
        self.pool = AdapterPool(loaded.sites, slots=SLOTS, budget=1 << 28)
        self._engine = StepEngine(
            with_graphs(loaded.model, loaded.graphs, self.pool.are_plain),
            loaded.kv,
            RowTable(SLOTS, 64),
            Sampler(),
            slot_is_resident=lambda slot: self.pool.digest_of(slot) is not None,
        )
        self._sequence = itertools.count(1)
        self.adapters_in_step = 0
        """The most that any step of the newest answer held."""

    def pack(self, directory: Path, *, max_rank: int | None = None) -> PackedDirectory:
        """Pack an adapter into the spool, as the worker does. Raises what the packer raises."""
        layout = replace(self.layout, max_rank=max_rank or self.layout.max_rank)
        target = self._spool / f"{next(self._names)}.packed"
        return Packer(layout, FileLimits()).pack(directory, target, self.base_tensors)

    def spooled(self) -> list[Path]:
        """Packed files that are not loaded yet."""
        return list(self._spool.iterdir())

    def read(self, packed: PackedDirectory, *, pin: bool = False) -> PackedAdapter:
        """A packed adapter in host memory; its file is gone afterwards."""
        path = Path(packed.file.path)
        adapter = read_packed(path, packed.file.index, pin=pin)
        path.unlink()
        return adapter

    def load(self, slot: int, packed: PackedDirectory) -> None:
        """Make a packed adapter resident; its file is gone afterwards."""
        self.pool.load(slot, packed.digest, self.read(packed).to(self._device))

    @contextlib.contextmanager
    def resident(self, packed: Sequence[PackedDirectory], *, first: int = 0) -> Iterator[list[int]]:
        """The adapters in slots `first`, `first` + 1, … for as long as the context lasts."""
        slots = list(range(first, first + len(packed)))
        try:
            for slot, adapter in zip(slots, packed, strict=True):
                self.load(slot, adapter)
            yield slots
        finally:
            for slot in slots:
                self.pool.unload(slot)

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """All rows in one batch: prompts in two chunks, then greedy tokens."""
        register(self._attention)  # of several models in this process the one that is asked
        lines: list[list[pb.TokenLogprobs]] = [[] for _ in asks]
        tokens: list[list[int]] = [[] for _ in asks]
        self.adapters_in_step = 0
        for plan in self._plans(asks):
            result = self._engine.run(plan)
            self.adapters_in_step = max(self.adapters_in_step, result.adapter_count)
            for row in result.rows:
                lines[row.row] += [*row.prompt_logprobs, *row.logprobs]
                tokens[row.row] += row.tokens
        return [Answer(picked, _matrix(rows)) for picked, rows in zip(tokens, lines, strict=True)]

    def _plans(self, asks: Sequence[Ask]) -> Iterator[pb.StepPlan]:
        start = self._plan()
        blocks = itertools.count(1)
        delta = start.block_tables.add()
        for row, ask in enumerate(asks):
            start.starts.append(_row_start(row, ask))
            needed = -(-(len(ask.prompt) + TOKENS) // BLOCK)
            delta.rows.add(row=row, blocks=list(itertools.islice(blocks, needed)))
            start.chunks.add(row=row, start=0, tokens=ask.prompt[:_FIRST_CHUNK])
        yield start
        rest = self._plan()
        for row, ask in enumerate(asks):
            rest.chunks.add(row=row, start=_FIRST_CHUNK, tokens=ask.prompt[_FIRST_CHUNK:], last=True)
        yield rest
        for _ in range(TOKENS - 1):
            decode = self._plan()
            decode.decode_rows.extend(range(len(asks)))
            yield decode
        farewell = self._plan()
        farewell.ends.extend(range(len(asks)))
        yield farewell

    def _plan(self) -> pb.StepPlan:
        return pb.StepPlan(epoch=1, seq=next(self._sequence))


def _row_start(row: int, ask: Ask) -> pb.RowStart:
    return pb.RowStart(
        row=row,
        sampling=pb.SamplingParams(top_p=1.0, repetition_penalty=1.0, logprobs=_WHOLE),
        output=pb.RowStart.PROMPT_LOGPROBS,
        prompt_length=len(ask.prompt),
        prompt_logprobs=_WHOLE,
        spans=ask.spans(),
    )


def _matrix(lines: Sequence[pb.TokenLogprobs]) -> torch.Tensor:
    """Logprobs by token id; minus infinity where a token was not named."""
    width = 1 + max(max(line.top_ids) for line in lines)
    matrix = torch.full((len(lines), width), float("-inf"))
    for row, line in zip(matrix, lines, strict=True):
        row[torch.tensor(line.top_ids)] = torch.tensor(line.top_logprobs)
    return matrix
