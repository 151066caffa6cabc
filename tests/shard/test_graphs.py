"""Captured decode steps, with a capture that remembers a step's work and does it again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.load import Backend
from loraplex.kernels.ops import EmbeddingTable, LoraDelta, Placed, Routing, SiteTable
from loraplex.proto import shard_pb2 as pb
from loraplex.shard.adapters.changes import LinearChange, ModuleChange
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.batch import Batch, build_batch
from loraplex.shard.config import ShardConfig
from loraplex.shard.graphs import GraphedModel, ReservedRouting, StepGraphs, StepInputs, buckets_up_to
from loraplex.shard.load import Assembled, ReadModel, assemble
from loraplex.shard.model import CausalModel
from loraplex.shard.rows import Row, RowTable

from .dense import Changes, packed

ROWS, BLOCK, CPU = 6, 4, torch.device("cpu")
PLAIN, OTHER, NORM = 1, 2, 3
"""Slots of two plain adapters, and of one with a norm of its own."""


@dataclass
class Room:
    """Reserved room on a CPU: a place where the operators look a routing up."""

    routing: Routing = field(default_factory=lambda: Routing((), ()))
    adapters: int = 8
    """How many fit."""

    def fill(self, routing: Routing, rows: int) -> bool:
        if len(routing.slots) > self.adapters:
            return False
        self.routing = routing
        return True


class RoomOps(CpuLoraOps):
    """The CPU's operators, of routings in reserved room too."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def start_lora(self, x: torch.Tensor, placed: Placed, table: SiteTable) -> LoraDelta:
        self.launches += 1
        return super().start_lora(x, _routing(placed), table)

    def add_embedding(
        self, e: torch.Tensor, tokens: torch.Tensor, placed: Placed, table: EmbeddingTable
    ) -> None:
        super().add_embedding(e, tokens, _routing(placed), table)


def _routing(placed: Placed) -> Placed:
    return placed.routing if isinstance(placed, Room) else placed


class Remembered:
    """`Captured` by doing the work again, into the same memory."""

    def __init__(self, work: Callable[[], torch.Tensor], replayed: list[int]) -> None:
        self._work = work
        self._replayed = replayed
        self.output = work()

    def replay(self) -> None:
        self._replayed.append(len(self.output))
        self.output.copy_(self._work())


@dataclass
class Eager:
    """The inner model, counting its steps."""

    model: CausalModel
    steps: int = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        self.steps += 1
        return self.model.forward(batch)


@dataclass
class Graphed:
    """A tiny model with captured steps, adapters in three slots, and rows with prompts behind them."""

    assembled: Assembled
    ops: RoomOps
    room: Room = field(default_factory=Room)
    replayed: list[int] = field(default_factory=list)
    """Rows of each replay, padding included."""

    def __post_init__(self) -> None:
        assert isinstance(self.assembled.model, CausalModel)
        self.inner = Eager(self.assembled.model)
        self.graphs = StepGraphs(
            self.assembled.model,
            lambda work: Remembered(work, self.replayed),
            StepInputs(ROWS, 8, CPU),
            ReservedRouting(self.room, self.room.fill),
        )
        self.pool = AdapterPool(self.assembled.sites, slots=8, budget=1 << 30)
        self.model = GraphedModel(self.inner, self.graphs, self.pool.are_plain)
        self.rows = RowTable(2 * ROWS, 8)

    def load(self, slot: int, changes: Changes) -> None:
        self.pool.load(slot, str(slot), packed(self.assembled.layout, changes))

    def begin(self, slots: Sequence[int | None]) -> None:
        """One row for each of these, with two or more prompt tokens in the cache and a new one to decode."""
        plan = pb.StepPlan()
        for index, slot in enumerate(slots):
            spans = []
            if slot is not None:
                spans = [pb.AdapterSpan(entries=[pb.AdapterEntry(slot=slot, weight=0.5)])]
            length = 2 + index
            row = Row.from_proto(pb.RowStart(row=index, prompt_length=length, spans=spans))
            self.rows.start(row)
            self.rows.extend(index, [1 + 3 * index, 2 + 3 * index, 3 + 3 * index])
            plan.chunks.add(row=index, start=0, tokens=range(10 + index, 10 + index + length), last=True)
        self.assembled.model.forward(self.build(plan))
        for index in range(len(slots)):
            self.rows[index].tokens.append(50 + index)

    def build(self, plan: pb.StepPlan) -> Batch:
        return build_batch(plan, self.rows, block_size=BLOCK)

    def decode(self, rows: int) -> Batch:
        """A step of the first rows."""
        return self.build(pb.StepPlan(decode_rows=range(rows)))


def lora(seed: int, out_features: int) -> LinearChange:
    values = np.random.default_rng(seed).standard_normal
    return LinearChange(a=values((4, 64), np.float32), b=values((out_features, 4), np.float32))


@pytest.fixture
def graphed(tiny_model: Callable[[str], Path]) -> Graphed:
    directory = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    config = ShardConfig(
        model=str(directory), device="cpu", kv_memory=1 << 20, block_size=BLOCK, max_num_seqs=ROWS
    )
    ops = RoomOps()
    result = Graphed(assemble(ReadModel(model), config, Backend(ops, None), CPU), ops)
    for slot in (PLAIN, OTHER):
        result.load(slot, {"model.layers.1.self_attn.q_proj": lora(slot, 64), "lm_head": lora(slot, 300)})
    norm = ModuleChange({"weight": np.full(64, 2.0, np.float32)})
    result.load(NORM, {"model.norm": norm})
    return result


