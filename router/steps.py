"""A plan becomes a StepPlan and changed state; a StepResult becomes tokens on streams."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..proto import shard_pb2
from .errors import NumericalError
from .group import Group, Step
from .request import FinishReason, TokenEvent, TokenLogprobs
from .scheduler import Chunk, Plan, admission_tokens
from .sequence import Sequence, SequenceState


class ContractBroken(Exception):
    """An answer that does not belong to the plan: nothing of this epoch can be trusted any more."""


@dataclass(slots=True)
class Settled:
    """What one answer did to sequences. `finished` have had their terminal event."""

    tokens: int = 0
    """Delivered, overshoot left out."""
    first_tokens: list[Sequence] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Seconds since the previous token, of rows whose previous token was not in the previous answer."""
    steady: int = 0
    """Rows whose previous token came with the previous answer."""
    finished: list[tuple[Sequence, str]] = field(default_factory=list)
    """With "stop", "length" or an error's code."""
    released: list[Sequence] = field(default_factory=list)
    """Nothing on the shard refers to these any more."""


def apply_plan(plan: Plan, group: Group) -> shard_pb2.StepPlan:
    """Carry the plan out on the group and its sequences; answers the message to send.

    The admitted have left their queues and hold their adapters already.
    """
    for victim in plan.preempt:
        group.end(victim)
        victim.preempted = True
    ending, group.ending = group.ending, []
    group.last_seq += 1
    message = shard_pb2.StepPlan(
        epoch=group.epoch,
        seq=group.last_seq,
        decode_rows=[sequence.row for sequence in plan.decode],
        ends=[row for row, _ in ending],
    )
    _allocate(plan, group, message)
    step = Step(
        group.last_seq,
        {sequence.row: sequence for sequence in plan.decode},
        {},
        [sequence for _, sequence in ending],
        len(plan.decode),
    )
    complete: list[Sequence] = []
    for sequence in plan.decode:
        sequence.computed += 1
        sequence.sampled += 1
        if sequence.sampled == sequence.max_output:
            complete.append(sequence)
    for chunk in plan.chunks:
        message.chunks.append(_chunk(chunk, step, complete))
    group.in_flight.append(step)
    for sequence in complete:
        group.end(sequence)
    return message


def _allocate(plan: Plan, group: Group, message: shard_pb2.StepPlan) -> None:
    """Rows and blocks for the admitted, one block for each row that grows."""
    rows: list[shard_pb2.BlockTableDelta.Row] = []
    for sequence in plan.grow:
        group.grow(sequence, 1)
        rows.append(shard_pb2.BlockTableDelta.Row(row=sequence.row, blocks=sequence.blocks[-1:]))
    for sequence in plan.admit:
        group.start(sequence, admission_tokens(sequence))
        rows.append(shard_pb2.BlockTableDelta.Row(row=sequence.row, blocks=sequence.blocks))
        message.starts.append(_start(sequence, group))
    if rows:
        message.block_tables.add(kv_group=0, rows=rows)


def _chunk(chunk: Chunk, step: Step, complete: list[Sequence]) -> shard_pb2.PromptChunk:
    """Advance the sequence by its chunk, and note which answer belongs to its row."""
    sequence = chunk.sequence
    end = chunk.start + chunk.length
    sequence.computed = end
    (step.sampling if chunk.last else step.prompts)[sequence.row] = sequence
    if chunk.last:
        sequence.sampled += 1
        if sequence.sampled == sequence.max_output:
            complete.append(sequence)
    return shard_pb2.PromptChunk(
        row=sequence.row, start=chunk.start, tokens=sequence.tokens[chunk.start : end], last=chunk.last
    )


def _start(sequence: Sequence, group: Group) -> shard_pb2.RowStart:
    request = sequence.request
    wants_prompt = sequence.prompt_logprobs is not None and not sequence.prompt_logprobs_sent
    start = shard_pb2.RowStart(
        row=sequence.row,
        sampling=_sampling(sequence),
        seed=request.params.seed,
        tenant=request.tenant,
        output=shard_pb2.RowStart.PROMPT_LOGPROBS if wants_prompt else shard_pb2.RowStart.TOKEN,
        prompt_length=sequence.prompt_length,
        prompt_logprobs=(request.params.prompt_logprobs or 0) if wants_prompt else 0,
    )
    for first in sorted({use.start for use in request.adapters}):
        span = start.spans.add(start=first)
        for use in request.adapters:
            if use.start <= first:
                span.entries.add(slot=group.residency.slot(use.key), weight=use.weight)
    return start


def _sampling(sequence: Sequence) -> shard_pb2.SamplingParams:
    params = sequence.request.params
    return shard_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        stop_ids=params.stop_ids,
        min_tokens=params.min_tokens,
        logprobs=params.logprobs,
    )


