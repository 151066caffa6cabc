"""Between the dialects and the engine: one call in, text events out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from .auth import Caller
from .call import (
    Chat,
    GenerateCall,
    Prompt,
    check_call,
    check_token_ids,
    prompt_too_long,
    resolve_max_tokens,
    sampling_params,
    seed_of,
)
from .client import AdapterQuery, EngineClient, PreparedAdapter
from .errors import InvalidRequest, RouterError
from .output import Choice, StopStrings, TextEvent
from .request import AdapterChoice, Request, TokenEvent, TokenStream
from .sums import check_sum, uses_in
from .tokenizer import Tokenizer
from .tokenizers import Tokenizers


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model reads it. `text` is what the caller wrote, where that was text."""

    tokens: Sequence[int]
    text: str | None


class _Mailbox:
    """Wakes the one reader of several streams."""

    __slots__ = ("_ready", "_streams")

    def __init__(self) -> None:
        self._ready: asyncio.Future[None] | None = None
        self._streams: list[_ChoiceStream] = []

    def notify(self, stream: _ChoiceStream) -> None:
        """Note that a stream has events, and wake the reader."""
        self._streams.append(stream)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    async def take(self) -> list[_ChoiceStream]:
        """Wait for events; the streams that have some, the longest waiting first."""
        if not self._streams:
            self._ready = asyncio.get_running_loop().create_future()
            await self._ready
        streams, self._streams = self._streams, []
        return streams


class _ChoiceStream(TokenStream):
    """A token stream that is read together with its siblings, all waiting events at once."""

    __slots__ = ("_mailbox", "choice", "request_id")

    def __init__(self, mailbox: _Mailbox, choice: Choice, request_id: str) -> None:
        super().__init__()
        self._mailbox = mailbox
        self.choice = choice
        self.request_id = request_id

    def put(self, event: TokenEvent | RouterError) -> None:
        if not self._events:
            self._mailbox.notify(self)
        super().put(event)

    def drain(self) -> list[TokenEvent | RouterError]:
        """Take all waiting events."""
        events, self._events = self._events, []
        return events


class Generation:
    """A call that runs. Iterating gives batches: the events that were waiting, in order, at least one.

    Iteration ends when every choice has had its last event, or raises the typed error that ended one of them.
    Choice `prompt * n + i` is the i-th sequence of a prompt.
    """

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, prompts: Sequence[EncodedPrompt]) -> None:
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.seeds: list[int] = []
        """The seed of each choice."""
        self._engine = engine
        self._mailbox = _Mailbox()
        self._streams: list[_ChoiceStream] = []

    @property
    def usage(self) -> Usage:
        """So far. A prompt counts once, however many sequences follow it."""
        return Usage(
            sum(len(prompt.tokens) for prompt in self.prompts),
            sum(stream.choice.tokens for stream in self._streams),
        )

    def prompt_text(self, prompt: EncodedPrompt) -> str:
        """A prompt as text, for a caller who wants it shown."""
        return self.tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text

    def submit(self, request: Request, choice: Choice) -> None:
        """Hand one sequence to the engine, on a stream of its own. Raises its typed refusal."""
        stream = _ChoiceStream(self._mailbox, choice, request.id)
        self._engine.submit(replace(request, stream=stream))
        self._streams.append(stream)
        self.seeds.append(request.params.seed)

    def cancel(self) -> None:
        """End every sequence that still runs."""
        for stream in self._streams:
            if not stream.closed and not stream.choice.done:
                self._engine.cancel(stream.request_id)

    async def __aiter__(self) -> AsyncIterator[list[TextEvent]]:
        open_choices = len(self._streams)
        while open_choices:
            batch: list[TextEvent] = []
            failure: RouterError | None = None
            for stream in await self._mailbox.take():
                choice = stream.choice
                for event in stream.drain():
                    if choice.done:
                        continue
                    if isinstance(event, RouterError):
                        failure = failure or event
                        continue
                    shown = choice.feed(event)
                    batch += shown
                    if shown and shown[-1].finish is not None:
                        open_choices -= 1
                        if not stream.closed:
                            self._engine.cancel(stream.request_id)
            if batch:
                yield batch
            if failure is not None:
                raise failure


@dataclass(frozen=True, slots=True)
class _Reading:
    """How one call is read: its adapters, their tokenizer, and the token ids they know."""

    call: GenerateCall
    adapters: tuple[PreparedAdapter, ...]
    tokenizer: Tokenizer
    vocab_size: int
    arrival: float
    """Seconds on the loop's clock."""


