"""What the router knows of one shard group in one epoch. A lost group takes this object with it."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from ..proto import shard_pb2
from .blocks import BlockPool
from .queues import Queues
from .residency import Residency
from .scheduler import Limits
from .sequence import Sequence, SequenceState


def context_length(info: shard_pb2.InfoReply) -> int:
    """Tokens of prompt and output together: what the model bears, or less where the KV blocks hold less."""
    kv = info.kv_groups[0]
    return min(info.max_model_len, (kv.block_count - 1) * kv.block_size)


@dataclass(slots=True)
class Step:
    """A plan that was sent and is not answered in full."""

    seq: int
    sampling: dict[int, Sequence]
    """Row to the sequence that gets a token."""
    prompts: dict[int, Sequence]
    """Row to a sequence whose prompt goes on: it may get prompt logprobs."""
    ended: list[Sequence]
    """Their rows ended with this plan: once it is answered nothing on the shard refers to them."""
    decode_rows: int


@dataclass(slots=True)
class Load:
    """What was given to one group and is not over, in tokens of prompt and output."""

    tokens: int = 0
    by_adapter: Counter[str] = field(default_factory=Counter)
    """Tokens of the sequences that use each."""

    def add(self, sequence: Sequence) -> None:
        self.tokens += sequence.last_position
        for key in sequence.keys:
            self.by_adapter[key] += sequence.last_position

    def remove(self, sequence: Sequence) -> None:
        self.tokens -= sequence.last_position
        for key in sequence.keys:
            self.by_adapter[key] -= sequence.last_position
            if not self.by_adapter[key]:
                del self.by_adapter[key]


@dataclass(slots=True, eq=False)
class Group:
    """Rows, blocks, adapter slots, queues and steps in flight of one shard group in one epoch. Changed by the
    engine loop only."""

    index: int
    """Its place in the configuration, from 0."""
    epoch: int
    info: shard_pb2.InfoReply
    limits: Limits
    pool: BlockPool
    residency: Residency
    free_rows: list[int]
    queues: Queues = field(default_factory=Queues)
    load: Load = field(default_factory=Load)
    """Of what waits and runs here."""
    running: list[Sequence] = field(default_factory=list)
    """In order of admission."""
    ending: list[tuple[int, Sequence]] = field(default_factory=list)
    """Rows to end with the next plan. They and their blocks are free already: ends come first in a step."""
    in_flight: deque[Step] = field(default_factory=deque)
    last_seq: int = 0
    draining: bool = False
    """It is about to stop: what runs may finish, nothing else is given to it."""
    answered_at: float = 0.0
    """When it last answered a step."""

    @classmethod
    def of(
        cls, index: int, epoch: int, info: shard_pb2.InfoReply, *, step_tokens: int, patience: float
    ) -> Group:
        """A group at its baseline, with the router's limits where they are lower than the shard's."""
        kv = info.kv_groups[0]
        limits = Limits.within(
            step_tokens=min(step_tokens, info.max_step_tokens), rows=info.max_num_seqs, patience=patience
        )
        return cls(
            index,
            epoch,
            info,
            limits,
            BlockPool(kv.block_count, kv.block_size),
            Residency(info.adapter_slots, info.adapter_bytes),
            list(range(limits.rows - 1, -1, -1)),
        )

    def start(self, sequence: Sequence, tokens: int) -> None:
        """Give a sequence a row and blocks for `tokens` tokens."""
        sequence.state = SequenceState.RUNNING
        sequence.row = self.free_rows.pop()
        self.grow(sequence, self.pool.blocks_for(tokens))
        self.running.append(sequence)

    def grow(self, sequence: Sequence, blocks: int) -> None:
        """Append free blocks to a sequence."""
        sequence.blocks += self.pool.allocate(blocks)
        sequence.capacity = len(sequence.blocks) * self.pool.block_size

    def end(self, sequence: Sequence) -> None:
        """Take a running sequence's row and blocks; its adapters stay in use until the end is answered."""
        self.running.remove(sequence)
        self.pool.free(sequence.blocks)
        self.free_rows.append(sequence.row)
        self.ending.append((sequence.row, sequence))
        sequence.row, sequence.blocks, sequence.capacity = -1, [], 0
        if sequence.state is SequenceState.RUNNING:
            sequence.state = SequenceState.LEAVING

    def holds(self, sequence: Sequence) -> bool:
        """The whole sequence fits, if nothing else runs."""
        return sequence.last_position <= self.pool.total * self.pool.block_size

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing is in flight, and the shard was told of every end."""
        return not (self.running or self.ending or self.in_flight)
