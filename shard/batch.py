"""From a step plan to flat arrays: one row of tokens, and who they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..kernels.ops import Entries, Routing, route
from ..proto import shard_pb2 as pb
from .device import send
from .errors import BadPlan
from .rows import Row, RowTable

_Ids = np.ndarray[Any, np.dtype[np.int64]]
_Blocks = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class DecodeSegment:
    """The first tokens of the batch: one query token for each of n rows."""

    block_tables: torch.Tensor
    """[n, blocks] int32, padded with the sink block."""
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

    def to(self, device: torch.device) -> Batch:
        """This batch with its tensors on a device; the routings stay as they are."""
        if device.type == "cpu":
            return self
        decode = () if self.decode is None else (self.decode.block_tables, self.decode.lengths)
        blocks = [prompt.blocks for prompt in self.prompts]
        flat = (self.token_ids, self.positions, self.kv_slots, self.logit_rows, *decode, *blocks)
        token_ids, positions, kv_slots, logit_rows, *rest = send(flat, device)
        segments = rest[len(decode) :]
        return replace(
            self,
            token_ids=token_ids,
            positions=positions,
            kv_slots=kv_slots,
            decode=DecodeSegment(rest[0], rest[1]) if decode else None,
            prompts=tuple(
                replace(prompt, blocks=own) for prompt, own in zip(self.prompts, segments, strict=True)
            ),
            logit_rows=logit_rows,
        )


def build_batch(plan: pb.StepPlan, rows: RowTable, *, block_size: int) -> Batch:
    """Flatten a plan whose starts, block tables and ends have been applied to `rows`. Tensors are on the CPU.

    Appends the chunks' tokens to their rows. Decode rows that are masked take no part. Rows with the
    same adapters are laid side by side, so that their tokens form one slice.
    """
    builder = _Builder(rows, block_size)
    decoding = [row for row in map(rows.__getitem__, plan.decode_rows) if not row.masked]
    decoding.sort(key=Row.last_entries)
    decode = builder.add_decode(decoding) if decoding else None
    chunks = [(rows[chunk.row], chunk) for chunk in plan.chunks]
    chunks.sort(key=lambda pair: pair[0].last_entries())
    prompts = tuple(builder.add_chunk(row, chunk) for row, chunk in chunks)
    return builder.batch(decode, prompts)


class _Builder:
    """Collects the flat arrays of one batch: the decode rows at once, then chunk by chunk."""

    def __init__(self, rows: RowTable, block_size: int) -> None:
        self._tables = rows.block_tables
        self._block_size = block_size
        self._count = 0
        self._token_ids: list[list[int]] = []
        self._positions: list[_Ids] = []
        self._kv_slots: list[_Ids] = []
        self._entries: list[Entries] = []
        self._logit_rows: list[int] = []
        self._samples: list[Row] = []
        self._sample_rows: list[int] = []
        self._scored: list[Scored] = []

    def add_decode(self, decoding: list[Row]) -> DecodeSegment:
        """The newest token of each row; every one of them is sampled from."""
        lengths = np.array([len(row.tokens) for row in decoding])
        lines = np.array([row.id for row in decoding])
        self._check_room(decoding, lengths)
        positions = lengths - 1
        blocks = self._tables[lines, positions // self._block_size]
        self._append([row.tokens[-1] for row in decoding], positions, blocks)
        self._entries += [row.last_entries() for row in decoding]
        self._logit_rows += range(len(decoding))
        self._samples += decoding
        self._sample_rows += range(len(decoding))
        width = -(-int(lengths.max()) // self._block_size)
        return DecodeSegment(
            self._tensor(self._tables[lines, :width].astype(np.int32)), self._tensor(lengths)
        )

    def add_chunk(self, row: Row, chunk: pb.PromptChunk) -> PromptSegment:
        """The next tokens of a prompt, which become the row's."""
        if chunk.start != len(row.tokens):
            raise BadPlan(f"row {row.id}: a chunk starts at {chunk.start}, expected {len(row.tokens)}")
        tokens = list(chunk.tokens)
        row.tokens += tokens
        first, end = self._count, len(row.tokens)
        self._check_room([row], [end])
        positions = np.arange(chunk.start, end)
        table = self._tables[row.id]
        self._append(tokens, positions, table[positions // self._block_size])
        self._entries += row.entries_between(chunk.start, end)
        if row.scores_prompt:
            self._scored.append(Scored(row, len(self._logit_rows), len(tokens), chunk.start))
            self._logit_rows += range(first, self._count)
        if chunk.last:
            if not row.scores_prompt:
                self._logit_rows.append(self._count - 1)
            self._samples.append(row)
            self._sample_rows.append(len(self._logit_rows) - 1)
        used = table[: -(-end // self._block_size)].copy()
        return PromptSegment(first, len(tokens), chunk.start, self._tensor(used))

    def batch(self, decode: DecodeSegment | None, prompts: tuple[PromptSegment, ...]) -> Batch:
        """Everything added so far."""
        decode_rows = 0 if decode is None else len(decode.lengths)
        routing = route(self._entries, decode_rows=decode_rows)
        logit_entries = [self._entries[index] for index in self._logit_rows]
        return Batch(
            token_ids=self._flat([np.array(tokens, dtype=np.int64) for tokens in self._token_ids]),
            positions=self._flat(self._positions),
            kv_slots=self._flat(self._kv_slots),
            decode=decode,
            prompts=prompts,
            logit_rows=self._tensor(np.array(self._logit_rows, dtype=np.int64)),
            token_routing=routing,
            logit_routing=route(logit_entries, decode_rows=len(logit_entries)) if prompts else routing,
            samples=tuple(self._samples),
            sample_rows=tuple(self._sample_rows),
            scored=tuple(self._scored),
            row_count=decode_rows + len(prompts),
        )

    def _append(self, tokens: list[int], positions: _Ids, blocks: _Ids) -> None:
        self._token_ids.append(tokens)
        self._positions.append(positions)
        self._kv_slots.append(blocks * self._block_size + positions % self._block_size)
        self._count += len(tokens)

    def _check_room(self, rows: Sequence[Row], lengths: Iterable[int]) -> None:
        for row, length in zip(rows, lengths, strict=True):
            if length > row.block_count * self._block_size:
                raise BadPlan(f"row {row.id} has {row.block_count} blocks, too few for position {length - 1}")

    def _flat(self, parts: list[_Ids]) -> torch.Tensor:
        return self._tensor(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))

    def _tensor(self, values: _Ids | _Blocks) -> torch.Tensor:
        return torch.from_numpy(values)
