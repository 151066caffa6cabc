"""Health and metrics."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ..client import EngineClient
from .errors import json_response


class Ops:
    def __init__(self, engine: EngineClient, registry: CollectorRegistry) -> None:
        self._engine = engine
        self._registry = registry

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health/live", self.live),
            web.get("/health/ready", self.ready),
            web.get("/health", self.ready),
            web.get("/metrics", self.metrics),
        ]

    async def live(self, request: web.Request) -> web.Response:
        return json_response({"status": "live"})

    async def ready(self, request: web.Request) -> web.Response:
        if self._engine.ready:
            return json_response({"status": "ready"})
        return json_response({"status": "not ready"}, status=503)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )
