from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from loraplex.proto import router_pb2 as pb
from loraplex.proto import router_pb2_grpc
from loraplex.router.auth import ApiKeys, Caller, _digest
from loraplex.router.errors import NumericalError, Overloaded, ShardLost
from loraplex.router.grpc_api import SERVICE, GrpcServices, build_server
from loraplex.router.merges import MergeRecipe
from loraplex.router.request import TokenEvent

from ..fakes.engine import play
from .conftest import byte_level_library_tokenizer

LIBRARY = byte_level_library_tokenizer()
OPTIONS = [("grpc.enable_http_proxy", 0)]


def spell(text: str) -> list[int]:
    return [LIBRARY.encode(letter).ids[0] for letter in text]


@pytest.fixture
async def serve_grpc(engine, frontend):
    servers, channels = [], []

    async def start(keys: ApiKeys | None = None) -> grpc.aio.Channel:
        services = GrpcServices(
            engine=engine,
            frontend=frontend,
            keys=keys or ApiKeys(),
            version="1.2.3",
            max_message_bytes=1 << 20,
        )
        server = build_server(services)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS))
        return channels[-1]

    yield start
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.stop(None)


@pytest.fixture
async def channel(serve_grpc):
    return await serve_grpc()


@pytest.fixture
def stub(channel):
    return router_pb2_grpc.RouterStub(channel)


def request(**fields) -> pb.GenerateRequest:
    fields.setdefault("params", pb.GenerationParams(max_tokens=4))
    if not {"tokens", "chat"} & set(fields):
        fields.setdefault("text", "hello world")
    return pb.GenerateRequest(**fields)


async def generate(stub, **fields) -> list[pb.GenerateEvent]:
    return [event async for event in stub.Generate(request(**fields))]


