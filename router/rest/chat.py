"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec
from aiohttp import web

from ..call import Chat, GenerateCall
from ..errors import InvalidRequest
from ..frontend import Frontend
from ..output import TextEvent
from ..request import FinishReason
from ..tokenizer import Tokenizer
from .body import read_body
from .errors import json_response
from .openai import (
    ChunkFormat,
    GenerationBody,
    build_call,
    chat_token,
    check_stream_options,
    finish_name,
    now,
    usage_body,
)
from .sse import DONE, send_events


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None


class ResponseFormat(msgspec.Struct):
    type: str


class ChatBody(GenerationBody, kw_only=True):
    messages: list[Message] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


_NOT_SERVED: Final[dict[str, tuple[Any, ...]]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, ResponseFormat("text")),
    "modalities": (None, [], ["text"]),
    "audio": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
}
"""Fields that are refused, with the values that ask for nothing."""


class ChatCompletions:
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self.complete)]

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, ChatBody)
        call = _call(body, request)
        if body.stream:
            return await send_events(request, self._stream(call, body))
        return json_response(await self._whole(call, body))

    async def _whole(self, call: GenerateCall, body: ChatBody) -> dict[str, Any]:
        async with self._frontend.generate(call) as generation:
            events: list[list[TextEvent]] = [[] for _ in range(call.n)]
            async for batch in generation:
                for event in batch:
                    events[event.index].append(event)
            return {
                **_head(call, body, "chat.completion"),
                "choices": [
                    _choice(generation.tokenizer, index, own, bool(body.logprobs))
                    for index, own in enumerate(events)
                ],
                "usage": usage_body(generation.usage),
            }

    async def _stream(self, call: GenerateCall, body: ChatBody) -> AsyncGenerator[bytes, None]:
        async with self._frontend.generate(call) as generation:
            chunks = ChunkFormat(
                _head(call, body, "chat.completion.chunk"),
                (b',"delta":{"content":', b"}"),
                choices=call.n,
                null_usage=body.wants_usage_chunk,
            )
            started = False
            async for batch in generation:
                parts = [] if started else [_opening(chunks, index) for index in range(call.n)]
                started = True
                for event in batch:
                    if event.finish is not None or body.logprobs:
                        entries = _logprobs(generation.tokenizer, [event]) if body.logprobs else None
                        parts += _slow_chunks(chunks, event, entries)
                    elif event.text:
                        parts.append(chunks.text(event.index, event.text))
                if parts:
                    yield b"".join(parts)
            if body.wants_usage_chunk:
                yield chunks.usage(generation.usage)
            yield DONE


def _choice(tokenizer: Tokenizer, index: int, events: list[TextEvent], logprobs: bool) -> dict[str, Any]:
    content = "".join(event.text for event in events)
    return {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None},
        "logprobs": _logprobs(tokenizer, events) if logprobs else None,
        "finish_reason": finish_name(events[-1].finish),
    }


def _slow_chunks(chunks: ChunkFormat, event: TextEvent, logprobs: dict[str, Any] | None) -> list[bytes]:
    """The chunks of an event that has logprobs or ends its choice: that one, as OpenAI's do, is empty."""
    parts = []
    if event.text or (logprobs and logprobs["content"]):
        parts.append(chunks.choice(_delta(event.index, {"content": event.text}, logprobs=logprobs)))
    if event.finish is not None:
        parts.append(chunks.choice(_delta(event.index, {}, finish=event.finish)))
    return parts


def _logprobs(tokenizer: Tokenizer, events: list[TextEvent]) -> dict[str, Any]:
    content = []
    for event in events:
        if event.token is None or event.hidden or event.logprobs is None:
            continue
        entry = chat_token(tokenizer, event.token, event.logprobs.logprob)
        entry["top_logprobs"] = [chat_token(tokenizer, token, value) for token, value in event.logprobs.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _opening(chunks: ChunkFormat, index: int) -> bytes:
    return chunks.choice(_delta(index, {"role": "assistant", "content": ""}))


def _delta(
    index: int,
    delta: dict[str, str],
    *,
    logprobs: dict[str, Any] | None = None,
    finish: FinishReason | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_name(finish)}


def _call(body: ChatBody, request: web.Request) -> GenerateCall:
    """Raises InvalidRequest for fields that are not served or do not fit together."""
    check_stream_options(body)
    for name, harmless in _NOT_SERVED.items():
        if getattr(body, name) not in harmless:
            raise InvalidRequest(f"{name} is not served: leave it out", param=name)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return build_call(
        body,
        request,
        [chat_prompt(body.messages)],
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        field_names={"prompt": "messages", "logprobs": "top_logprobs"},
    )


def chat_prompt(messages: list[Message] | None) -> Chat:
    """Messages as the chat template takes them: content is one text."""
    if not messages:
        raise InvalidRequest("messages is needed: at least one message", param="messages")
    return Chat(tuple(_message(position, message) for position, message in enumerate(messages)))


def _message(position: int, message: Message) -> dict[str, Any]:
    where = f"messages[{position}]"
    if message.role in ("tool", "function") or message.tool_calls:
        raise InvalidRequest(f"{where}: tools are not served", param="messages")
    if message.content is None:
        raise InvalidRequest(f"{where}.content is needed", param="messages")
    content = message.content
    if not isinstance(content, str):
        for part in content:
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"{where}.content holds a part that is no text: only text is served", param="messages"
                )
        content = "\n".join(part.text or "" for part in content)
    role = "system" if message.role == "developer" else message.role
    rendered = {"role": role, "content": content}
    return rendered if message.name is None else {**rendered, "name": message.name}


def _head(call: GenerateCall, body: ChatBody, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{call.id}", "object": kind, "created": now(), "model": body.model}