class Frontend:
    """Validates calls, encodes prompts, and runs them on the engine."""

    def __init__(self, engine: EngineClient, tokenizers: Tokenizers) -> None:
        self._engine = engine
        self._tokenizers = tokenizers

    @asynccontextmanager
    async def generate(self, call: GenerateCall) -> AsyncIterator[Generation]:
        """Start a call. Whatever still runs when the block is left is cancelled.

        Raises InvalidRequest, AdapterNotFound, or what the engine refuses with.
        """
        arrival = asyncio.get_running_loop().time()
        check_call(call)
        with ExitStack() as running:
            async with self._engine.prepare(self._query(call)) as adapters:
                reading = await self._read(call, adapters, arrival)
                prompts = [await self._encode(reading, prompt) for prompt in call.prompts]
                generation = Generation(self._engine, reading.tokenizer, prompts)
                running.callback(generation.cancel)
                self._submit_all(reading, generation)
            yield generation

    async def tokenizer_of(self, caller: Caller, model: str) -> tuple[Tokenizer, int]:
        """The tokenizer of the base (also without a name) or of an adapter, and how many ids it may name.

        Raises as `generate`.
        """
        base = self._engine.model
        if model in ("", base.name):
            return self._tokenizers.base, base.vocab_size
        caller.require(model)
        query = AdapterQuery(choices=[AdapterChoice(model)], tenant=caller.tenant)
        async with self._engine.prepare(query) as adapters:
            tokenizer = await self._tokenizers.of(adapters, chat=False, param="model")
            return tokenizer, _vocab_size(base.vocab_size, adapters)

    def _query(self, call: GenerateCall) -> AdapterQuery:
        base = self._engine.model.name
        choices = call.adapters
        if call.model not in ("", base):
            if choices:
                raise InvalidRequest(
                    f"name adapters either in {call.name_of('model')} or in {call.name_of('adapters')}, "
                    "not in both",
                    param="adapters",
                )
            choices = [AdapterChoice(call.model)]
        for choice in choices:
            if choice.id == base:
                raise InvalidRequest("adapters names the base model, which is no adapter", param="adapters")
            call.caller.require(choice.id)
        return AdapterQuery(
            choices=choices,
            tenant=call.caller.tenant,
            source=call.adapter_source,
            token=call.hub_token,
            merge=call.merge,
        )

    async def _read(
        self, call: GenerateCall, adapters: tuple[PreparedAdapter, ...], arrival: float
    ) -> _Reading:
        """What the adapters' manifests decide. Raises InvalidRequest for what they cannot be asked."""
        vocab_size = self._engine.model.vocab_size
        tokenizer = self._tokenizers.base
        if adapters:
            param = call.name_of("adapters" if call.adapters else "model")
            check_sum(adapters, param)
            chat = any(isinstance(prompt, Chat) for prompt in call.prompts)
            tokenizer = await self._tokenizers.of(adapters, chat=chat, param=param)
            vocab_size = _vocab_size(vocab_size, adapters)
        check_token_ids(call, vocab_size)
        return _Reading(call, adapters, tokenizer, vocab_size, arrival)

    async def _encode(self, reading: _Reading, prompt: Prompt) -> EncodedPrompt:
        call, tokenizer = reading.call, reading.tokenizer
        limit = self._engine.model.max_model_len
        if isinstance(prompt, Chat):
            text = None
            try:
                tokens: Sequence[int] = await tokenizer.encode_chat(prompt.messages)
            except InvalidRequest as error:
                raise InvalidRequest(error.message, param=call.name_of("prompt")) from error
        elif isinstance(prompt, str):
            text = prompt
            if call.truncate is None and tokenizer.fewest_tokens(text) > limit:
                raise prompt_too_long(call, f"more than {limit}", limit)
            tokens = await tokenizer.encode(text)
        else:
            text, tokens = None, prompt
        if call.truncate is not None and len(tokens) > call.truncate:
            text, tokens = None, tokens[-call.truncate :]
        if not tokens:
            name = call.name_of("prompt")
            raise InvalidRequest(f"{name} has no tokens", param=name)
        return EncodedPrompt(tokens, text)

    def _submit_all(self, reading: _Reading, generation: Generation) -> None:
        limit = self._engine.model.max_model_len
        limits = [
            resolve_max_tokens(reading.call, len(prompt.tokens), limit) for prompt in generation.prompts
        ]
        for prompt, max_tokens in zip(generation.prompts, limits, strict=True):
            self._submit(reading, generation, prompt, max_tokens)

    def _submit(
        self, reading: _Reading, generation: Generation, prompt: EncodedPrompt, max_tokens: int
    ) -> None:
        """Hand the n sequences of one prompt to the engine."""
        call, tokenizer = reading.call, reading.tokenizer
        params = sampling_params(
            call,
            tokenizer.generation_defaults,
            max_tokens=max_tokens,
            eos_ids=tokenizer.stop_ids,
            vocab_size=reading.vocab_size,
        )
        stops = StopStrings(call.stopping.strings)
        uses = uses_in(prompt.tokens, reading.adapters)
        first = len(generation.seeds)
        for index in range(call.n):
            choice = Choice(
                first + index,
                tokenizer.detokenizer(),
                stops=stops,
                stop_ids=frozenset(params.stop_ids),
                min_tokens=params.min_tokens,
                scoring=max_tokens == 0,
            )
            request = Request(
                id=f"{call.id}-{first + index}",
                tenant=call.caller.tenant,
                adapters=uses,
                prompt=prompt.tokens,
                params=replace(params, seed=seed_of(call, index)),
                stream=TokenStream(),
                arrival=reading.arrival,
            )
            generation.submit(request, choice)


def _vocab_size(base: int, adapters: Sequence[PreparedAdapter]) -> int:
    """Token ids that a request for these adapters may name."""
    return max(base, *(adapter.manifest.vocab_size for adapter in adapters))
