"""The public gRPC service `loraplex.v1.Router`, with health and reflection beside it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..proto import router_pb2 as pb
from .auth import ApiKeys, Caller
from .call import Chat, GenerateCall, Prompt, Sampling, Stopping, check_choices
from .client import AdapterQuery, AdapterStatus, EngineClient
from .errors import InvalidRequest, Unauthenticated
from .frontend import Frontend, Generation
from .grpc_errors import abort, answering_errors
from .merges import MergeRecipe
from .output import TextEvent
from .request import AdapterChoice, TokenLogprobs
from .tokenizer import Tokenizer

_Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request", bound=Message)
_Continuation: TypeAlias = (
    "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]"
)

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Router"].full_name
_HEALTH_PREFIX: Final = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"
_WATCH_SECONDS: Final = 1.0
_SOURCES: Final = ("", "hub", "local", "s3")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcServices:
    """What the service stands on. `version`: of loraplex."""

    engine: EngineClient
    frontend: Frontend
    keys: ApiKeys
    version: str
    max_message_bytes: int


def build_server(services: GrpcServices) -> grpc.aio.Server:
    """A server with the router's service, health and reflection. It has no port yet, and is not started."""
    server = grpc.aio.server(
        interceptors=[_KeyInterceptor(services.keys)],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", services.max_message_bytes),
            ("grpc.max_concurrent_streams", 1024),
        ],
    )
    server.add_generic_rpc_handlers([_method_handlers(RouterService(services))])
    health_pb2_grpc.add_HealthServicer_to_server(_Health(services.engine), server)
    health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((SERVICE, health, reflection.SERVICE_NAME), server)
    return server


class RouterService:
    """Translates messages to calls of the frontend and the engine, and back."""

    def __init__(self, services: GrpcServices) -> None:
        self._engine = services.engine
        self._frontend = services.frontend
        self._keys = services.keys
        self._version = services.version

    async def Generate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.GenerateEvent]:
        call = _call(request, self._caller(context))
        model = request.model or self._engine.model.name
        async with self._frontend.generate(call) as generation:
            async for batch in generation:
                yield _event(call.id, model, batch, generation)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: _Context) -> pb.Adapter:
        name, source = _required(request.name, "name"), _required(request.source, "source")
        if name == self._engine.model.name:
            raise InvalidRequest("name is the base model's: choose another", param="name")
        caller = self._caller(context)
        caller.require(name)
        caller.require(source)
        return _adapter(
            await self._engine.load_adapter(
                name,
                source,
                tenant=caller.tenant,
                token=request.token,
                pin=request.pin,
                scaling=request.scaling if request.HasField("scaling") else 1.0,
            )
        )

    async def MergeAdapters(self, request: pb.MergeAdaptersRequest, context: _Context) -> pb.Adapter:
        name, caller = _required(request.name, "name"), self._caller(context)
        choices = _choices(request.adapters)
        check_choices(choices, "adapters")
        recipe = MergeRecipe.checked(
            _required(request.method, "method"),
            density=request.density if request.HasField("density") else None,
            majority_sign_method=request.majority_sign_method,
            seed=request.seed,
            rank=request.rank,
        )
        for named in (name, *(choice.id for choice in choices)):
            caller.require(named)
        query = AdapterQuery(choices=choices, tenant=caller.tenant, merge=recipe)
        return _adapter(await self._engine.merge_adapters(name, query))

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: _Context
    ) -> pb.UnloadAdapterReply:
        name, caller = _required(request.name, "name"), self._caller(context)
        caller.require(name)
        freed = await self._engine.unload_adapter(name, tenant=caller.tenant)
        return pb.UnloadAdapterReply(bytes=freed)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: _Context) -> pb.ListAdaptersReply:
        caller = self._caller(context)
        statuses = self._engine.adapters(tenant=caller.tenant)
        return pb.ListAdaptersReply(adapters=[_adapter(s) for s in statuses if caller.may_name(s.name)])

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: _Context) -> pb.Adapter:
        name, caller = _required(request.name, "name"), self._caller(context)
        caller.require(name)
        return _adapter(await self._engine.pin_adapter(name, request.pinned, tenant=caller.tenant))

    async def Info(self, request: pb.InfoRequest, context: _Context) -> pb.InfoReply:
        model = self._engine.model
        return pb.InfoReply(
            model=model.name,
            version=self._version,
            dtype=model.dtype,
            device=model.device,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
        )

    def _caller(self, context: _Context) -> Caller:
        return self._keys.authenticate(_authorization(context.invocation_metadata()))


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 as the engine sees itself. A probe only looks: it queues no work."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return self._response()

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        unknown = request.service not in ("", SERVICE)
        last = None
        while True:
            response = (
                health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if unknown
                else self._response()
            )
            if response != last:
                yield response
            last = response
            await asyncio.sleep(_WATCH_SECONDS)

    def _response(self) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self._engine.ready else status.NOT_SERVING)


class _KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without a valid key, also to methods that do not exist; all but health."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not handler_call_details.method.startswith(_HEALTH_PREFIX):
            try:
                self._keys.authenticate(_authorization(handler_call_details.invocation_metadata))
            except Unauthenticated as error:
                return _refusing(error)
        return await continuation(handler_call_details)


def _refusing(error: Unauthenticated) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(requests: AsyncIterator[bytes], context: _Context) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            return value
    return None


