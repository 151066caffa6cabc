"""What completions and chat completions have in common: fields, identifiers, usage, logprobs, chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from ..call import GenerateCall, Prompt, Sampling, Stopping
from ..errors import InvalidRequest
from ..frontend import Usage
from ..request import AdapterChoice, FinishReason, TokenLogprobs
from ..tokenizer import Tokenizer
from .context import CALLER

_LOWEST: Final = -9999.0
"""Stands for a logprob of minus infinity, which JSON cannot say."""


class AdapterBody(msgspec.Struct):
    id: str
    weight: float | None = None

    @property
    def choice(self) -> AdapterChoice:
        return AdapterChoice(self.id, 1.0 if self.weight is None else self.weight)


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """Fields of both routes. Each may be null, which is as good as absent."""

    model: str | None = None
    adapters: list[AdapterBody] | None = None
    adapter_source: str | None = None
    adapter_token: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @property
    def wants_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only for streams: set stream to true", param="stream_options")


def build_call(
    body: GenerationBody,
    request: web.Request,
    prompts: list[Prompt],
    *,
    logprobs: int | None,
    echo: bool = False,
    default_max_tokens: int | None = None,
    field_names: Mapping[str, str] | None = None,
) -> GenerateCall:
    """The dialect-neutral call. With `echo` the prompt's logprobs are wanted as the output's are."""
    max_tokens, names = body.max_tokens, dict(field_names or {})
    if body.max_completion_tokens is not None:
        max_tokens, names["max_tokens"] = body.max_completion_tokens, "max_completion_tokens"
    return GenerateCall(
        id=new_id(),
        caller=request[CALLER],
        prompts=prompts,
        model=required_model(body.model),
        adapters=[adapter.choice for adapter in body.adapters or ()],
        adapter_source=body.adapter_source or "",
        hub_token=body.adapter_token or "",
        n=1 if body.n is None else body.n,
        echo=echo,
        sampling=_sampling(body, logprobs, logprobs if echo else None),
        stopping=Stopping(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            ignore_eos=bool(body.ignore_eos),
            strings=[body.stop] if isinstance(body.stop, str) else body.stop or (),
            token_ids=body.stop_token_ids or (),
        ),
        default_max_tokens=default_max_tokens,
        field_names=names,
    )


def _sampling(body: GenerationBody, logprobs: int | None, prompt_logprobs: int | None) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        logit_bias=body.logit_bias or {},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def required_model(model: str | None) -> str:
    if not model:
        raise InvalidRequest("model is needed: the name of the base model or of an adapter", param="model")
    return model


def new_id() -> str:
    return secrets.token_hex(12)


def now() -> int:
    return int(time.time())


def usage_body(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def finish_name(finish: FinishReason | None) -> str | None:
    return None if finish is None else finish.value


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


class ChunkFormat:
    """Writes the chunks of one stream. What does not change from token to token is encoded once.

    Args:
        head: the chunk's fields before `choices`.
        text_path: JSON between a choice's index and its text, and after the text: `,"text":` and nothing.
        choices: how many there are.
        null_usage: every chunk says that its usage is null, since the last one will tell it.
    """

    def __init__(
        self, head: dict[str, Any], text_path: tuple[bytes, bytes], *, choices: int, null_usage: bool
    ) -> None:
        opening, closing = text_path
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if null_usage else b"]}\n\n"
        self._before_text = [self._head + b'{"index":%d' % index + opening for index in range(choices)]
        self._after_text = closing + b',"logprobs":null,"finish_reason":null}' + self._tail
        self._encode = msgspec.json.Encoder().encode

    def text(self, index: int, text: str) -> bytes:
        """A chunk that only adds text to a choice: nearly every chunk."""
        return self._before_text[index] + self._encode(text) + self._after_text

    def choice(self, choice: dict[str, Any]) -> bytes:
        """A chunk with any choice."""
        return self._head + self._encode(choice) + self._tail

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that tells the usage."""
        return self._head + b'],"usage":' + self._encode(usage_body(usage)) + b"}\n\n"


def completion_top(tokenizer: Tokenizer, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
    """Alternatives by token text, most probable first, the token itself among them."""
    top = {tokenizer.token_text(other): finite(value) for other, value in logprobs.top}
    top.setdefault(tokenizer.token_text(token), finite(logprobs.logprob))
    return top


def chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }
