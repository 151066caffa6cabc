"""Errors as HTTP answers: OpenAI's shape on its routes, LoRAX's on its own."""

from __future__ import annotations

import logging
import math
from typing import Any, Final

import msgspec
from aiohttp import web

from ..errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    Draining,
    InternalError,
    InvalidRequest,
    NumericalError,
    Overloaded,
    PayloadTooLarge,
    RouterError,
    ShardLost,
    TooManyRequests,
    Unauthenticated,
)

_log = logging.getLogger(__name__)

LORAX_PATHS: Final = frozenset({"/", "/generate", "/generate_stream", "/info"})
"""Routes that answer errors as LoRAX does."""

_PASSING: Final = (TooManyRequests, Overloaded, Draining, ShardLost)
"""Errors after which the same request may well succeed, even if nobody said when."""

_LORAX: Final[dict[type[RouterError], tuple[int, str]]] = {
    InvalidRequest: (422, "validation"),
    PayloadTooLarge: (413, "validation"),
    Unauthenticated: (401, "authentication"),
    AdapterNotFound: (424, "generation"),
    AdapterRejected: (424, "generation"),
    AdapterFetchFailed: (424, "generation"),
    NumericalError: (424, "generation"),
    TooManyRequests: (429, "overloaded"),
    Overloaded: (429, "overloaded"),
    Draining: (503, "overloaded"),
}
_LORAX_OTHER: Final = (500, "incomplete_generation")


def typed(error: Exception, request_id: str) -> RouterError:
    """The error itself if it is typed; anything else is a bug: it is logged and becomes an InternalError."""
    if isinstance(error, RouterError):
        return error
    _log.error("request %s failed unexpectedly", request_id, exc_info=error)
    return InternalError(f"The server made a mistake; its log has details under request id {request_id}.")


def error_body(error: RouterError, *, lorax: bool) -> dict[str, Any]:
    """What a client reads, in either shape. Also what a stream that has begun sends as its last event."""
    if lorax:
        return {"error": error.message, "error_type": _LORAX.get(type(error), _LORAX_OTHER)[1]}
    return openai_error(error.message, kind=error.kind, param=error.param, code=error.code)


def openai_error(message: str, *, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: RouterError, path: str) -> web.Response:
    """The whole answer, with the headers that tell a client whether and when to try again."""
    lorax = path in LORAX_PATHS
    status = _LORAX.get(type(error), _LORAX_OTHER)[0] if lorax else error.http_status
    response = json_response(error_body(error, lorax=lorax), status=status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif isinstance(error, _PASSING):
        response.headers["Retry-After"] = "1"
    else:
        response.headers["x-should-retry"] = "false"
    if isinstance(error, Unauthenticated):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def http_error_response(error: web.HTTPException, path: str) -> web.Response:
    """aiohttp's own refusals (no such route, wrong method), in our shape."""
    messages = {404: "There is no such route.", 405: "This route does not take that method."}
    message = messages.get(error.status, error.reason)
    if path in LORAX_PATHS:
        body: dict[str, Any] = {"error": message, "error_type": "validation"}
    else:
        body = openai_error(message, kind="invalid_request_error", code="invalid_request")
    response = json_response(body, status=error.status)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def json_response(body: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")
