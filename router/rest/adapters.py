"""Adapters by hand: list, look at, pin, merge; and vLLM's load and unload."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from aiohttp import web

from ..call import check_choices
from ..client import AdapterQuery, AdapterStatus, EngineClient
from ..errors import InvalidRequest
from ..merges import MergeRecipe
from ..sources import adapter_not_found
from .body import read_body
from .context import CALLER
from .errors import json_response
from .openai import AdapterBody


class LoadBody(msgspec.Struct):
    lora_name: str | None = None
    lora_path: str | None = None
    pinned: bool | None = None
    scaling: float | None = None
    adapter_token: str | None = None


class UnloadBody(msgspec.Struct):
    lora_name: str | None = None


class MergeBody(msgspec.Struct):
    name: str | None = None
    adapters: list[AdapterBody] | None = None
    method: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None
    seed: int | None = None
    rank: int | None = None
    adapter_token: str | None = None


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
            web.post("/v1/adapters/merge", self.merge),
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
            name,
            source,
            tenant=caller.tenant,
            token=body.adapter_token or "",
            pin=bool(body.pinned),
            scaling=1.0 if body.scaling is None else body.scaling,
        )
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: web.Request) -> web.Response:
        body = await read_body(request, UnloadBody)
        name = _required(body.lora_name, "lora_name")
        caller = request[CALLER]
        caller.require(name)
        freed = await self._engine.unload_adapter(name, tenant=caller.tenant)
        return web.Response(
            text=f"Success: LoRA adapter '{name}' removed successfully.",
            headers={"x-bytes-freed": str(freed)},
        )

    async def merge(self, request: web.Request) -> web.Response:
        body = await read_body(request, MergeBody)
        name = _required(body.name, "name")
        choices = [adapter.choice for adapter in body.adapters or ()]
        check_choices(choices, "adapters")
        recipe = MergeRecipe.checked(
            _required(body.method, "method"),
            density=body.density,
            majority_sign_method=body.majority_sign_method or "",
            seed=body.seed or 0,
            rank=body.rank or 0,
        )
        caller = request[CALLER]
        for named in (name, *(choice.id for choice in choices)):
            caller.require(named)
        query = AdapterQuery(
            choices=choices, tenant=caller.tenant, token=body.adapter_token or "", merge=recipe
        )
        return json_response(_body(await self._engine.merge_adapters(name, query)))

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
