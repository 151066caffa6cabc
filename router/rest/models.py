"""GET /v1/models and /v1/models/{id}: the base and every adapter that the caller may name."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ..auth import Caller
from ..client import EngineClient
from ..sources import adapter_not_found
from .context import CALLER
from .errors import json_response
from .openai import now


class Models:
    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._created = now()

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/models", self.list_all), web.get("/v1/models/{id:.+}", self.get)]

    async def list_all(self, request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": self._models(request[CALLER])})

    async def get(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        for model in self._models(request[CALLER]):
            if model["id"] == name:
                return json_response(model)
        raise adapter_not_found(name)

    def _models(self, caller: Caller) -> list[dict[str, Any]]:
        base = self._engine.model
        adapters = [
            self._model(status.name, root=status.source, parent=base.name)
            for status in self._engine.adapters(tenant=caller.tenant)
            if caller.may_name(status.name)
        ]
        return [self._model(base.name, root=base.model, parent=None), *adapters]

    def _model(self, name: str, *, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "loraplex",
            "root": root,
            "parent": parent,
            "max_model_len": self._engine.model.max_model_len,
        }
