"""LoRAX's routes, read back through structs with the fields that lorax-client 0.6 requires."""

from __future__ import annotations

import json

import msgspec
import pytest

from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterRejected,
    InternalError,
    Overloaded,
    ShardLost,
    TooManyRequests,
)
from loraplex.router.merges import MergeRecipe
from loraplex.router.request import TokenEvent

from ..fakes.engine import play
from .conftest import byte_level_library_tokenizer

LIBRARY = byte_level_library_tokenizer()
MERGED = {"ids": ["upper", "reverse"], "weights": [0.5, 2.0]}


def spell(text: str) -> list[int]:
    return [LIBRARY.encode(letter).ids[0] for letter in text]


class Alternative(msgspec.Struct):
    id: int
    text: str
    logprob: float


class Token(msgspec.Struct):
    id: int
    text: str
    logprob: float
    special: bool
    alternative_tokens: list[Alternative] | None = None


class InputToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None


class Sequence(msgspec.Struct):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    prefill: list[InputToken]
    tokens: list[Token]
    seed: int | None = None


class Details(msgspec.Struct):
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    prefill: list[InputToken]
    tokens: list[Token]
    seed: int | None = None
    best_of_sequences: list[Sequence] | None = None


class Response(msgspec.Struct):
    generated_text: str
    details: Details | None = None


class StreamDetails(msgspec.Struct):
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    seed: int | None = None


class StreamResponse(msgspec.Struct):
    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


def as_client_sends(inputs: str = "hello", *, stream: bool = False, **parameters) -> dict:
    """Every parameter is there, most of them null: that is how the client writes its body."""
    nulls = dict.fromkeys(
        [
            "adapter_id",
            "adapter_source",
            "merged_adapters",
            "api_token",
            "max_new_tokens",
            "repetition_penalty",
            "seed",
            "temperature",
            "top_k",
            "top_p",
            "truncate",
            "typical_p",
            "best_of",
            "return_k_alternatives",
            "response_format",
        ]
    )
    flags = dict.fromkeys(
        ["do_sample", "ignore_eos_token", "return_full_text", "watermark", "decoder_input_details"], False
    )
    return {
        "inputs": inputs,
        "stream": stream,
        "parameters": {**nulls, **flags, "stop": [], "details": True, "max_new_tokens": 4, **parameters},
    }


def read_stream(text: str) -> list[StreamResponse]:
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [msgspec.json.decode(line[6:], type=StreamResponse) for line in lines]


async def test_post_to_the_root_answers_a_list_or_streams(rest):
    plain = await rest.post("/", json=as_client_sends())
    (response,) = msgspec.json.decode(plain.text, type=list[Response])
    assert response.generated_text == "hell" or len(response.details.tokens) == 4
    streamed = await rest.post("/", json=as_client_sends(stream=True))
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = read_stream(streamed.text)
    assert "".join(event.token.text for event in events) == response.generated_text
    assert [event.generated_text for event in events[:-1]] == [None] * 3
    assert events[-1].generated_text == response.generated_text
    assert events[-1].details.finish_reason == "length"
    assert events[-1].details.generated_tokens == 4


async def test_generate_answers_an_object_with_details(rest, engine):
    body = as_client_sends(
        "hello", decoder_input_details=True, return_k_alternatives=2, seed=3, do_sample=True
    )
    answer = await rest.post("/generate", json=body)
    response = msgspec.json.decode(answer.text, type=Response)
    ids = LIBRARY.encode("hello").ids
    details = response.details
    assert [token.id for token in details.prefill] == ids
    assert details.prefill[0].logprob is None
    assert details.prompt_tokens == len(ids)
    assert details.generated_tokens == len(details.tokens) == 4
    assert "".join(token.text for token in details.tokens) == response.generated_text
    assert all(len(token.alternative_tokens) == 2 for token in details.tokens)
    assert details.seed == engine.requests[0].params.seed == 3
    assert details.best_of_sequences is None
    for name in ("x-prompt-tokens", "x-generated-tokens", "x-total-tokens", "x-total-time",
                 "x-time-per-token",
                 "x-inference-time", "x-validation-time", "x-compute-characters"):  # fmt: skip
        assert answer.headers[name].isdigit()
    assert answer.headers["x-model-id"] == "base"