def _method_handlers(service: RouterService) -> grpc.GenericRpcHandler:
    """Handlers that answer errors with rich statuses, and bytes that are no message with INVALID_ARGUMENT."""
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Generate": _streaming(service.Generate, pb.GenerateRequest),
            "LoadAdapter": _unary(service.LoadAdapter, pb.LoadAdapterRequest),
            "UnloadAdapter": _unary(service.UnloadAdapter, pb.UnloadAdapterRequest),
            "ListAdapters": _unary(service.ListAdapters, pb.ListAdaptersRequest),
            "PinAdapter": _unary(service.PinAdapter, pb.PinAdapterRequest),
            "MergeAdapters": _unary(service.MergeAdapters, pb.MergeAdaptersRequest),
            "Info": _unary(service.Info, pb.InfoRequest),
        },
    )


def _unary(
    method: Callable[[_Request, _Context], Awaitable[Message]], request_type: type[_Request]
) -> grpc.RpcMethodHandler[Any, Any]:
    async def handle(raw: bytes, context: _Context) -> Message:
        async with answering_errors(context):
            return await method(_parse(raw, request_type), context)

    return grpc.unary_unary_rpc_method_handler(handle, response_serializer=_serialize)


def _streaming(
    method: Callable[[_Request, _Context], AsyncIterator[Message]], request_type: type[_Request]
) -> grpc.RpcMethodHandler[Any, Any]:
    async def handle(raw: bytes, context: _Context) -> AsyncIterator[Message]:
        async with answering_errors(context):
            async for reply in method(_parse(raw, request_type), context):
                yield reply

    return grpc.unary_stream_rpc_method_handler(handle, response_serializer=_serialize)


def _parse(raw: bytes, request_type: type[_Request]) -> _Request:
    try:
        return request_type.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"The request is not a valid {request_type.DESCRIPTOR.full_name}.") from error


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _call(request: pb.GenerateRequest, caller: Caller) -> GenerateCall:
    if request.adapter_source not in _SOURCES:
        raise InvalidRequest("adapter_source must be hub, local or s3", param="adapter_source")
    params = request.params
    given: dict[str, Any] = {field.name: value for field, value in params.ListFields()}
    return GenerateCall(
        id=secrets.token_hex(12),
        caller=caller,
        prompts=[_prompt(request)],
        model=request.model,
        adapters=_choices(request.adapters),
        adapter_source=request.adapter_source,
        sampling=Sampling(
            temperature=given.get("temperature"),
            top_k=given.get("top_k"),
            top_p=given.get("top_p"),
            min_p=given.get("min_p"),
            repetition_penalty=given.get("repetition_penalty"),
            presence_penalty=given.get("presence_penalty"),
            frequency_penalty=given.get("frequency_penalty"),
            seed=given.get("seed"),
            logit_bias=dict(params.logit_bias),
            logprobs=given.get("logprobs"),
            prompt_logprobs=given.get("prompt_logprobs"),
        ),
        stopping=Stopping(
            max_tokens=given.get("max_tokens"),
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
            strings=list(params.stop),
            token_ids=list(params.stop_token_ids),
        ),
    )


def _choices(adapters: Iterable[pb.AdapterRef]) -> list[AdapterChoice]:
    return [AdapterChoice(a.id, a.weight if a.HasField("weight") else 1.0) for a in adapters]


def _prompt(request: pb.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "tokens":
            return list(request.tokens.ids)
        case "chat":
            return Chat(
                tuple({"role": message.role, "content": message.content} for message in request.chat.messages)
            )
        case _:
            raise InvalidRequest("prompt is needed: text, tokens or chat", param="prompt")


def _event(call_id: str, model: str, batch: list[TextEvent], generation: Generation) -> pb.GenerateEvent:
    """One message for all events that were waiting."""
    tokenizer = generation.tokenizer
    shown = [event for event in batch if event.token is not None and not event.hidden]
    message = pb.GenerateEvent(
        id=call_id,
        model=model,
        text="".join(event.text for event in batch),
        token_ids=[event.token for event in shown if event.token is not None],
    )
    for event in batch:
        if event.prompt_logprobs is not None:
            pairs = zip(generation.prompts[0].tokens, event.prompt_logprobs, strict=True)
            message.prompt_logprobs.extend(_logprob(tokenizer, token, logprobs) for token, logprobs in pairs)
    for event in shown:
        if event.token is not None and event.logprobs is not None:
            message.logprobs.append(_logprob(tokenizer, event.token, event.logprobs))
    if batch[-1].finish is not None:
        usage = generation.usage
        message.finish_reason = batch[-1].finish.value
        message.usage.prompt_tokens = usage.prompt_tokens
        message.usage.completion_tokens = usage.completion_tokens
    return message


def _logprob(tokenizer: Tokenizer, token: int, logprobs: TokenLogprobs | None) -> pb.Logprob:
    message = pb.Logprob(token_id=token, token=tokenizer.token_text(token))
    if logprobs is not None:
        message.logprob = logprobs.logprob
        message.top.extend(
            pb.TopLogprob(token_id=other, token=tokenizer.token_text(other), logprob=value)
            for other, value in logprobs.top
        )
    return message


def _adapter(status: AdapterStatus) -> pb.Adapter:
    return pb.Adapter(
        name=status.name,
        source=status.source,
        state=status.state.value,
        digest=status.digest,
        bytes=status.bytes,
        max_rank=status.max_rank,
        pinned=status.pinned,
        running=status.running,
        waiting=status.waiting,
        error=status.error,
        kind=status.kind,
        scaling=status.scaling,
        warnings=status.warnings,
    )


def _required(value: str, name: str) -> str:
    if not value:
        raise InvalidRequest(f"{name} is needed", param=name)
    return value