@pytest.mark.parametrize(
    ("rows", "buckets"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (70, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 70)),
        (
            256,
            (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
        ),
    ],
)
def test_buckets_lie_closer_together_where_a_row_more_costs_more(rows: int, buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(rows) == buckets


def test_however_many_rows_there_may_be_few_are_padding() -> None:
    buckets = buckets_up_to(4096)
    assert max(after - before for before, after in pairwise(buckets)) == 32


@pytest.mark.parametrize(
    "slots",
    [
        [None],
        [PLAIN],
        [PLAIN, None, OTHER],
        [OTHER, PLAIN, OTHER, PLAIN, None],
        [None] * ROWS,
        [PLAIN] * ROWS,
    ],
)
def test_a_replayed_step_equals_an_eager_one(graphed: Graphed, slots: list[int | None]) -> None:
    graphed.graphs.capture([2, 4, ROWS])
    graphed.begin(slots)
    for rows in (len(slots), 1):
        batch = graphed.decode(rows)
        expected = graphed.inner.model.forward(batch)
        got = graphed.model.forward(batch)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert graphed.inner.steps == 0
    assert graphed.replayed == [next(b for b in (2, 4, ROWS) if b >= rows) for rows in (len(slots), 1)]


def test_the_largest_step_is_captured_first(graphed: Graphed) -> None:
    captured: list[tuple[int, bool]] = []

    def capture(work: Callable[[], torch.Tensor]) -> Remembered:
        before = graphed.ops.launches
        result = Remembered(work, graphed.replayed)
        captured.append((len(result.output), graphed.ops.launches > before))
        return result

    reserved = ReservedRouting(graphed.room, graphed.room.fill)
    graphs = StepGraphs(graphed.inner.model, capture, StepInputs(ROWS, 8, CPU), reserved)
    graphs.capture([1, 4, 2])
    assert captured == [(4, False), (4, True), (2, False), (2, True), (1, False), (1, True)]


def test_a_step_without_adapters_launches_none_while_some_are_resident(graphed: Graphed) -> None:
    graphed.graphs.capture([4])
    graphed.begin([None, PLAIN])
    graphed.ops.launches = 0
    graphed.model.forward(graphed.decode(1))
    assert (graphed.ops.launches, graphed.replayed) == (0, [4])
    graphed.model.forward(graphed.decode(2))
    assert graphed.ops.launches > 0


def test_padding_writes_to_the_sink_alone(graphed: Graphed) -> None:
    """Also where the step before had more rows."""
    graphed.graphs.capture([4])
    graphed.begin([PLAIN, None, None, OTHER])
    kv = graphed.assembled.kv
    graphed.model.forward(graphed.decode(4))
    batch = graphed.decode(2)
    stores = [store for layer in kv.layers for store in kv.layer(layer)]
    for store in stores:
        store.flatten(0, 1)[batch.kv_slots] = 7.0
    before = [store.clone() for store in stores]
    graphed.model.forward(batch)
    for store, old in zip(stores, before, strict=True):
        changed = (store != old).flatten(0, 1).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) - set(range(BLOCK)) == set(batch.kv_slots.tolist())


def test_what_no_graph_does_runs_as_it_comes(graphed: Graphed) -> None:
    graphed.graphs.capture([1, 2])
    graphed.begin([None, NORM, PLAIN, OTHER])
    beside_a_prompt = pb.StepPlan(
        decode_rows=[0], chunks=[pb.PromptChunk(row=3, start=len(graphed.rows[3].tokens), tokens=[1, 2])]
    )
    plans = {
        "a prompt": beside_a_prompt,
        "more rows than any graph": pb.StepPlan(decode_rows=[0, 2, 3]),
        "an adapter that is not plain": pb.StepPlan(decode_rows=[1]),
    }
    for steps, (why, plan) in enumerate(plans.items(), start=1):
        graphed.model.forward(graphed.build(plan))
        assert (graphed.inner.steps, graphed.replayed) == (steps, []), why


def test_adapters_without_room_run_as_they_come(graphed: Graphed) -> None:
    graphed.graphs.capture([2])
    graphed.room.adapters = 1
    graphed.begin([PLAIN, OTHER])
    batch = graphed.decode(2)
    torch.testing.assert_close(graphed.model.forward(batch), graphed.inner.model.forward(batch))
    assert (graphed.inner.steps, graphed.replayed) == (1, [])


def test_a_model_that_cannot_be_captured_runs_as_it_comes(
    graphed: Graphed, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(work: Callable[[], torch.Tensor]) -> Remembered:
        result = Remembered(work, graphed.replayed)
        if len(result.output) < 4:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return result

    reserved = ReservedRouting(graphed.room, graphed.room.fill)
    graphs = StepGraphs(graphed.inner.model, capture, StepInputs(ROWS, 8, CPU), reserved)
    with caplog.at_level(logging.WARNING):
        graphs.capture([2, 4])
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps are not captured: operation not permitted when stream is capturing"
    ]
    graphed.begin([None])
    GraphedModel(graphed.inner, graphs, graphed.pool.are_plain).forward(graphed.decode(1))
    assert (graphed.inner.steps, graphed.replayed) == (1, [])
