"""One sequence between its acceptance and its terminal event. Owned by the engine loop."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .request import Request, TokenLogprobs


class SequenceState(enum.Enum):
    WAITING = "waiting"
    """In a queue, without row or blocks."""
    RUNNING = "running"
    """Has a row and blocks on the shard group."""
    LEAVING = "leaving"
    """Its row's end is planned; answers of steps in flight may still bring tokens."""
    DONE = "done"
    """The terminal event was sent, or the client is gone."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Progress of one request. "Planned" counts what was put in a step, answered or not."""

    request: Request
    ticket: int
    """Order of acceptance: a lower ticket is older."""
    keys: tuple[str, ...]
    """Distinct adapter keys, sorted; empty: the base alone."""
    max_output: int
    """Tokens it may generate: max_tokens, or less where the model's length ends first."""
    tokens: list[int] = field(init=False)
    """The prompt and every output token whose sampling was answered."""
    prompt_length: int = field(init=False)
    target: int = field(init=False)
    """Tokens to feed in chunks before decoding: the prompt, after a preemption the output so far too."""
    state: SequenceState = SequenceState.WAITING
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    capacity: int = 0
    """Tokens that `blocks` hold."""
    computed: int = 0
    """Positions whose keys and values are planned."""
    sampled: int = 0
    """Output tokens whose sampling is planned."""
    preempted: bool = False
    """LEAVING for want of blocks: goes back to its queue once every step in flight is answered."""
    counted: bool = False
    """Counts against the bounds of the queues."""
    epoch: int = 0
    """Of the shard group to which it was given; 0: none."""
    refused_by: frozenset[int] = frozenset()
    """Epochs of the groups that could not serve its adapters."""
    restarts: int = 0
    """How often a lost shard group made it start again."""
    queued_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """What has come so far, None where not asked for. Position 0 never has one."""
    prompt_logprobs_sent: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.prompt_length = self.target = len(self.tokens)
        self.queued_at = self.request.arrival
        if self.request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def generated(self) -> int:
        """Output tokens confirmed by an answer."""
        return len(self.tokens) - self.prompt_length

    @property
    def last_position(self) -> int:
        """Positions with keys and values when it is complete: the last token sampled is never fed."""
        return self.prompt_length + self.max_output - 1

    @property
    def remaining(self) -> int:
        """Tokens still to feed, as a measure of work left."""
        return self.last_position - self.computed

    def rewind(self) -> None:
        """Forget all progress on the shard; the next start feeds prompt and output so far again."""
        self.state = SequenceState.WAITING
        self.row, self.blocks, self.capacity = -1, [], 0
        self.computed, self.sampled = 0, self.generated
        self.target = len(self.tokens)
        self.preempted = False
