"""The flat arrays of a step."""

from __future__ import annotations

import pytest
import torch

from loraplex.proto import shard_pb2 as pb
from loraplex.shard import batch as batches
from loraplex.shard.batch import Batch, build_batch
from loraplex.shard.device import send
from loraplex.shard.errors import BadPlan
from loraplex.shard.rows import Row, RowTable

BLOCK = 4


def start(
    rows: RowTable, row_id: int, tokens: int, blocks: list[int], *, slot: int | None = None, **more: object
) -> Row:
    proto = pb.RowStart(row=row_id, prompt_length=tokens, **more)  # type: ignore[arg-type]
    if slot is not None:
        proto.spans.add(entries=[pb.AdapterEntry(slot=slot, weight=1.0)])
    row = Row.from_proto(proto)
    rows.start(row)
    rows.extend(row_id, blocks)
    return row


def build(plan: pb.StepPlan, rows: RowTable) -> Batch:
    return build_batch(plan, rows, block_size=BLOCK)


def test_decode_rows_come_first_and_lie_beside_rows_of_their_adapter() -> None:
    rows = RowTable(8, 8)
    for row_id, slot in enumerate([5, None, 3, 5]):
        row = start(rows, row_id, 2, [row_id + 1], slot=slot)
        row.tokens = [10, 11, 20 + row_id]
    start(rows, 4, 3, [6], slot=3)
    plan = pb.StepPlan(
        decode_rows=[0, 1, 2, 3], chunks=[pb.PromptChunk(row=4, start=0, tokens=[7, 8, 9], last=True)]
    )
    batch = build(plan, rows)
    assert batch.token_ids.tolist() == [21, 22, 20, 23, 7, 8, 9]
    assert batch.positions.tolist() == [2, 2, 2, 2, 0, 1, 2]
    assert batch.kv_slots.tolist() == [2 * 4 + 2, 3 * 4 + 2, 1 * 4 + 2, 4 * 4 + 2, 24, 25, 26]
    assert batch.logit_rows.tolist() == [0, 1, 2, 3, 6]
    assert [row.id for row in batch.samples] == [1, 2, 0, 3, 4]
    groups = {group.entries: group.count for group in batch.token_routing.groups}
    assert groups == {((3, 1.0),): 4, ((5, 1.0),): 2}
    assert batch.logit_routing.slots == (3, 5)
    assert batch.adapter_count == 2
    assert batch.row_count == 5


def test_an_unfinished_prompt_is_not_sampled_and_a_masked_row_takes_no_part() -> None:
    rows = RowTable(8, 8)
    start(rows, 0, 6, [1, 2])
    gone = start(rows, 1, 1, [3])
    gone.tokens, gone.masked = [1, 2], True
    plan = pb.StepPlan(decode_rows=[1], chunks=[pb.PromptChunk(row=0, start=0, tokens=[1, 2, 3])])
    batch = build(plan, rows)
    assert batch.decode is None
    assert batch.samples == ()
    assert batch.row_count == 1
    assert rows[0].tokens == [1, 2, 3]


def test_a_batch_moves_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts arrive in one copy, each in its place."""
    rows = RowTable(8, 8)
    decoding = start(rows, 0, 2, [1, 2])
    decoding.tokens = [5, 6, 7, 8, 9]
    for row_id in (1, 2):
        start(rows, row_id, 6, [3 + 2 * row_id, 4 + 2 * row_id])
    chunks = [pb.PromptChunk(row=row_id, start=0, tokens=range(2 + row_id)) for row_id in (1, 2)]
    batch = build(pb.StepPlan(decode_rows=[0], chunks=chunks), rows)
    copies: list[torch.device] = []

    def stay(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        copies.append(device)
        return send(tensors, torch.device("cpu"))

    monkeypatch.setattr(batches, "send", stay)
    device = torch.device("cuda")
    moved = batch.to(device)
    assert copies == [device]
    assert moved.decode is not None
    assert batch.decode is not None
    for one, other in [
        *((getattr(batch, name), getattr(moved, name)) for name in ("token_ids", "positions", "kv_slots")),
        (batch.logit_rows, moved.logit_rows),
        (batch.decode.block_tables, moved.decode.block_tables),
        (batch.decode.lengths, moved.decode.lengths),
        *((one.blocks, other.blocks) for one, other in zip(batch.prompts, moved.prompts, strict=True)),
    ]:
        assert one is not other
        assert torch.equal(one, other)
    assert [(p.first, p.count, p.start) for p in moved.prompts] == [(1, 3, 0), (4, 4, 0)]
    assert moved.token_routing is batch.token_routing
    assert batch.to(torch.device("cpu")) is batch


def test_scored_prompts_want_every_logit_once() -> None:
    rows = RowTable(8, 8)
    start(rows, 0, 3, [1], output=pb.RowStart.PROMPT_LOGPROBS)
    plan = pb.StepPlan(chunks=[pb.PromptChunk(row=0, start=0, tokens=[1, 2, 3], last=True)])
    batch = build(plan, rows)
    assert batch.logit_rows.tolist() == [0, 1, 2]
    assert batch.sample_rows == (2,)
    assert (batch.scored[0].first, batch.scored[0].count) == (0, 3)


def test_spans_give_each_position_its_adapters() -> None:
    row = Row.from_proto(
        pb.RowStart(
            row=0,
            prompt_length=9,
            spans=[
                pb.AdapterSpan(start=2, entries=[pb.AdapterEntry(slot=1, weight=1.0)]),
                pb.AdapterSpan(start=5, entries=[pb.AdapterEntry(slot=2, weight=0.5)]),
            ],
        )
    )
    one, two = ((1, 1.0),), ((2, 0.5),)
    assert row.entries_between(0, 8) == [(), (), one, one, one, two, two, two]
    assert row.entries_between(3, 5) == [one, one]
    assert row.entries_between(6, 8) == [two, two]
    assert row.entries_between(0, 1) == [()]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (pb.StepPlan(decode_rows=[3]), "row 3 is not running"),
        (pb.StepPlan(chunks=[pb.PromptChunk(row=0, start=2, tokens=[1])]), "starts at 2, expected 0"),
        (pb.StepPlan(chunks=[pb.PromptChunk(row=0, start=0, tokens=[1] * 9)]), "too few for position 8"),
    ],
)
def test_a_plan_that_breaks_the_contract_is_refused(plan: pb.StepPlan, message: str) -> None:
    rows = RowTable(8, 8)
    start(rows, 0, 9, [1, 2])
    with pytest.raises(BadPlan, match=message):
        build(plan, rows)


def test_row_table_refuses_doubles_strangers_and_overflow() -> None:
    rows = RowTable(1, 2)
    start(rows, 0, 1, [])
    with pytest.raises(BadPlan, match="already"):
        start(rows, 0, 1, [])
    with pytest.raises(BadPlan, match="limit"):
        start(rows, 1, 1, [])
    with pytest.raises(BadPlan, match="not running"):
        rows.end(7)
    with pytest.raises(BadPlan, match="cannot hold 3 blocks"):
        rows.extend(0, [1, 2, 3])
    rows.end(0)
    assert len(rows) == 0
