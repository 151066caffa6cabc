"""One step: apply the plan, run the forward pass, sample. Everything here runs on the device thread."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..proto import shard_pb2 as pb
from .batch import Batch, Scored, build_batch
from .device import on_device
from .errors import BadPlan
from .kv import KvCache
from .model import StepModel
from .parallel.sampling import GroupSampler
from .rows import Row, RowTable
from .sampling import Sampled, Sampler, SampleRow, TokenLogprobs


class StepEngine:
    """Owns the rows and, through them, the cache.

    Decides nothing: a plan that breaks the contract is a BadPlan.
    """

    def __init__(
        self,
        model: StepModel,
        kv: KvCache,
        rows: RowTable,
        sampler: Sampler | GroupSampler,
        *,
        slot_is_resident: Callable[[int], bool],
    ) -> None:
        self._model = model
        self._kv = kv
        self._rows = rows
        self._sampler = sampler
        self._slot_is_resident = slot_is_resident
        self._finished_at: float | None = None

    def reset(self) -> None:
        """Forget every row: a new epoch begins."""
        self._rows.clear()
        self._finished_at = None

    def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """Run one step and answer its tokens. Changes the rows and the cache."""
        began = time.perf_counter()
        idle = 0.0 if self._finished_at is None else began - self._finished_at
        self._apply(plan)
        batch = build_batch(plan, self._rows, block_size=self._kv.block_size)
        result = pb.StepResult(epoch=plan.epoch, seq=plan.seq, last=True)
        if batch.row_count:
            logits = self._model.forward(batch)
            self._score_prompts(batch, logits, result)
            self._sample(batch, logits, result)
        result.row_count = batch.row_count
        result.adapter_count = batch.adapter_count
        self._finished_at = time.perf_counter()
        result.device_micros = int((self._finished_at - began) * 1e6)
        result.idle_micros = int(idle * 1e6)
        return result

    def _apply(self, plan: pb.StepPlan) -> None:
        for row_id in plan.ends:
            self._rows.end(row_id)
        for copy in plan.copies:
            self._kv.copy_block(copy.source, copy.target)
        for start in plan.starts:
            row = Row.from_proto(start)
            for _, entries in row.spans:
                for slot, _ in entries:
                    if not self._slot_is_resident(slot):
                        raise BadPlan(f"row {row.id} names slot {slot}, which holds no adapter")
            self._rows.start(row)
        for delta in plan.block_tables:
            for entry in delta.rows:
                self._rows.extend(entry.row, entry.blocks)

    def _sample(self, batch: Batch, logits: torch.Tensor, result: pb.StepResult) -> None:
        if not batch.samples:
            return
        picked = logits
        if len(batch.samples) != logits.shape[0]:
            picked = logits[on_device(torch.tensor(batch.sample_rows), logits.device)]
        drawn = self._sampler.sample(picked, [_sample_row(row) for row in batch.samples])
        for row, sampled in zip(batch.samples, drawn, strict=True):
            _record(row, sampled, result)

    def _score_prompts(self, batch: Batch, logits: torch.Tensor, result: pb.StepResult) -> None:
        for scored in batch.scored:
            rows = logits[scored.first : scored.first + scored.count]
            answer = result.rows.add(row=scored.row.id)
            answer.prompt_start, targets, predictions = _predictions(scored, rows)
            lines = self._sampler.prompt_logprobs(predictions, targets, scored.row.prompt_logprobs or 0)
            answer.prompt_logprobs.extend(_logprobs_proto(line) for line in lines)


def _sample_row(row: Row) -> SampleRow:
    if not row.sampling.needs_history:
        return SampleRow(row.sampling, row.output_index)
    prompt, output = row.tokens[: row.prompt_length], row.tokens[row.prompt_length :]
    return SampleRow(row.sampling, row.output_index, prompt, output)


def _record(row: Row, sampled: Sampled, result: pb.StepResult) -> None:
    """Append a sampled token to its row and to the result; mask the row if it ends here."""
    answer = result.rows.add(row=row.id)
    if sampled.token is None:
        row.masked = True
        answer.finish = pb.NUMERICAL
        return
    row.tokens.append(sampled.token)
    answer.tokens.append(sampled.token)
    if sampled.logprobs is not None:
        answer.logprobs.append(_logprobs_proto(sampled.logprobs))
    if sampled.token in row.sampling.stop_ids:
        row.masked = True
        answer.finish = pb.STOP_ID


def _predictions(scored: Scored, logits: torch.Tensor) -> tuple[int, list[int], torch.Tensor]:
    """The prompt tokens whose predictions are at hand: first position, tokens, logits [tokens, vocab].

    A chunk's last logits predict a token of the next chunk, so they are held back in the row. How wide the
    logits are depends on who else is in a step; a token that has no logit has the logit minus infinity.
    """
    row, end = scored.row, scored.start + scored.count
    first = scored.start + 1
    if row.held_logits is not None:
        width = max(len(row.held_logits), logits.shape[1])
        logits = torch.cat([_widen(row.held_logits[None], width), _widen(logits, width)])
        first = scored.start
    row.held_logits = logits[-1].clone()
    targets = row.tokens[first : min(end, row.prompt_length)]
    logits = logits[: len(targets)]
    return first, targets, _widen(logits, max(targets, default=0) + 1)


def _widen(logits: torch.Tensor, width: int) -> torch.Tensor:
    """Logits [rows, at least `width`]."""
    return F.pad(logits, (0, max(0, width - logits.shape[1])), value=-torch.inf)


def _logprobs_proto(line: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=line.logprob, rank=line.rank, top_ids=line.top_ids, top_logprobs=line.top_logprobs
    )
