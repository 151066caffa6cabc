"""Between the dialects and the engine: one call in, text events out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from .call import (
    Chat,
    GenerateCall,
    Prompt,
    check_call,
    prompt_too_long,
    resolve_max_tokens,
    sampling_params,
    seed_of,
)
from .client import EngineClient
from .errors import InvalidRequest, RouterError
from .output import Choice, StopStrings, TextEvent
from .request import AdapterUse, Request, TokenEvent, TokenStream
from .tokenizer import Tokenizer


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

    def __init__(self, engine: EngineClient, prompts: Sequence[EncodedPrompt]) -> None:
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


class Frontend:
    """Validates calls, encodes prompts, and runs them on the engine."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self.tokenizer = tokenizer

    @asynccontextmanager
    async def generate(self, call: GenerateCall) -> AsyncIterator[Generation]:
        """Start a call. Whatever still runs when the block is left is cancelled.

        Raises InvalidRequest, AdapterNotFound, or what the engine refuses with.
        """
        model = self._engine.model
        check_call(call, model.vocab_size)
        adapters = self._resolve_adapters(call)
        prompts = [await self._encode(call, prompt) for prompt in call.prompts]
        limits = [resolve_max_tokens(call, len(prompt.tokens), model.max_model_len) for prompt in prompts]
        generation = Generation(self._engine, prompts)
        try:
            for prompt, max_tokens in zip(prompts, limits, strict=True):
                self._submit(call, adapters, generation, prompt, max_tokens)
            yield generation
        finally:
            generation.cancel()

    def _resolve_adapters(self, call: GenerateCall) -> tuple[AdapterUse, ...]:
        base = self._engine.model.name
        if call.model in ("", base):
            choices = [(choice.id, choice.weight) for choice in call.adapters]
        elif call.adapters:
            raise InvalidRequest(
                f"name adapters either in {call.name_of('model')} or in adapters, not in both",
                param="adapters",
            )
        else:
            choices = [(call.model, 1.0)]
        uses = []
        for name, weight in choices:
            if name == base:
                raise InvalidRequest("adapters names the base model, which is no adapter", param="adapters")
            call.caller.require(name)
            key = self._engine.resolve(
                name, tenant=call.caller.tenant, source=call.adapter_source, token=call.hub_token
            )
            uses.append(AdapterUse(key, weight))
        return tuple(uses)

    async def _encode(self, call: GenerateCall, prompt: Prompt) -> EncodedPrompt:
        limit = self._engine.model.max_model_len
        if isinstance(prompt, Chat):
            text = None
            try:
                tokens: Sequence[int] = await self.tokenizer.encode_chat(prompt.messages)
            except InvalidRequest as error:
                raise InvalidRequest(error.message, param=call.name_of("prompt")) from error
        elif isinstance(prompt, str):
            text = prompt
            if call.truncate is None and self.tokenizer.fewest_tokens(text) > limit:
                raise prompt_too_long(call, f"more than {limit}", limit)
            tokens = await self.tokenizer.encode(text)
        else:
            text, tokens = None, prompt
        if call.truncate is not None and len(tokens) > call.truncate:
            text, tokens = None, tokens[-call.truncate :]
        if not tokens:
            name = call.name_of("prompt")
            raise InvalidRequest(f"{name} has no tokens", param=name)
        return EncodedPrompt(tokens, text)

    def _submit(
        self,
        call: GenerateCall,
        adapters: tuple[AdapterUse, ...],
        generation: Generation,
        prompt: EncodedPrompt,
        max_tokens: int,
    ) -> None:
        """Hand the n sequences of one prompt to the engine."""
        params = sampling_params(
            call,
            self.tokenizer.generation_defaults,
            max_tokens=max_tokens,
            eos_ids=self.tokenizer.stop_ids,
            vocab_size=self._engine.model.vocab_size,
        )
        stops = StopStrings(call.stopping.strings)
        first = len(generation.seeds)
        for index in range(call.n):
            choice = Choice(
                first + index,
                self.tokenizer.detokenizer(),
                stops=stops,
                stop_ids=frozenset(params.stop_ids),
                min_tokens=params.min_tokens,
                scoring=max_tokens == 0,
            )
            request = Request(
                id=f"{call.id}-{first + index}",
                tenant=call.caller.tenant,
                adapters=adapters,
                prompt=prompt.tokens,
                params=replace(params, seed=seed_of(call, index)),
                stream=TokenStream(),
                arrival=asyncio.get_running_loop().time(),
            )
            generation.submit(request, choice)

    def prompt_text(self, prompt: EncodedPrompt) -> str:
        """A prompt as text, for a caller who wants it shown."""
        return self.tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text
