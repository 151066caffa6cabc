"""LoRAX's own routes: POST /, /generate and /generate_stream, GET /info."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ..call import GenerateCall
from ..client import EngineClient
from ..frontend import Frontend, Generation, Usage
from ..output import TextEvent
from ..request import FinishReason
from .body import read_body
from .context import CALLER
from .errors import json_response
from .lorax_body import LoraxBody, Parameters, lorax_call
from .openai import finite
from .sse import event, send_events


@dataclass(frozen=True, slots=True)
class ShardGroup:
    """What /info tells of one shard group. `weight_bytes`: base weights resident on each rank."""

    tp: int
    ready: bool
    weight_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What /info tells beside the model."""

    version: str
    groups: Callable[[], Sequence[ShardGroup]]
    max_queued_requests: int


class Lorax:
    def __init__(self, frontend: Frontend, engine: EngineClient, facts: ServerFacts) -> None:
        self._frontend = frontend
        self._engine = engine
        self._facts = facts

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/", self.dispatch),
            web.post("/generate", self.generate),
            web.post("/generate_stream", self.generate_stream),
            web.get("/info", self.info),
        ]

    async def dispatch(self, request: web.Request) -> web.StreamResponse:
        """What LoRAX's client calls: streams if the body says so, else answers a list of one."""
        body = await read_body(request, LoraxBody)
        if body.stream:
            return await self._streamed(request, body)
        return await self._whole(request, body, as_list=True)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        return await self._whole(request, await read_body(request, LoraxBody), as_list=False)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        return await self._streamed(request, await read_body(request, LoraxBody))

    async def info(self, request: web.Request) -> web.Response:
        model = self._engine.model
        return json_response(
            {
                "model_id": model.model,
                "model_sha": model.digest,
                "model_dtype": model.dtype,
                "model_device_type": model.device.partition(":")[0],
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": self._facts.max_queued_requests,
                "max_best_of": 128,
                "max_stop_sequences": 16,
                "max_input_length": model.max_model_len - 1,
                "max_total_tokens": model.max_model_len,
                "version": self._facts.version,
                "groups": [
                    {"tp": group.tp, "ready": group.ready, "weight_bytes": list(group.weight_bytes)}
                    for group in self._facts.groups()
                ],
            }
        )

    async def _whole(self, request: web.Request, body: LoraxBody, *, as_list: bool) -> web.Response:
        parameters = body.parameters or Parameters()
        call = lorax_call(body, request[CALLER], stream=False)
        times = [time.perf_counter()]
        async with self._frontend.generate(call) as generation:
            times.append(time.perf_counter())
            events: list[list[TextEvent]] = [[] for _ in range(call.n)]
            async for batch in generation:
                for text_event in batch:
                    events[text_event.index].append(text_event)
        times.append(time.perf_counter())
        answer = _Answer(generation, bool(parameters.return_full_text))
        reply = answer.whole(events, details=bool(parameters.details))
        response = json_response([reply] if as_list else reply)
        response.headers["x-compute-characters"] = str(len(body.inputs or ""))
        response.headers.update(_usage_headers(generation.usage, *times))
        response.headers.update(_model_headers(self._engine, call))
        return response

    async def _streamed(self, request: web.Request, body: LoraxBody) -> web.StreamResponse:
        call = lorax_call(body, request[CALLER], stream=True)
        headers = _model_headers(self._engine, call)
        return await send_events(request, self._stream(call, body), lorax=True, headers=headers)

    async def _stream(self, call: GenerateCall, body: LoraxBody) -> AsyncGenerator[bytes, None]:
        parameters = body.parameters or Parameters()
        async with self._frontend.generate(call) as generation:
            answer = _Answer(generation, bool(parameters.return_full_text))
            seen: list[TextEvent] = []
            late = ""
            async for batch in generation:
                parts: list[bytes] = []
                for text_event in batch:
                    seen.append(text_event)
                    late += text_event.text
                    if text_event.token is None and text_event.finish is None:
                        continue
                    parts.append(event(answer.stream_event(text_event, late, seen)))
                    late = ""
                if parts:
                    yield b"".join(parts)


