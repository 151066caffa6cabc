"""Adapters by hand: list, look at, pin; and vLLM's load and unload."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from aiohttp import web

from ..client import AdapterStatus, EngineClient
from ..errors import InvalidRequest
from ..sources import adapter_not_found
from .body import read_body
from .context import CALLER
from .errors import json_response


class LoadBody(msgspec.Struct):
    lora_name: str | None = None
    lora_path: str | None = None
    pinned: bool | None = None
    adapter_token: str | None = None


class UnloadBody(msgspec.Struct):
    lora_name: str | None = None


class PinBody(msgspec.Struct):
    pinned: bool | None = None


class Adapters:
    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/load_lora_adapter", self.load),
            web.post("/v1/unload_lora_adapter", self.unload),
            web.get("/v1/adapters", self.list_all),
            web.post("/v1/adapters/{name:.+}/pin", self.pin),
            web.get("/v1/adapters/{name:.+}", self.get),
        ]

    async def load(self, request: web.Request) -> web.Response:
        body = await read_body(request, LoadBody)
        name = _required(body.lora_name, "lora_name")
        source = _required(body.lora_path, "lora_path")
        if name == self._engine.model.name:
            raise InvalidRequest("lora_name is the base model's name: choose another", param="lora_name")
        caller = request[CALLER]
        caller.require(name)
        caller.require(source)
        await self._engine.load_adapter(
            name, source, tenant=caller.tenant, token=body.adapter_token or "", pin=bool(body.pinned)
        )
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: web.Request) -> web.Response:
        body = await read_body(request, UnloadBody)
        name = _required(body.lora_name, "lora_name")
        caller = request[CALLER]
        caller.require(name)
        await self._engine.unload_adapter(name, tenant=caller.tenant)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def list_all(self, request: web.Request) -> web.Response:
        caller = request[CALLER]
        statuses = self._engine.adapters(tenant=caller.tenant)
        data = [_body(status) for status in statuses if caller.may_name(status.name)]
        return json_response({"object": "list", "data": data})

    async def get(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        caller = request[CALLER]
        for status in self._engine.adapters(tenant=caller.tenant):
            if status.name == name and caller.may_name(name):
                return json_response(_body(status))
        raise adapter_not_found(name)

    async def pin(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        body = await read_body(request, PinBody)
        if body.pinned is None:
            raise InvalidRequest("pinned is needed: true or false", param="pinned")
        caller = request[CALLER]
        caller.require(name)
        return json_response(_body(await self._engine.pin_adapter(name, body.pinned, tenant=caller.tenant)))


def _required(value: str | None, name: str) -> str:
    if not value:
        raise InvalidRequest(f"{name} is needed", param=name)
    return value


def _body(status: AdapterStatus) -> dict[str, Any]:
    fields = {field.name: getattr(status, field.name) for field in dataclasses.fields(status)}
    return {**fields, "object": "adapter", "state": status.state.value}
