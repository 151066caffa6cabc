"""The real openai client against the application."""

from __future__ import annotations

import asyncio

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.router.auth import ApiKeys, Caller, _digest
from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterRejected,
    Draining,
    InternalError,
    NumericalError,
    Overloaded,
    ShardLost,
    TooManyRequests,
)
from loraplex.router.merges import MergeRecipe
from loraplex.router.request import TokenEvent

from ..fakes.engine import play
from .conftest import byte_level_library_tokenizer

LIBRARY = byte_level_library_tokenizer()


def spell(text: str) -> list[int]:
    return [LIBRARY.encode(letter).ids[0] for letter in text]


@pytest.fixture
async def client(rest):
    async with openai.AsyncOpenAI(base_url=f"{rest.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **fields):
    fields = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **fields}
    return client.chat.completions.create(**fields)


def complete(client, **fields):
    return client.completions.create(**{"model": "base", "prompt": "hello world", "max_tokens": 4, **fields})


async def bad(call) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await call
    return caught.value


# Completions.


async def test_completion(client):
    answer = await complete(client)
    ids = LIBRARY.encode("hello world").ids
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "base"
    assert answer.choices[0].text == LIBRARY.decode(ids[:4])
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == len(ids) + 4


async def test_completion_default_is_16_tokens(client):
    answer = await client.completions.create(model="base", prompt="hello")
    assert answer.usage.completion_tokens == 16


async def test_eos_ends_with_stop(client, engine):
    engine.script = play([*spell("ab"), 0])
    answer = await complete(client)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["hello", spell("a") and "world"], 2),
        (spell("abc"), 1),
        ([spell("ab"), spell("cde")], 2),
    ],
)
async def test_prompts_of_all_forms_times_n(client, engine, prompt, texts):
    answer = await complete(client, prompt=prompt, n=2)
    assert [choice.index for choice in answer.choices] == list(range(2 * texts))
    assert len(engine.requests) == 2 * texts
    if prompt == [spell("ab"), spell("cde")]:
        assert [choice.text for choice in answer.choices] == ["abab", "abab", "cdec", "cdec"]


async def test_completion_stream_equals_the_plain_answer(client, engine):
    engine.script = play(LIBRARY.encode("Grüße aus Köln 🎉, 日本語").ids)
    plain = await complete(client, max_tokens=30, n=2)
    chunks = [chunk async for chunk in await complete(client, max_tokens=30, n=2, stream=True)]
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in own) == plain.choices[index].text
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completion_stream_with_usage(client):
    options = {"include_usage": True}
    chunks = [chunk async for chunk in await complete(client, stream=True, stream_options=options)]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_and_echo(client, stream):
    prompt = spell("abc")
    answer = await complete(client, prompt=prompt, max_tokens=2, echo=True, logprobs=2, stream=stream)
    if stream:
        chunks = [chunk.choices[0] async for chunk in answer]
        text = "".join(chunk.text for chunk in chunks)
        parts = [chunk.logprobs for chunk in chunks if chunk.logprobs]
        tokens, offsets, logprobs, top = (
            [value for part in parts for value in getattr(part, name)]
            for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs")
        )
    else:
        text, found = answer.choices[0].text, answer.choices[0].logprobs
        tokens, offsets, logprobs, top = (
            found.tokens,
            found.text_offset,
            found.token_logprobs,
            found.top_logprobs,
        )
    assert text == "abcab"
    assert tokens == list("abcab")
    assert offsets == [0, 1, 2, 3, 4]
    assert logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert top[0] is None
    assert all(len(entry) == 2 for entry in top[1:])


async def test_scoring_a_prompt_without_output(client):
    answer = await complete(client, prompt=spell("abc"), max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.5, -0.5]
    assert answer.choices[0].logprobs.top_logprobs == [None, {"b": -0.5}, {"c": -0.5}]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 0


async def test_echo_without_logprobs(client):
    assert (
        (await complete(client, prompt="hello", echo=True, max_tokens=1)).choices[0].text.startswith("hello")
    )


async def test_stop_strings(client, engine):
    engine.script = play(spell("abcdefgh"))
    for stop in ("de", ["xyz", "de"]):
        answer = await complete(client, stop=stop, max_tokens=50)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "stop")
        assert answer.usage.completion_tokens == 3
        stream = await complete(client, stop=stop, max_tokens=50, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "abc"
    assert len(engine.cancelled) == 4


async def test_extra_fields_reach_the_engine(client, engine):
    extra = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "unheard_of": {"deeply": ["nested"]},
    }
    await complete(client, seed=9, temperature=0.5, top_p=0.9, logit_bias={"5": -1.5}, extra_body=extra)
    params = engine.requests[0].params
    assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens) == (5, 0.1, 1.2, 2)
    assert (params.seed, params.temperature, params.top_p, params.logit_bias) == (9, 0.5, 0.9, {5: -1.5})
    assert params.stop_ids == (7,)


