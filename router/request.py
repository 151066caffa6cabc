"""One generation request as the engine sees it, and the stream on which its tokens come back."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import RouterError


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Validated at the API; the engine trusts it."""

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    """Ids that end the row when sampled; the end-of-sequence ids are among them unless ignored."""
    min_tokens: int = 0
    logprobs: int | None = None
    """How many alternatives to report beside each chosen token; None: no logprobs at all."""
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token: its logprob, its rank (1: most probable), and the most probable alternatives."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class TokenEvent:
    """What one step adds to a sequence. The last event of a stream has `finish`."""

    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    """Once, before or with the first token: one per prompt token, the first one None."""
    finish: FinishReason | None = None


class TokenStream:
    """Events of one sequence: the engine writes, one API task reads.

    Iteration ends after the event with `finish`, or raises the typed error that ended the sequence.
    """

    __slots__ = ("_events", "_ready", "closed")

    def __init__(self) -> None:
        self._events: list[TokenEvent | RouterError] = []
        self._ready: asyncio.Future[None] | None = None
        self.closed = False

    def put(self, event: TokenEvent | RouterError) -> None:
        """Append an event and wake the reader. A typed error or a `finish` closes the stream for good."""
        if self.closed:
            raise RuntimeError("a terminal event was already sent on this stream")
        self.closed = isinstance(event, RouterError) or event.finish is not None
        self._events.append(event)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            while not self._events:
                self._ready = asyncio.get_running_loop().create_future()
                await self._ready
            events, self._events = self._events, []
            for event in events:
                if isinstance(event, RouterError):
                    raise event
                yield event
                if event.finish is not None:
                    return


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """One adapter of a weighted sum, as the caller names it."""

    id: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter of a request's weighted sum, by the key of its version."""

    key: str
    weight: float = 1.0
    start: int = 0
    """Position in the prompt from which it applies."""


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence to generate. Built by the API, then handed to the engine, which owns it from there."""

    id: str
    tenant: str
    adapters: tuple[AdapterUse, ...]
    prompt: Sequence[int]
    params: SamplingParams
    stream: TokenStream
    arrival: float
    """Seconds on the loop's monotonic clock."""