async def test_without_details_there_are_none(rest, engine):
    answer = await rest.post("/generate", json={"inputs": "hello", "parameters": {"max_new_tokens": 2}})
    assert set(answer.json()) == {"generated_text"}
    assert engine.requests[0].params.logprobs is None


async def test_bodies_without_parameters_use_the_rest_of_the_context(rest, engine):
    await rest.post("/generate", json={"inputs": "hello"})
    params = engine.requests[0].params
    assert params.max_tokens == 512 - len(engine.requests[0].prompt)
    assert params.temperature == 0.0


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 3}, 1.0),
        ({"top_p": 0.9}, 1.0),
    ],
)
async def test_it_is_greedy_unless_something_asks_for_sampling(rest, engine, parameters, temperature):
    await rest.post("/", json=as_client_sends(**parameters))
    assert engine.requests[0].params.temperature == temperature


async def test_adapter_source_and_hub_token(serve_rest, rest, engine):
    body = as_client_sends(adapter_id="org/nested", adapter_source="hub", api_token="hf_x")
    answer = await rest.post("/", json=body, headers={"Authorization": "Bearer not-a-hub-token"})
    (query,) = engine.queries
    assert [choice.id for choice in query.choices] == ["org/nested"]
    assert (query.source, query.token) == ("hub", "hf_x")
    assert answer.headers["x-adapter-id"] == "org/nested"
    weighted = {**as_client_sends(), "adapters": [{"id": "upper", "weight": 2}, {"id": "reverse"}]}
    await rest.post("/", json=weighted)
    assert [use.weight for use in engine.requests[1].adapters] == [2.0, 1.0]


async def test_merged_adapters_are_one_adapter_for_the_request(rest, engine):
    merged = {**MERGED, "merge_strategy": "dare_ties", "density": 0.5, "majority_sign_method": "frequency"}
    await rest.post("/generate", json=as_client_sends(merged_adapters=merged, api_token="hf_x"))
    await rest.post("/", json=as_client_sends(merged_adapters={**MERGED, "density": 0.0}))
    first, second = engine.queries
    assert [(choice.id, choice.weight) for choice in first.choices] == [("upper", 0.5), ("reverse", 2.0)]
    assert first.merge == MergeRecipe("dare_ties", 0.5, "frequency")
    assert first.token == "hf_x"
    assert second.merge == MergeRecipe("linear")
    assert [use.key for use in engine.requests[0].adapters] == ["key of merged"]


async def test_full_text_has_the_prompt_in_front(rest):
    answer = await rest.post("/generate", json=as_client_sends("hello", return_full_text=True))
    assert answer.json()["generated_text"].startswith("hello")
    streamed = read_stream(
        (await rest.post("/generate_stream", json=as_client_sends("hello", return_full_text=True))).text
    )
    assert streamed[-1].generated_text == answer.json()["generated_text"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("tokens", "stop", "text", "ending"),
    [
        ([*spell("ab"), 0], [], "ab", ("eos_token", 3)),
        (spell("abcdef"), ["de"], "abc", ("stop_sequence", 4)),
    ],
)
async def test_how_it_ended(rest, engine, path, tokens, stop, text, ending):
    engine.script = play(tokens)
    answer = await rest.post(path, json=as_client_sends(stop=stop, max_new_tokens=50))
    if path == "/generate":
        response = msgspec.json.decode(answer.text, type=Response)
        tokens, details = response.details.tokens, response.details
        assert response.generated_text == text
    else:
        events = read_stream(answer.text)
        tokens, details = [event.token for event in events], events[-1].details
        assert events[-1].generated_text == text
    assert "".join(token.text for token in tokens if not token.special) == text
    assert tokens[-1].special
    assert (details.finish_reason, details.generated_tokens) == ending