async def test_explicit_nulls_are_as_good_as_absent(rest, engine):
    fields = [
        "adapters",
        "n",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "logit_bias",
        "stop",
        "stop_token_ids",
        "ignore_eos",
    ]
    nulls = dict.fromkeys(fields)
    more = {
        "/v1/completions": {"prompt": "hello", **dict.fromkeys(("echo", "logprobs", "best_of", "suffix"))},
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": "hello", "name": None, "tool_calls": None}],
            **dict.fromkeys(
                ("logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "functions")
            ),
        },
    }
    for path, body in more.items():
        answer = await rest.post(path, json={"model": "base", **nulls, **body})
        assert answer.status_code == 200, answer.text
    assert [request.params.max_tokens for request in engine.requests] == [
        16,
        512 - len(engine.requests[1].prompt),
    ]


# Chat.


async def test_chat(client):
    answer = await chat(client, max_tokens=None, max_completion_tokens=4)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    prompt = LIBRARY.encode("<|user|>hello\n<|assistant|>").ids
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == LIBRARY.decode(prompt[:4])
    assert answer.usage.prompt_tokens == len(prompt)


async def test_chat_content_may_be_text_parts(client, engine):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    await chat(client, messages=[{"role": "user", "content": parts}])
    assert list(engine.requests[0].prompt) == LIBRARY.encode("<|user|>hel\nlo\n<|assistant|>").ids


async def test_chat_stream_begins_with_the_role(client):
    plain = await chat(client, max_tokens=20, n=2)
    options = {"include_usage": True}
    stream = await chat(client, max_tokens=20, n=2, stream=True, stream_options=options)
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in own[1:])
        text = "".join(choice.delta.content or "" for choice in own)
        assert text == plain.choices[index].message.content
        assert own[-1].finish_reason == "length"
        assert own[-1].delta.content is None


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(client, engine, stream):
    engine.script = play([*spell("ab"), LIBRARY.token_to_id("â")])
    answer = await chat(client, max_tokens=3, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        found = [chunk.choices[0].logprobs async for chunk in answer]
        content = [entry for logprobs in found if logprobs for entry in logprobs.content]
    else:
        content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["a", "b", "bytes:\\xe2"]
    assert [entry.bytes for entry in content] == [[97], [98], [0xE2]]
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in content)


async def test_a_stream_of_sockets_closed_early_cancels(client, engine):
    engine.delay = 0.01
    stream = await chat(client, max_tokens=400, n=3, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await _until(lambda: engine.running == 0)
    assert len(engine.cancelled) == 3


async def test_a_plain_request_abandoned_cancels(rest, engine):
    engine.delay = None
    async with openai.AsyncOpenAI(
        base_url=f"{rest.url}/v1", api_key="none", max_retries=0, timeout=0.3
    ) as client:
        with pytest.raises(openai.APITimeoutError):
            await complete(client, n=2)
    await _until(lambda: engine.running == 0)
    assert len(engine.cancelled) == 2


async def _until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# Models and adapters.


async def test_models(client):
    models = await client.models.list()
    assert [model.id for model in models.data] == ["base", "upper", "reverse", "org/nested"]
    assert models.data[1].parent == "base"
    assert models.data[1].root == "hub:org/upper"
    assert models.data[0].max_model_len == 512
    assert (await client.models.retrieve("org/nested")).id == "org/nested"
    error = await bad(client.models.retrieve("nobody"))
    assert (error.status_code, error.code) == (404, "model_not_found")


async def test_an_adapter_is_a_model(client, engine):
    assert (await chat(client, model="upper")).model == "upper"
    assert engine.requests[0].adapters[0].key == "key of upper"
    extra = {"adapters": [{"id": "upper", "weight": 0.5}, {"id": "reverse"}]}
    await complete(client, extra_body=extra)
    assert [(use.key, use.weight) for use in engine.requests[1].adapters] == [
        ("key of upper", 0.5),
        ("key of reverse", 1.0),
    ]


async def test_load_pin_and_unload(rest):
    answer = await rest.post("/v1/load_lora_adapter", json={"lora_name": "org/new", "lora_path": "org/repo"})
    assert answer.status_code == 200
    assert "org/new" in answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    again = await rest.post(
        "/v1/load_lora_adapter", json={"lora_name": "org/new", "lora_path": "org/repo", "scaling": -0.5}
    )
    assert again.status_code == 200
    answer = await rest.post("/v1/adapters/org/new/pin", json={"pinned": True})
    assert answer.json()["pinned"] is True
    found = (await rest.get("/v1/adapters/org/new")).json()
    assert (found["name"], found["state"], found["pinned"]) == ("org/new", "resident", True)
    assert (found["digest"], found["kind"], found["scaling"]) == ("digest of org/new", "LoRA", -0.5)
    assert found["warnings"] == ["odd"]
    listed = (await rest.get("/v1/adapters")).json()["data"]
    assert [adapter["name"] for adapter in listed] == ["upper", "reverse", "org/nested", "org/new"]
    answer = await rest.post("/v1/unload_lora_adapter", json={"lora_name": "org/new"})
    assert (answer.status_code, answer.headers["x-bytes-freed"]) == (200, "64")
    assert answer.text == "Success: LoRA adapter 'org/new' removed successfully."
    assert (await rest.post("/v1/unload_lora_adapter", json={"lora_name": "org/new"})).status_code == 404
    assert (await rest.get("/v1/adapters/org/new")).status_code == 404
    for path, body, field in (
        ("/v1/load_lora_adapter", {"lora_name": "x"}, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "base", "lora_path": "x"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x", "scaling": "1"}, "scaling"),
        ("/v1/unload_lora_adapter", {}, "lora_name"),
        ("/v1/adapters/upper/pin", {}, "pinned"),
        ("/v1/adapters/upper/pin", {"pinned": 1}, "pinned"),
    ):
        answer = await rest.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_merge(rest, engine):
    adapters = [{"id": "upper", "weight": 0.5}, {"id": "reverse"}]
    recipe = {"method": "dare_ties", "density": 0.5, "majority_sign_method": "frequency", "seed": 3}
    answer = await rest.post("/v1/adapters/merge", json={"name": "both", "adapters": adapters, **recipe})
    assert (answer.status_code, answer.json()["name"], answer.json()["state"]) == (200, "both", "resident")
    (query,) = engine.queries
    assert [(choice.id, choice.weight) for choice in query.choices] == [("upper", 0.5), ("reverse", 1.0)]
    assert query.merge == MergeRecipe("dare_ties", 0.5, "frequency", 3)
    for fields, field in (
        ({"name": None}, "name"),
        ({"method": None}, "method"),
        ({"method": "sum"}, "method"),
        ({"density": 0}, "density"),
        ({"majority_sign_method": "vote"}, "majority_sign_method"),
        ({"seed": -1}, "seed"),
        ({"adapters": [{"id": "upper", "weight": 1000}]}, "adapters"),
        ({"adapters": [{"id": "upper"}, {"id": "upper"}]}, "adapters"),
    ):
        body = {"name": "both", "adapters": adapters, **recipe, **fields}
        answer = await rest.post("/v1/adapters/merge", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    body = {"name": "both", "adapters": [{"id": "nobody"}], **recipe}
    assert (await rest.post("/v1/adapters/merge", json=body)).status_code == 404
    assert (await rest.get("/v1/adapters/both")).status_code == 200


async def test_a_tenant_sees_and_names_only_its_own(serve_rest, engine):
    keys = ApiKeys({_digest("k"): Caller("acme", ("org/*", "upper"))})
    rest = await serve_rest(keys=keys)
    async with openai.AsyncOpenAI(base_url=f"{rest.url}/v1", api_key="k", max_retries=0) as client:
        assert [model.id for model in (await client.models.list()).data] == ["base", "upper", "org/nested"]
        await chat(client)
        await chat(client, model="org/nested")
        assert [request.tenant for request in engine.requests] == ["acme", "acme"]
        forbidden, unknown = (
            await bad(chat(client, model="reverse")),
            await bad(chat(client, model="xeverse")),
        )
        assert forbidden.status_code == unknown.status_code == 404
        assert forbidden.body["message"].replace("reverse", "xeverse") == unknown.body["message"]
        headers = {"Authorization": "Bearer k"}
        for method, path, body in (
            ("GET", "/v1/models/reverse", None),
            ("GET", "/v1/adapters/reverse", None),
            ("POST", "/v1/adapters/reverse/pin", {"pinned": True}),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "reverse"}),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "upper", "lora_path": "secret/repo"}),
            ("POST", "/v1/adapters/merge", {"name": "x", "method": "cat", "adapters": [{"id": "upper"}]}),
            ("POST", "/v1/adapters/merge", {"name": "org/x", "method": "cat", "adapters": [{"id": "no"}]}),
            ("POST", "/tokenize", {"model": "reverse", "prompt": "x"}),
            ("POST", "/detokenize", {"model": "reverse", "tokens": [1]}),
        ):
            answer = await rest.request(method, path, json=body, headers=headers)
            assert answer.status_code == 404, path