async def refused(call) -> tuple[grpc.aio.AioRpcError, dict]:
    """The error of a call, and its details by message name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details = {}
    status = rpc_status.from_call(caught.value)
    for packed in status.details if status else ():
        kind = getattr(error_details_pb2, packed.type_url.rsplit(".", 1)[1])
        details[kind.__name__] = kind.FromString(packed.value)
    return caught.value, details


async def test_generate(stub):
    events = await generate(stub)
    ids = LIBRARY.encode("hello world").ids
    assert "".join(event.text for event in events) == LIBRARY.decode(ids[:4])
    assert [token for event in events for token in event.token_ids] == ids[:4]
    assert [event.finish_reason for event in events] == [""] * (len(events) - 1) + ["length"]
    assert (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens) == (len(ids), 4)
    assert {event.model for event in events} == {"base"}
    assert len({event.id for event in events}) == 1


async def test_prompts_of_every_form(stub, engine):
    await generate(stub, tokens=pb.TokenIds(ids=spell("abc")))
    await generate(stub, chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
    assert list(engine.requests[0].prompt) == spell("abc")
    assert list(engine.requests[1].prompt) == LIBRARY.encode("<|user|>hi\n<|assistant|>").ids


async def test_every_parameter_reaches_the_engine(stub, engine):
    params = pb.GenerationParams(
        max_tokens=3, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5,
        presence_penalty=0.5, frequency_penalty=-0.5, seed=2**64 - 1, logit_bias={5: -2.0},
        stop_token_ids=[9], min_tokens=1, ignore_eos=True, logprobs=2, prompt_logprobs=1,
    )  # fmt: skip
    adapters = [pb.AdapterRef(id="upper", weight=0.5), pb.AdapterRef(id="reverse")]
    events = await generate(stub, params=params, adapters=adapters, adapter_source="hub")
    found = engine.requests[0].params
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.5, 7, 0.25, 0.125)
    assert (found.repetition_penalty, found.presence_penalty, found.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (found.seed, found.logit_bias, found.stop_ids, found.min_tokens) == (2**64 - 1, {5: -2.0}, (9,), 1)
    assert [use.weight for use in engine.requests[0].adapters] == [0.5, 1.0]
    prompt_logprobs = [entry for event in events for entry in event.prompt_logprobs]
    assert not prompt_logprobs[0].HasField("logprob")
    assert len(prompt_logprobs) == len(engine.requests[0].prompt)
    logprobs = [entry for event in events for entry in event.logprobs]
    assert [len(entry.top) for entry in logprobs] == [2, 2, 2]
    assert logprobs[0].logprob == -0.5


async def test_zero_is_not_absent(stub, engine):
    await generate(stub, params=pb.GenerationParams(max_tokens=1, temperature=0.0, seed=0))
    await generate(stub, params=pb.GenerationParams(max_tokens=1))
    assert engine.requests[0].params.temperature == 0.0
    assert engine.requests[0].params.seed == 0
    assert engine.requests[1].params.temperature == 1.0


async def test_a_stop_string_cuts_the_text(stub, engine):
    engine.script = play(spell("abcdefgh"))
    engine.delay = 0.005
    events = await generate(stub, params=pb.GenerationParams(max_tokens=50, stop=["de"]))
    assert "".join(event.text for event in events) == "abc"
    assert [token for event in events for token in event.token_ids] == spell("abc")
    assert events[-1].finish_reason == "stop"
    assert len(engine.cancelled) == 1


async def test_a_cancelled_call_cancels_the_request(stub, engine):
    engine.delay = 0.01
    call = stub.Generate(request(params=pb.GenerationParams(max_tokens=400)))
    await call.read()
    call.cancel()
    async with asyncio.timeout(30):
        while engine.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": ""}, "prompt"),
        ({"tokens": pb.TokenIds(ids=[400])}, "prompt"),
        ({"params": pb.GenerationParams(max_tokens=0)}, "max_tokens"),
        ({"params": pb.GenerationParams(max_tokens=2**32 - 1)}, "max_tokens"),
        ({"params": pb.GenerationParams(temperature=float("nan"))}, "temperature"),
        ({"params": pb.GenerationParams(top_p=float("inf"))}, "top_p"),
        ({"params": pb.GenerationParams(logprobs=21)}, "logprobs"),
        ({"params": pb.GenerationParams(stop=[""])}, "stop"),
        ({"adapters": [pb.AdapterRef(id="upper", weight=float("nan"))]}, "adapters"),
        ({"adapter_source": "ftp"}, "adapter_source"),
    ],
)
async def test_bad_fields_are_named(stub, engine, fields, field):
    error, details = await refused(generate(stub, **fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == field
    assert details["ErrorInfo"].reason == "invalid_request"
    assert details["ErrorInfo"].domain == "loraplex"
    assert engine.requests == []


async def test_no_prompt_at_all(stub):
    _, details = await refused(_drain(stub.Generate(pb.GenerateRequest())))
    assert details["BadRequest"].field_violations[0].field == "prompt"


async def _drain(call) -> None:
    async for _ in call:
        pass


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (Overloaded("full", retry_after=1.5), grpc.StatusCode.UNAVAILABLE),
        (NumericalError("not finite"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_typed_errors_keep_code_and_retry(stub, engine, raised, code):
    engine.refusal = raised
    error, details = await refused(generate(stub))
    assert (error.code(), error.details()) == (code, raised.message)
    assert details["ErrorInfo"].reason == raised.code
    assert ("RetryInfo" in details) == (raised.retry_after is not None)
    if raised.retry_after:
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1500


async def test_an_error_midway_follows_the_events_before_it(stub, engine):
    def script(request):
        yield TokenEvent(spell("a"))
        yield ShardLost("the shard died")

    engine.script = script
    call = stub.Generate(request())
    assert (await call.read()).text == "a"
    error, _ = await refused(call.read())
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the shard died")


async def test_a_bug_is_logged_and_leaks_nothing(stub, engine, caplog):
    engine.script = lambda request: iter([TokenEvent((object(),))])
    error, _ = await refused(generate(stub))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "object" not in error.details()
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("method", ["Info", "Generate"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(channel, method):
    make = channel.unary_unary if method == "Info" else channel.unary_stream
    call = make(f"/{SERVICE}/{method}")(b"\xff\xff\xff")
    error, _ = await refused(call if method == "Info" else _drain(call))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "DecodeError" not in error.details()
    assert "loraplex.v1" in error.details()


async def test_adapters(stub):
    adapter = await stub.LoadAdapter(pb.LoadAdapterRequest(name="new", source="org/repo", pin=True))
    assert (adapter.name, adapter.state, adapter.pinned, adapter.bytes) == ("new", "resident", True, 64)
    assert (adapter.kind, adapter.scaling, adapter.warnings) == ("LoRA", 1.0, ["odd"])
    zero = await stub.LoadAdapter(pb.LoadAdapterRequest(name="new", source="org/repo", scaling=0.0))
    assert zero.scaling == 0.0
    assert not (await stub.PinAdapter(pb.PinAdapterRequest(name="new", pinned=False))).pinned
    listed = await stub.ListAdapters(pb.ListAdaptersRequest())
    assert [entry.name for entry in listed.adapters] == ["upper", "reverse", "org/nested", "new"]
    assert (await stub.UnloadAdapter(pb.UnloadAdapterRequest(name="new"))).bytes == 64
    error, details = await refused(stub.UnloadAdapter(pb.UnloadAdapterRequest(name="new")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details["ErrorInfo"].reason == "model_not_found"
    error, details = await refused(stub.LoadAdapter(pb.LoadAdapterRequest(name="x")))
    assert details["BadRequest"].field_violations[0].field == "source"


async def test_merge(stub, engine):
    both = [pb.AdapterRef(id="upper", weight=0.5), pb.AdapterRef(id="reverse")]
    fields = {"name": "both", "adapters": both, "method": "ties_svd", "density": 0.5, "rank": 4}
    adapter = await stub.MergeAdapters(pb.MergeAdaptersRequest(**fields))
    assert (adapter.name, adapter.state) == ("both", "resident")
    (query,) = engine.queries
    assert [(choice.id, choice.weight) for choice in query.choices] == [("upper", 0.5), ("reverse", 1.0)]
    assert query.merge == MergeRecipe("ties_svd", 0.5, rank=4)
    for other, field in (
        ({"name": ""}, "name"),
        ({"method": ""}, "method"),
        ({"method": "sum"}, "method"),
        ({"density": None}, "density"),
        ({"adapters": [*both, pb.AdapterRef()]}, "adapters"),
    ):
        error, details = await refused(stub.MergeAdapters(pb.MergeAdaptersRequest(**{**fields, **other})))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == field


async def test_info(stub):
    info = await stub.Info(pb.InfoRequest())
    assert (info.model, info.version, info.max_model_len, info.vocab_size) == (
        "base",
        "1.2.3",
        512,
        LIBRARY.get_vocab_size(),
    )


@pytest.fixture
async def locked(serve_grpc):
    return await serve_grpc(ApiKeys({_digest("sesame"): Caller("acme", ("up*",))}))


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", "sesame"),)]
)
async def test_every_method_needs_the_key(locked, metadata):
    stub = router_pb2_grpc.RouterStub(locked)
    reflect = reflection_pb2_grpc.ServerReflectionStub(locked)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    for call in (
        stub.Info(pb.InfoRequest(), metadata=metadata),
        _drain(stub.Generate(request(), metadata=metadata)),
        stub.ListAdapters(pb.ListAdaptersRequest(), metadata=metadata),
        _drain(reflect.ServerReflectionInfo(iter([question]), metadata=metadata)),
        locked.unary_unary("/no.such/Method")(b"", metadata=metadata),
    ):
        error, details = await refused(call)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert details["ErrorInfo"].reason == "invalid_api_key"


async def test_a_key_opens_the_tenants_adapters_only(locked, engine):
    stub = router_pb2_grpc.RouterStub(locked)
    metadata = (("authorization", "Bearer sesame"),)
    await _drain(stub.Generate(request(model="upper"), metadata=metadata))
    assert engine.requests[0].tenant == "acme"
    listed = await stub.ListAdapters(pb.ListAdaptersRequest(), metadata=metadata)
    assert [entry.name for entry in listed.adapters] == ["upper"]
    for call in (
        _drain(stub.Generate(request(model="reverse"), metadata=metadata)),
        stub.PinAdapter(pb.PinAdapterRequest(name="reverse"), metadata=metadata),
        stub.UnloadAdapter(pb.UnloadAdapterRequest(name="reverse"), metadata=metadata),
        stub.LoadAdapter(pb.LoadAdapterRequest(name="upper", source="org/secret"), metadata=metadata),
        stub.MergeAdapters(
            pb.MergeAdaptersRequest(name="up2", method="cat", adapters=[pb.AdapterRef(id="reverse")]),
            metadata=metadata,
        ),
    ):
        error, _ = await refused(call)
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_health_follows_the_engine_and_needs_no_key(locked, engine):
    health = health_pb2_grpc.HealthStub(locked)
    for service in ("", SERVICE):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    engine.ready = False
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    error, _ = await refused(health.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_names_the_services(channel):
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflect.ServerReflectionInfo(iter([question]))
    names = {service.name async for answer in call for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
