"""POST /tokenize and /detokenize, by the tokenizer of the base or of an adapter."""

from __future__ import annotations

import msgspec
from aiohttp import web

from ..client import EngineClient
from ..errors import InvalidRequest
from ..frontend import Frontend
from .body import read_body
from .chat import Message, chat_prompt
from .context import CALLER
from .errors import json_response


class TokenizeBody(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(msgspec.Struct):
    model: str | None = None
    tokens: list[int] | None = None


class Tokenize:
    def __init__(self, engine: EngineClient, frontend: Frontend) -> None:
        self._engine = engine
        self._frontend = frontend

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/tokenize", self.tokenize), web.post("/detokenize", self.detokenize)]

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        tokenizer, _ = await self._frontend.tokenizer_of(request[CALLER], body.model or "")
        if body.prompt is not None:
            add = body.add_special_tokens is not False
            tokens = await tokenizer.encode(body.prompt, add_special_tokens=add)
        else:
            tokens = await tokenizer.encode_chat(chat_prompt(body.messages).messages)
        reply = {"count": len(tokens), "max_model_len": self._engine.model.max_model_len, "tokens": tokens}
        return json_response(reply)

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request, DetokenizeBody)
        if body.tokens is None:
            raise InvalidRequest("tokens is needed: a list of token ids", param="tokens")
        tokenizer, vocab_size = await self._frontend.tokenizer_of(request[CALLER], body.model or "")
        if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < vocab_size):
            raise InvalidRequest(
                f"tokens holds a token id that is not between 0 and {vocab_size - 1}", param="tokens"
            )
        return json_response({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})
