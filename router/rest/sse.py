"""Server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, Final

import msgspec
from aiohttp import web

from .context import REQUEST_ID
from .errors import error_body, typed

DONE: Final = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def send_events(
    request: web.Request,
    chunks: AsyncGenerator[bytes, None],
    *,
    lorax: bool = False,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> web.StreamResponse:
    """Stream chunks of whole events.

    Headers go out with the first chunk, so that an error before it has its status. An error after it is the
    stream's last event: nothing follows it, no [DONE] either.
    """
    response: web.StreamResponse | None = None
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                if response is None:
                    response = web.StreamResponse(headers={**_HEADERS, **headers})
                    await response.prepare(request)
                await response.write(chunk)
        except ConnectionError:
            # The client has gone; closing `chunks` cancels its generation.
            pass
        except Exception as error:
            # With headers sent, this is the request's outermost edge.
            if response is None:
                raise
            await response.write(event(error_body(typed(error, request[REQUEST_ID]), lorax=lorax)))
    if response is None:
        raise ConnectionResetError("the client has gone")
    return response


_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
