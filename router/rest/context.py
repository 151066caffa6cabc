"""What the edge notes on each request for its handler."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from ..auth import Caller

REQUEST_ID: Final = web.RequestKey("request_id", str)
CALLER: Final = web.RequestKey("caller", Caller)
"""Set on every request but health probes."""
