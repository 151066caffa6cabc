"""A server that speaks OpenAI's completions, streamed, and fails where it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Fault = Callable[[int, dict[str, Any]], str | None]
"""From the number of a request and its body to the name of what goes wrong with it."""


@dataclass
class FakeCompletions:
    """Answers every completion with the wanted number of tokens, `tokens_per_chunk` in each chunk."""

    adapters: Sequence[str] = ("a0", "a1")
    fault: Fault = lambda number, body: None
    pause: float = 0.0
    """Seconds before each chunk."""
    tokens_per_chunk: int = 1
    api_key: str = ""
    models_status: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve on a free port; answers the URL."""
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        try:
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        names = [{"id": name, "parent": "base"} for name in self.adapters]
        return web.json_response({"data": [*names, {"id": "base"}]}, status=self.models_status)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "the key is wrong"}}, status=401)
        number = len(self.bodies)
        self.bodies.append(body)
        fault = self.fault(number, body)
        if fault == "503":
            return web.json_response({"error": {"message": "the queue is full"}}, status=503)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._stream(request, body, fault)
        finally:
            self.running -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], fault: str | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        wanted = body["max_tokens"] - (fault == "short")
        for first in range(0, wanted, self.tokens_per_chunk):
            await asyncio.sleep(60 if fault == "stall" and first else self.pause)
            if fault == "hang up" and first:
                assert request.transport is not None
                request.transport.abort()
                return response
            if fault == "error" and first:
                await _send(response, {"error": {"message": "the device\nis lost"}})
                return response
            count = min(self.tokens_per_chunk, wanted - first)
            finish = ("stop" if fault == "stop" else "length") if first + count == wanted else None
            await _send(response, {"choices": [{"text": "x" * count, "finish_reason": finish}]})
            if fault == "early end":
                return response
            if fault == "garbage":
                await response.write(b"data: {nonsense\n\n")
        if fault != "no usage":
            await _send(response, {"choices": [], "usage": {"completion_tokens": wanted}})
        await response.write(b": a comment\n\ndata: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, event: object) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())
