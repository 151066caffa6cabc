"""A small streaming client: many completions at once, each checked for completeness."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Streamed:
    """One finished stream."""

    text: str = ""
    finish: str | None = None
    done: bool = False
    """`[DONE]` was seen."""
    error: Any = None
    status: int = 0
    arrivals: list[float] = field(default_factory=list)
    """Monotonic time of each chunk that brought text."""

    @property
    def longest_pause(self) -> float:
        return max((b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0.0)


async def stream_one(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Streamed:
    result = Streamed()
    async with session.post(f"{url}/v1/completions", json=body | {"stream": True}) as response:
        result.status = response.status
        if response.status != 200:
            result.error = await response.json()
            return result
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                result.done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                result.error = event["error"]
                continue
            for choice in event["choices"]:
                if choice["text"]:
                    result.text += choice["text"]
                    result.arrivals.append(time.monotonic())
                result.finish = choice["finish_reason"] or result.finish
    return result


def client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120), trust_env=False
    )


async def stream_all(url: str, bodies: Sequence[dict[str, Any]]) -> list[Streamed]:
    """All bodies at once; answers in their order."""
    async with client() as session:
        return await asyncio.gather(*(stream_one(session, url, body) for body in bodies))