class _Answer:
    """Text events in LoRAX's words."""

    def __init__(self, generation: Generation, full_text: bool) -> None:
        self._tokenizer = generation.tokenizer
        self._generation = generation
        self._prompt = generation.prompts[0]
        self._lead = generation.prompt_text(self._prompt) if full_text else ""

    def whole(self, events: list[list[TextEvent]], *, details: bool) -> dict[str, Any]:
        """The answer that is not streamed: of several sequences, the one the model holds most probable."""
        best = max(range(len(events)), key=lambda index: _mean_logprob(events[index]))
        reply: dict[str, Any] = {"generated_text": self.text(events[best])}
        if details:
            reply["details"] = self.details(best, events[best])
            others = [self.best_of_sequence(i, own) for i, own in enumerate(events) if i != best]
            reply["details"]["best_of_sequences"] = others or None
        return reply

    def text(self, events: list[TextEvent]) -> str:
        return self._lead + "".join(event.text for event in events)

    def details(self, index: int, events: list[TextEvent]) -> dict[str, Any]:
        return {
            "finish_reason": self._finish(events[-1]),
            "prompt_tokens": len(self._prompt.tokens),
            "generated_tokens": sum(event.token is not None for event in events),
            "seed": self._generation.seeds[index],
            "prefill": self._prefill(events),
            "tokens": [self._token(event, event.text) for event in events if event.token is not None],
        }

    def best_of_sequence(self, index: int, events: list[TextEvent]) -> dict[str, Any]:
        details = self.details(index, events)
        del details["prompt_tokens"]
        return {"generated_text": self.text(events), **details}

    def stream_event(self, event: TextEvent, text: str, seen: list[TextEvent]) -> dict[str, Any]:
        """`text`: this event's own and what came late before it; `seen`: all events of the stream so far."""
        body: dict[str, Any] = {"token": self._token(event, text), "generated_text": None, "details": None}
        if event.finish is not None:
            body["generated_text"] = self.text(seen)
            body["details"] = {
                "finish_reason": self._finish(event),
                "prompt_tokens": len(self._prompt.tokens),
                "generated_tokens": sum(other.token is not None for other in seen),
                "seed": self._generation.seeds[0],
            }
        return body

    def _token(self, event: TextEvent, text: str) -> dict[str, Any]:
        """A hidden token is special to LoRAX: its clients leave those out when they join texts.

        Its events always have a token: one that ends a stream without any gets id 0.
        """
        token = event.token or 0
        special = event.hidden or self._tokenizer.is_special(token)
        logprobs = event.logprobs
        body: dict[str, Any] = {
            "id": token,
            "text": self._tokenizer.token_text(token) if event.hidden else text,
            "logprob": finite(logprobs.logprob) if logprobs else 0.0,
            "special": special,
        }
        if logprobs and logprobs.top:
            body["alternative_tokens"] = [
                {"id": other, "text": self._tokenizer.token_text(other), "logprob": finite(value)}
                for other, value in logprobs.top
            ]
        return body

    def _prefill(self, events: list[TextEvent]) -> list[dict[str, Any]]:
        logprobs = next(
            (event.prompt_logprobs for event in events if event.prompt_logprobs is not None), None
        )
        if logprobs is None:
            return []
        return [
            {
                "id": token,
                "text": self._tokenizer.token_text(token),
                "logprob": None if token_logprobs is None else finite(token_logprobs.logprob),
            }
            for token, token_logprobs in zip(self._prompt.tokens, logprobs, strict=True)
        ]

    def _finish(self, event: TextEvent) -> str:
        if event.finish is FinishReason.LENGTH:
            return "length"
        return "eos_token" if event.stop in self._tokenizer.stop_ids else "stop_sequence"


def _mean_logprob(events: list[TextEvent]) -> float:
    values = [event.logprobs.logprob for event in events if event.logprobs is not None]
    return sum(values) / len(values) if values else 0.0


def _usage_headers(usage: Usage, started: float, submitted: float, ended: float) -> dict[str, str]:
    """Counts and times; the three arguments are moments on one clock, in seconds."""
    return {
        "x-prompt-tokens": str(usage.prompt_tokens),
        "x-generated-tokens": str(usage.completion_tokens),
        "x-total-tokens": str(usage.prompt_tokens + usage.completion_tokens),
        "x-total-time": _milliseconds(ended - started),
        "x-validation-time": _milliseconds(submitted - started),
        "x-inference-time": _milliseconds(ended - submitted),
        "x-time-per-token": _milliseconds((ended - submitted) / max(1, usage.completion_tokens)),
    }


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def _model_headers(engine: EngineClient, call: GenerateCall) -> dict[str, str]:
    """Names that are not plain ASCII stay out of headers."""
    adapters = ",".join(adapter.id for adapter in call.adapters)
    headers = {"x-model-id": engine.model.name, "x-adapter-id": call.model or adapters}
    return {
        name: value for name, value in headers.items() if value and value.isascii() and value.isprintable()
    }
