"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from aiohttp import web

from ..call import GenerateCall, Prompt
from ..errors import InvalidRequest
from ..frontend import EncodedPrompt, Frontend, Generation
from ..output import TextEvent
from ..request import FinishReason, TokenLogprobs
from ..tokenizer import Tokenizer
from .body import read_body
from .errors import json_response
from .openai import (
    ChunkFormat,
    GenerationBody,
    build_call,
    check_stream_options,
    completion_top,
    finish_name,
    finite,
    now,
    usage_body,
)
from .sse import DONE, send_events

_DEFAULT_MAX_TOKENS = 16


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    return_token_ids: bool | None = None


class Completions:
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/completions", self.complete)]

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, CompletionBody)
        call = _call(body, request)
        if body.stream:
            return await send_events(request, self._stream(call, body))
        return json_response(await self._whole(call, body))

    async def _whole(self, call: GenerateCall, body: CompletionBody) -> dict[str, Any]:
        async with self._frontend.generate(call) as generation:
            choices = self._choices(call, body, generation)
            async for batch in generation:
                for event in batch:
                    choices[event.index].add(event)
            return {
                **_head(call, body),
                "choices": [choice.take() for choice in choices],
                "usage": usage_body(generation.usage),
            }

    async def _stream(self, call: GenerateCall, body: CompletionBody) -> AsyncGenerator[bytes, None]:
        async with self._frontend.generate(call) as generation:
            chunks = ChunkFormat(
                _head(call, body),
                (b',"text":', b""),
                choices=len(_indices(call)),
                null_usage=body.wants_usage_chunk,
            )
            plain = not (call.echo or body.return_token_ids) and call.sampling.logprobs is None
            choices = self._choices(call, body, generation)
            async for batch in generation:
                parts: list[bytes] = []
                for event in batch:
                    if plain and event.finish is None:
                        if event.text:
                            parts.append(chunks.text(event.index, event.text))
                        continue
                    choice = choices[event.index]
                    choice.add(event)
                    if choice.has_news:
                        parts.append(chunks.choice(choice.take()))
                if parts:
                    yield b"".join(parts)
            if body.wants_usage_chunk:
                yield chunks.usage(generation.usage)
            yield DONE

    def _choices(self, call: GenerateCall, body: CompletionBody, generation: Generation) -> list[_ChoiceBody]:
        wanted = bool(body.return_token_ids)
        return [_ChoiceBody(call, index, generation, token_ids=wanted) for index in _indices(call)]


class _ChoiceBody:
    """Gathers a choice's events into OpenAI's choice object: all of it, or what is new since the last one."""

    def __init__(
        self,
        call: GenerateCall,
        index: int,
        generation: Generation,
        *,
        token_ids: bool,
    ) -> None:
        self._index = index
        self._text: list[str] = []
        self._token_ids: list[int] | None = [] if token_ids else None
        self._finish: FinishReason | None = None
        self._logprobs = _Logprobs(generation.tokenizer) if call.sampling.logprobs is not None else None
        self._prompt: EncodedPrompt | None = None
        self._prompt_length = 0
        if call.echo:
            self._prompt = generation.prompts[index // call.n]
            text = generation.prompt_text(self._prompt)
            self._text.append(text)
            self._prompt_length = len(text)

    @property
    def has_news(self) -> bool:
        return (
            self._finish is not None
            or any(self._text)
            or bool(self._token_ids)
            or bool(self._logprobs and self._logprobs.tokens)
        )

    def add(self, event: TextEvent) -> None:
        self._text.append(event.text)
        self._finish = event.finish
        if self._token_ids is not None and event.token is not None:
            self._token_ids.append(event.token)
        if self._logprobs is None:
            return
        if event.prompt_logprobs is not None and self._prompt is not None:
            self._logprobs.add_prompt(self._prompt.tokens, event.prompt_logprobs)
        if event.token is not None and not event.hidden:
            self._logprobs.add(event.token, event.logprobs, self._prompt_length + event.offset)

    def take(self) -> dict[str, Any]:
        text, self._text = "".join(self._text), []
        taken: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs.take() if self._logprobs else None,
            "finish_reason": finish_name(self._finish),
        }
        if self._token_ids is not None:
            taken["token_ids"], self._token_ids = self._token_ids, []
        return taken


class _Logprobs:
    """OpenAI's four parallel lists."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._clear()

    def _clear(self) -> None:
        self.tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token: int, logprobs: TokenLogprobs | None, offset: int) -> None:
        self.tokens.append(self._tokenizer.token_text(token))
        self._logprobs.append(None if logprobs is None else finite(logprobs.logprob))
        self._top.append(None if logprobs is None else completion_top(self._tokenizer, token, logprobs))
        self._offsets.append(offset)

    def add_prompt(self, tokens: Sequence[int], logprobs: Iterable[TokenLogprobs | None]) -> None:
        detokenizer = self._tokenizer.detokenizer()
        offset = 0
        for token, token_logprobs in zip(tokens, logprobs, strict=True):
            self.add(token, token_logprobs, offset)
            offset += len(detokenizer.step(token))

    def take(self) -> dict[str, Any]:
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._clear()
        return taken


def _call(body: CompletionBody, request: web.Request) -> GenerateCall:
    """Raises InvalidRequest for fields that do not fit together."""
    check_stream_options(body)
    if body.suffix:
        raise InvalidRequest("suffix is not served: send the prompt alone", param="suffix")
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise InvalidRequest("best_of must equal n: every sequence is returned", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens may be 0 only with echo", param="max_tokens")
    return build_call(
        body,
        request,
        _prompts(body.prompt),
        logprobs=body.logprobs,
        echo=bool(body.echo),
        default_max_tokens=_DEFAULT_MAX_TOKENS,
    )


def _prompts(prompt: str | list[str | int | list[int]] | None) -> list[Prompt]:
    """One prompt or several: a text, a list of texts, token ids, or a list of lists of token ids."""
    if prompt is None:
        raise InvalidRequest("prompt is needed", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(part) for part in prompt}
    if len(kinds) > 1:
        raise InvalidRequest("prompt mixes texts, token ids and lists of token ids", param="prompt")
    if kinds == {int}:
        return [[token for token in prompt if isinstance(token, int)]]
    return [part for part in prompt if not isinstance(part, int)]


def _indices(call: GenerateCall) -> range:
    return range(len(call.prompts) * call.n)


def _head(call: GenerateCall, body: CompletionBody) -> dict[str, Any]:
    return {"id": f"cmpl-{call.id}", "object": "text_completion", "created": now(), "model": body.model}
