"""From a step plan to flat arrays: one row of tokens, and who they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.ops import Entries, Routing, route
from ..proto import shard_pb2 as pb
from .errors import BadPlan
from .rows import Row, RowTable


@dataclass(frozen=True, slots=True)
class DecodeSegment:
    """The first tokens of the batch: one query token for each of n rows."""

    block_tables: torch.Tensor
    """[n, blocks] int64, padded with the sink block."""
    lengths: torch.Tensor
    """[n] int64: tokens in the cache, this step's included."""


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """Adjacent tokens of one prompt, from position `start` on."""

    first: int
    """Index of the segment's first token in the batch."""
    count: int
    start: int
    blocks: torch.Tensor
    """[blocks] int64: enough to hold start + count tokens."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Prompt tokens whose logprobs are asked for: logits first .. first + count - 1 predict the tokens
    at positions start + 1, start + 2, …"""

    row: Row
    first: int
    count: int
    start: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input to the model. T tokens, L rows of logits."""

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    kv_slots: torch.Tensor
    """[T] int64: block * block_size + offset at which each token's keys and values are stored."""
    decode: DecodeSegment | None
    prompts: tuple[PromptSegment, ...]
    logit_rows: torch.Tensor
    """[L] int64: the tokens whose logits are wanted, ascending."""
    token_routing: Routing
    logit_routing: Routing
    samples: tuple[Row, ...]
    sample_rows: tuple[int, ...]
    """Parallel to samples: the row of logits each one samples from."""
    scored: tuple[Scored, ...]
    row_count: int

    @property
    def adapter_count(self) -> int:
        return len(self.token_routing.slots)


class _Builder:
    """Collects the flat lists of one batch."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.kv_slots: list[int] = []
        self.entries: list[Entries] = []
        self.logit_rows: list[int] = []
        self.samples: list[Row] = []
        self.sample_rows: list[int] = []
        self.scored: list[Scored] = []

    def add_tokens(self, row: Row, start: int, tokens: Sequence[int]) -> None:
        size = self._block_size
        if start + len(tokens) > len(row.blocks) * size:
            raise BadPlan(
                f"row {row.id} has {len(row.blocks)} blocks, too few for position {start + len(tokens) - 1}"
            )
        positions = range(start, start + len(tokens))
        self.token_ids.extend(tokens)
        self.positions.extend(positions)
        self.kv_slots.extend(row.blocks[p // size] * size + p % size for p in positions)
        self.entries.extend(row.entries_between(start, start + len(tokens)))

    def sample_from_last(self, row: Row) -> None:
        self._want_logits(len(self.token_ids) - 1)
        self.samples.append(row)
        self.sample_rows.append(len(self.logit_rows) - 1)

    def score(self, row: Row, start: int, count: int) -> None:
        """Ask for the logits of the last `count` tokens added, the first of them at position `start`."""
        self.scored.append(Scored(row, len(self.logit_rows), count, start))
        for index in range(len(self.token_ids) - count, len(self.token_ids)):
            self._want_logits(index)

    def _want_logits(self, index: int) -> None:
        if not self.logit_rows or self.logit_rows[-1] != index:
            self.logit_rows.append(index)


def build_batch(plan: pb.StepPlan, rows: RowTable, *, block_size: int, device: torch.device) -> Batch:
    """Flatten a plan whose starts, block tables and ends have been applied to `rows`.

    Appends the chunks' tokens to their rows. Decode rows that are masked take no part. Rows with the
    same adapters are laid side by side, so that their tokens form one slice.
    """
    builder = _Builder(block_size)
    decoding = [row for row in map(rows.__getitem__, plan.decode_rows) if not row.masked]
    decoding.sort(key=Row.last_entries)
    for row in decoding:
        builder.add_tokens(row, len(row.tokens) - 1, row.tokens[-1:])
        builder.sample_from_last(row)
    prompts = _add_chunks(builder, plan.chunks, rows, device)

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        token_ids=tensor(builder.token_ids),
        positions=tensor(builder.positions),
        kv_slots=tensor(builder.kv_slots),
        decode=_decode_segment(decoding, block_size, device) if decoding else None,
        prompts=tuple(prompts),
        logit_rows=tensor(builder.logit_rows),
        token_routing=route(builder.entries),
        logit_routing=route([builder.entries[index] for index in builder.logit_rows]),
        samples=tuple(builder.samples),
        sample_rows=tuple(builder.sample_rows),
        scored=tuple(builder.scored),
        row_count=len(decoding) + len(prompts),
    )


def _add_chunks(
    builder: _Builder, chunks: Sequence[pb.PromptChunk], rows: RowTable, device: torch.device
) -> list[PromptSegment]:
    segments = []
    for chunk in sorted(chunks, key=lambda chunk: rows[chunk.row].last_entries()):
        row = rows[chunk.row]
        if chunk.start != len(row.tokens):
            raise BadPlan(f"row {row.id}: a chunk starts at {chunk.start}, expected {len(row.tokens)}")
        tokens = list(chunk.tokens)
        first = len(builder.token_ids)
        row.tokens.extend(tokens)
        builder.add_tokens(row, chunk.start, tokens)
        if row.scores_prompt:
            builder.score(row, chunk.start, len(tokens))
        if chunk.last:
            builder.sample_from_last(row)
        blocks = row.blocks[: -(-len(row.tokens) // builder._block_size)]
        table = torch.tensor(blocks, dtype=torch.int64, device=device)
        segments.append(PromptSegment(first, len(tokens), chunk.start, table))
    return segments


def _decode_segment(decoding: list[Row], block_size: int, device: torch.device) -> DecodeSegment:
    lengths = [len(row.tokens) for row in decoding]
    width = -(-max(lengths) // block_size)
    tables = [(row.blocks + [0] * width)[:width] for row in decoding]
    return DecodeSegment(
        torch.tensor(tables, dtype=torch.int64, device=device),
        torch.tensor(lengths, dtype=torch.int64, device=device),
    )
