"""The REST application: routes, keys, request ids, errors; and the server that runs it."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry

from ..auth import ApiKeys
from ..client import EngineClient
from ..errors import PayloadTooLarge
from ..frontend import Frontend
from .adapters import Adapters
from .chat import ChatCompletions
from .completions import Completions
from .context import CALLER, REQUEST_ID
from .errors import error_response, http_error_response, json_response, openai_error, typed
from .lorax import Lorax, ServerFacts
from .models import Models
from .ops import Ops
from .tokenize import Tokenize

_HEALTH_PATHS: Final = frozenset({"/health", "/health/live", "/health/ready"})
"""The only paths that need no key."""
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HEADER_BYTES: Final = 8190
_KEEPALIVE_SECONDS: Final = 75.0
_LINGER_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestServices:
    """What the routes stand on."""

    engine: EngineClient
    frontend: Frontend
    keys: ApiKeys
    registry: CollectorRegistry
    facts: ServerFacts
    max_body_bytes: int


def build_app(services: RestServices) -> web.Application:
    """The application with all routes. Nothing listens yet."""
    app = web.Application(
        middlewares=[_edge(services.keys, services.max_body_bytes)],
        client_max_size=services.max_body_bytes,
    )
    app.on_response_prepare.append(_add_request_id)
    engine, frontend = services.engine, services.frontend
    dialects = (
        Completions(frontend),
        ChatCompletions(frontend),
        Models(engine),
        Adapters(engine),
        Tokenize(engine, frontend),
        Lorax(frontend, engine, services.facts),
        Ops(engine, services.registry),
    )
    for dialect in dialects:
        app.add_routes(dialect.routes())
    return app


def _edge(keys: ApiKeys, max_body_bytes: int) -> Middleware:
    """The outermost handler: gives each request an id, wants a key but for health, answers every error."""

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("x-request-id", "")
        request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        try:
            _admit(request, keys, max_body_bytes)
            return await handler(request)
        except web.HTTPException as error:
            return http_error_response(error, request.path)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the process's edge: logged and typed
            return error_response(typed(error, request[REQUEST_ID]), request.path)

    return handle


def _admit(request: web.Request, keys: ApiKeys, max_body_bytes: int) -> None:
    """Raises Unauthenticated or PayloadTooLarge. Judges the path as it was sent, not as it is routed."""
    if request.raw_path.partition("?")[0] not in _HEALTH_PATHS:
        request[CALLER] = keys.authenticate(request.headers.get("Authorization"))
    if (request.content_length or 0) > max_body_bytes:
        raise PayloadTooLarge(f"The body is larger than {max_body_bytes} bytes: send less at once.")


async def _add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]


class _Connection(web.RequestHandler):
    """One HTTP connection; says in JSON, and with the right status, what it could not parse."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status == 400 and (isinstance(exc, LineTooLong) or "Too many headers" in (message or "")):
            status, text = 431, f"A header line is longer than {_HEADER_BYTES} bytes, or there are too many."
        elif status == 400:
            text = "This is not a well-formed HTTP request."
        else:
            return super().handle_error(request, status, exc, message)
        response = json_response(
            openai_error(text, kind="invalid_request_error", code="invalid_request"), status=status
        )
        response.force_close()
        return response


class RestServer:
    """Serves an application on one address."""

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, a free one if 0 was asked for. Raises OSError if the address is taken."""
        await self._runner.setup()
        manager = self._runner.server
        assert manager is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(
                manager,
                loop=loop,
                access_log=None,  # type: ignore[arg-type]  # it may be None, says aiohttp's code
                keepalive_timeout=_KEEPALIVE_SECONDS,
                lingering_time=_LINGER_SECONDS,
                max_line_size=_HEADER_BYTES,
                max_field_size=_HEADER_BYTES,
            ),
            host,
            port,
            backlog=1024,
        )
        listener: socket.socket = self._server.sockets[0]
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and end every connection; running handlers are cancelled."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