async def test_best_of_returns_the_most_probable(rest, engine):
    answer = await rest.post("/generate", json=as_client_sends(best_of=3, do_sample=True))
    response = msgspec.json.decode(answer.text, type=Response)
    assert len(response.details.best_of_sequences) == 2
    assert len({response.details.seed, *(other.seed for other in response.details.best_of_sequences)}) == 3


async def test_truncate_keeps_the_last_tokens(rest, engine):
    await rest.post("/", json=as_client_sends("hello world", truncate=2))
    assert list(engine.requests[0].prompt) == LIBRARY.encode("hello world").ids[-2:]


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"inputs": None}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": 5}, "inputs"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**400}, "max_new_tokens"),
        ({"max_new_tokens": 5000}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"truncate": 0}, "truncate"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 2, "seed": 1}, "seed"),
        ({"return_k_alternatives": 30}, "return_k_alternatives"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"merged_adapters": {"ids": ["upper"], "weights": [1.0, 2.0]}}, "merged_adapters"),
        ({"merged_adapters": {"ids": [], "weights": []}}, "merged_adapters"),
        ({"merged_adapters": {"ids": ["upper"]}}, "merged_adapters"),
        ({"merged_adapters": {**MERGED, "merge_strategy": "svd"}}, "merge_strategy"),
        ({"merged_adapters": {**MERGED, "merge_strategy": "ties"}}, "density"),
        ({"merged_adapters": {**MERGED, "merge_strategy": "ties", "density": 1.5}}, "density"),
        ({"merged_adapters": {**MERGED, "majority_sign_method": "vote"}}, "majority_sign_method"),
        ({"merged_adapters": MERGED, "adapter_id": "upper"}, "merged_adapters"),
        ({"adapter_source": "pbase"}, "adapter_source"),
        ({"stop": "text"}, "stop"),
    ],
)
async def test_validation_is_422_and_names_the_field(rest, engine, path, body, field):
    if field == "seed" and path == "/generate_stream":
        pytest.skip("best_of is refused first")
    request = {**as_client_sends(), **body} if "inputs" in body else as_client_sends(**body)
    answer = await rest.post(path, json=request)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"
    assert field in answer.json()["error"]
    assert engine.requests == []


async def test_what_cannot_be_streamed_is_refused(rest):
    for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
        answer = await rest.post("/generate_stream", json=as_client_sends(**parameters))
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")


async def test_broken_json_is_validation_too(rest):
    answer = await rest.post("/generate", data=b'{"inputs": ')
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (TooManyRequests("slow down"), 429, "overloaded"),
        (Overloaded("full", retry_after=3), 429, "overloaded"),
        (AdapterFetchFailed("no such file at the hub"), 424, "generation"),
        (AdapterRejected("rank too high"), 424, "generation"),
        (ShardLost("the shard died"), 500, "incomplete_generation"),
        (InternalError("a mistake"), 500, "incomplete_generation"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_have_loraxs_types(rest, engine, stream, error, status, kind):
    engine.script = lambda request: iter([error])
    answer = await rest.post("/", json=as_client_sends(stream=stream))
    assert answer.status_code == status
    assert answer.json() == {"error": error.message, "error_type": kind}


async def test_an_unknown_adapter_is_a_generation_error(rest):
    answer = await rest.post("/", json=as_client_sends(adapter_id="nobody"))
    assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")


async def test_an_error_in_a_stream_is_its_last_event(rest, engine):
    def script(request):
        yield TokenEvent(spell("a"))
        yield ShardLost("the shard died")

    engine.script = script
    engine.delay = 0.02
    answer = await rest.post("/generate_stream", json=as_client_sends())
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line]
    assert events[0]["token"]["text"] == "a"
    assert events[1] == {"error": "the shard died", "error_type": "incomplete_generation"}


async def test_info(rest):
    info = (await rest.get("/info")).json()
    assert info["groups"] == [{"tp": 2, "ready": True, "weight_bytes": [10, 12]}]
    assert (info["model_id"], info["model_dtype"], info["max_total_tokens"]) == ("some/base", "float32", 512)