# Errors.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [[1, "a"]]}, "prompt"),
        ({"prompt": [2**63]}, "prompt"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"stop": [1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"adapters": [{"weight": 1}]}, "adapters"),
        ({"adapters": [{"id": "upper", "weight": "x"}]}, "adapters"),
    ],
)
async def test_bad_completion_fields_are_named(rest, engine, fields, param):
    body = {"model": "base", "prompt": "hello", **fields}
    answer = await rest.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
    ],
)
async def test_bad_chat_fields_are_named(rest, engine, fields, param):
    body = {"model": "base", "messages": [{"role": "user", "content": "hello"}], **fields}
    answer = await rest.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert engine.requests == []


async def test_fields_that_ask_for_nothing_are_fine(client):
    nothing = {"functions": [], "chat_template_kwargs": {}, "modalities": ["text"]}
    await chat(client, tools=[], tool_choice="none", response_format={"type": "text"}, extra_body=nothing)


INTEGERS = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "best_of")
FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
NUMBERS = st.sampled_from(["-1", "0", "1", str(2**31), str(2**63), str(2**64), "1" + "0" * 400, "1e400",
                           "NaN", "-Infinity", "1e308", "-0.0",
                           '"1"', "true", "[1]", "1" * 5000])  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(INTEGERS + FLOATS), number=NUMBERS)
async def test_no_number_breaks_the_server(rest, field, number):
    body = f'{{"model": "base", "prompt": "hi", "max_tokens": 1, "{field}": {number}}}'
    if field == "max_tokens":
        body = f'{{"model": "base", "prompt": "hi", "{field}": {number}}}'
    answer = await rest.post("/v1/completions", data=body)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["param"] == field or "JSON" in error["message"]
        assert len(error["message"]) < 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "retry"),
    [
        (TooManyRequests("slow down", retry_after=2.2), openai.RateLimitError, "3"),
        (Overloaded("full", retry_after=1), openai.InternalServerError, "1"),
        (Draining("going down"), openai.InternalServerError, "1"),
        (ShardLost("the shard died", retry_after=5), openai.InternalServerError, "5"),
        (NumericalError("not finite"), openai.InternalServerError, None),
        (InternalError("a mistake"), openai.InternalServerError, None),
        (AdapterFetchFailed("hub down", retry_after=30), openai.InternalServerError, "30"),
        (AdapterRejected("rank too high"), openai.UnprocessableEntityError, None),
    ],
)
async def test_every_typed_error_keeps_its_status_and_says_when_to_retry(
    client, engine, stream, error, kind, retry
):
    for place in ("refusal", "first event"):
        engine.refusal = error if place == "refusal" else None
        engine.script = lambda request: iter([error])
        caught = await bad(chat(client, stream=stream))
        assert isinstance(caught, kind)
        assert caught.status_code == error.http_status
        assert caught.body == {
            "message": error.message,
            "type": error.kind,
            "param": None,
            "code": error.code,
        }
        assert caught.response.headers.get("retry-after") == retry
        assert caught.response.headers.get("x-should-retry") == (None if retry else "false")


async def test_an_error_after_the_first_token_is_the_last_event(client, engine, rest):
    def script(request):
        yield TokenEvent(spell("a"))
        yield ShardLost("the shard died")

    engine.script = script
    engine.delay = 0.02
    stream = await chat(client, stream=True)
    with pytest.raises(openai.APIError, match="the shard died"):
        async for _ in stream:
            pass
    body = {"model": "base", "prompt": "x", "stream": True}
    answer = await rest.post("/v1/completions", json=body)
    assert answer.status_code == 200
    last = answer.text.strip().split("\n\n")[-1]
    assert last.startswith('data: {"error":{"message":"the shard died"')
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("late", [False, True])
async def test_a_bug_is_logged_with_the_request_id_and_leaks_nothing(rest, engine, caplog, late):
    def script(request):
        if late:
            yield TokenEvent(spell("a"))
        yield TokenEvent((object(),))  # breaks the detokenizer

    engine.script = script
    engine.delay = 0.02
    body = {"model": "base", "prompt": "x", "stream": True}
    answer = await rest.post("/v1/completions", json=body, headers={"x-request-id": "mine-7"})
    assert answer.status_code == (200 if late else 500)
    assert "mine-7" in answer.text
    assert "internal_error" in answer.text
    assert "Error:" not in answer.text
    assert "object" not in answer.text.replace('"object":', "")
    assert "mine-7" in caplog.text
    assert "Traceback" in caplog.text


async def test_the_wire_format_of_a_stream(rest):
    body = {"model": "base", "prompt": "hello", "stream": True, "max_tokens": 3}
    answer = await rest.post("/v1/completions", json=body, headers={"x-request-id": "bad id"})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"] not in ("", "bad id")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