def settle(result: shard_pb2.StepResult, group: Group, now: float, previous: float) -> Settled:
    """Deliver one answer, or a part of one, and take finished sequences off the group.

    `previous`: when the answer before this one was settled. Raises ContractBroken.
    """
    step = group.in_flight[0] if group.in_flight else None
    if step is None or result.seq != step.seq:
        raise ContractBroken(f"an answer to step {result.seq}, expected {step.seq if step else 'none'}")
    settled = Settled()
    for row in result.rows:
        sequence = _take_answer(row, step)
        if sequence is None or sequence.state is SequenceState.DONE:
            continue
        if row.finish == shard_pb2.NUMERICAL:
            _fail_row(sequence, group, settled)
        elif row.tokens:
            _deliver(sequence, row, group, settled)
            _note_time(sequence, now, previous, settled)
    if result.last:
        group.in_flight.popleft()
        _check_complete(step)
        settled.released = step.ended
    return settled


def _take_answer(row: shard_pb2.RowResult, step: Step) -> Sequence | None:
    """The sequence this row's answer belongs to, with its prompt logprobs taken in; None: no token for it."""
    sampled = bool(row.tokens) or row.finish != shard_pb2.UNFINISHED
    sequence = step.sampling.get(row.row) or step.prompts.get(row.row)
    if sequence is None:
        raise ContractBroken(f"step {step.seq} answers row {row.row}, which it did not run")
    if sequence.prompt_logprobs is not None and sequence.state is not SequenceState.DONE:
        _gather_prompt_logprobs(sequence, row)
    if not sampled:
        return None
    if row.row in step.sampling:
        del step.sampling[row.row]
    elif row.finish != shard_pb2.NUMERICAL:
        raise ContractBroken(f"step {step.seq} answers row {row.row} with a token amid its prompt")
    return sequence


def _check_complete(step: Step) -> None:
    for row, sequence in step.sampling.items():
        if sequence.state is not SequenceState.DONE:
            raise ContractBroken(f"step {step.seq} has no answer for row {row}")
    for sequence in step.ended:
        if sequence.state is SequenceState.LEAVING and not sequence.preempted:
            raise ContractBroken(f"a sequence ended with step {step.seq} before its last token came")


def _deliver(sequence: Sequence, row: shard_pb2.RowResult, group: Group, settled: Settled) -> None:
    params = sequence.request.params
    tokens = tuple(row.tokens)
    sequence.tokens += tokens
    event = TokenEvent(tokens)
    if params.logprobs is not None:
        event.logprobs = [_logprobs(entry) for entry in row.logprobs]
    if sequence.prompt_logprobs is not None and not sequence.prompt_logprobs_sent:
        event.prompt_logprobs = _complete_prompt_logprobs(sequence)
    if row.finish == shard_pb2.STOP_ID:
        event.finish = FinishReason.STOP
    elif sequence.generated >= sequence.max_output:
        event.finish = FinishReason.LENGTH
    settled.tokens += len(tokens)
    sequence.request.stream.put(event)
    if event.finish is not None:
        _finish(sequence, event.finish.value, group, settled)


def _note_time(sequence: Sequence, now: float, previous: float, settled: Settled) -> None:
    if sequence.first_token_at == 0.0:
        sequence.first_token_at = now
        settled.first_tokens.append(sequence)
    elif sequence.last_token_at == previous:
        settled.steady += 1
    else:
        settled.gaps.append(now - sequence.last_token_at)
    sequence.last_token_at = now


def _fail_row(sequence: Sequence, group: Group, settled: Settled) -> None:
    error = NumericalError("The model's output for this request was not finite.")
    sequence.request.stream.put(error)
    _finish(sequence, error.code, group, settled)


def _finish(sequence: Sequence, outcome: str, group: Group, settled: Settled) -> None:
    if sequence.state is SequenceState.RUNNING:
        group.end(sequence)
    sequence.state = SequenceState.DONE
    settled.finished.append((sequence, outcome))


def _logprobs(entry: shard_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(entry.top_ids, entry.top_logprobs, strict=True))
    return TokenLogprobs(entry.logprob, entry.rank, top)


def _gather_prompt_logprobs(sequence: Sequence, row: shard_pb2.RowResult) -> None:
    """Append positions not seen before; after a preemption the shard computes some anew."""
    gathered = sequence.prompt_logprobs
    assert gathered is not None
    for position, entry in enumerate(row.prompt_logprobs, start=row.prompt_start):
        if position > len(gathered):
            raise ContractBroken(f"prompt logprobs of row {row.row} miss position {len(gathered)}")
        if position == len(gathered) < sequence.prompt_length:
            gathered.append(_logprobs(entry))


def _complete_prompt_logprobs(sequence: Sequence) -> list[TokenLogprobs | None] | None:
    gathered = sequence.prompt_logprobs
    if gathered is None or len(gathered) != sequence.prompt_length:
        raise ContractBroken("a first token came before all prompt logprobs")
    sequence.prompt_logprobs_sent = True
    return gathered
