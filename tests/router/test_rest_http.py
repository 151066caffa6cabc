"""Raw sockets: limits, broken requests, keys, and the plain routes."""

from __future__ import annotations

import asyncio
import json

import pytest
from tokenizers import AddedToken

from loraplex.proto import shard_pb2
from loraplex.router.auth import ApiKeys, Caller, _digest
from loraplex.router.client import Manifest

from .conftest import byte_level_library_tokenizer

BODY = b'{"model": "base", "prompt": "hello", "max_tokens": 2}'


async def send(rest, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, read one answer: status, headers, body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rest.port)
    try:
        writer.write(raw)
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).decode("latin-1")
        lines = head.split("\r\n")
        headers = {
            key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:] if line)
        }
        length = 0 if raw.startswith(b"HEAD") else int(headers.get("content-length", 0))
        body = await asyncio.wait_for(reader.readexactly(length), 30)
        return int(lines[0].split()[1]), headers, body
    finally:
        writer.close()


def post(path: str, body: bytes, headers: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def get(path: str, headers: str = "", method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()


@pytest.mark.parametrize("chunked", [False, True])
async def test_too_large_a_body_is_413(serve_rest, engine, chunked):
    rest = await serve_rest(max_body_bytes=10_000)
    body = b'{"prompt": "' + b"x" * 20_000 + b'"}'
    if chunked:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        raw = post("/v1/completions", body)
    status, headers, answer = await send(rest, raw)
    assert status == 413
    assert json.loads(answer)["error"]["code"] == "payload_too_large"
    assert "10000 bytes" in json.loads(answer)["error"]["message"]
    assert headers["x-should-retry"] == "false"


async def test_a_small_packed_body_that_unpacks_large_is_413(serve_rest):
    import gzip

    rest = await serve_rest(max_body_bytes=10_000)
    body = gzip.compress(b'{"prompt": "' + b"x" * 1_000_000 + b'"}')
    assert len(body) < 10_000
    status, _, _ = await send(rest, post("/v1/completions", body, "Content-Encoding: gzip\r\n"))
    assert status == 413


@pytest.mark.parametrize(
    "headers",
    [
        "X-Big: " + "x" * 9000 + "\r\n",
        "".join(f"X-{i}: y\r\n" for i in range(300)),
        "Cookie: " + "c" * 100_000 + "\r\n",
    ],
    ids=["long line", "many lines", "huge"],
)
async def test_too_large_a_header_is_431(rest, headers):
    status, answer_headers, answer = await send(rest, get("/v1/models", headers))
    assert status == 431
    assert answer_headers["content-type"].startswith("application/json")
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"
    assert b"xxxx" not in answer


async def test_garbage_is_400_in_json(rest):
    status, _, answer = await send(rest, b"this is not http\r\n\r\n")
    assert status == 400
    assert json.loads(answer)["error"]["message"] == "This is not a well-formed HTTP request."


BROKEN = {
    "empty": (b"", "JSON"),
    "cut": (b'{"model": ', "JSON"),
    "trailing": (b'{"model": "base"} x', "JSON"),
    "NaN": (b'{"n": NaN}', "JSON"),
    "Infinity": (b'{"temperature": -Infinity}', "JSON"),
    "array": (b"[1, 2]", "malformed"),
    "string": (b'"text"', "malformed"),
    "null": (b"null", "malformed"),
    "deep": (b'{"x": ' + b"[" * 100_000, "nested"),
    "deep objects": (b'{"x": ' + b'{"a":' * 50_000, "nested"),
    "UTF-8": (b'{"prompt": "\xff"}', "UTF-8"),
    "surrogate": (b'{"prompt": "\\ud800"}', "JSON"),
    "control": (b'{"prompt": "a\x00b"}', "JSON"),
}
ROUTES = ["/v1/completions", "/tokenize", "/v1/chat/completions", "/v1/load_lora_adapter"]
BROKEN_ON = [
    (path, name)
    for path in ROUTES
    for name in BROKEN
    if b"prompt" not in BROKEN[name][0] or path in ROUTES[:2]
]


@pytest.mark.parametrize(("path", "name"), BROKEN_ON)
async def test_a_broken_body_is_400_and_says_what(rest, engine, path, name):
    body, problem = BROKEN[name]
    status, _, answer = await send(rest, post(path, body))
    assert status == 400
    assert problem in json.loads(answer)["error"]["message"]
    assert engine.requests == []


async def test_a_body_in_a_broken_encoding_is_400(rest):
    status, _, answer = await send(rest, post("/v1/completions", b"not gzip", "Content-Encoding: gzip\r\n"))
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


async def test_unknown_routes_and_methods(rest):
    status, _, answer = await send(rest, get("/v2/nothing"))
    assert (status, json.loads(answer)["error"]["message"]) == (404, "There is no such route.")
    status, headers, answer = await send(rest, get("/v1/completions"))
    assert (status, headers["allow"]) == (405, "POST")
    assert "error" in json.loads(answer)


async def test_a_connection_serves_several_requests(rest):
    reader, writer = await asyncio.open_connection("127.0.0.1", rest.port)
    for _ in range(3):
        writer.write(post("/v1/completions", BODY))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert b"200 OK" in head
        await reader.readexactly(length)
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_vanished_client_cancels_every_sequence(rest, engine, stream):
    engine.delay = 0.01
    body = {"model": "base", "prompt": ["a", "b"], "n": 3, "max_tokens": 400, "stream": stream}
    reader, writer = await asyncio.open_connection("127.0.0.1", rest.port)
    writer.write(post("/v1/completions", json.dumps(body).encode()))
    if stream:
        await reader.readuntil(b"data: ")
    else:
        while engine.running < 6:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    writer.transport.abort()
    async with asyncio.timeout(30):
        while engine.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(engine.cancelled) == 6


async def test_a_slow_reader_gets_everything_in_few_writes(rest, engine):
    """While nobody reads, tokens gather; they must arrive complete and in order."""
    body = {"model": "base", "prompt": "hello", "max_tokens": 500, "stream": True, "temperature": 0}
    reader, writer = await asyncio.open_connection("127.0.0.1", rest.port, limit=2**20)
    writer.write(post("/v1/completions", json.dumps(body).encode(), "Connection: close\r\n"))
    await asyncio.sleep(0.5)
    raw = await asyncio.wait_for(reader.read(-1), 30)
    writer.close()
    texts = [
        json.loads(line[6:])["choices"][0]["text"] for line in raw.split(b"\n") if line.startswith(b"data: {")
    ]
    plain = await rest.post("/v1/completions", json={**body, "stream": False})
    assert "".join(texts) == plain.json()["choices"][0]["text"]


# Keys.


@pytest.fixture
async def locked(serve_rest):
    return await serve_rest(keys=ApiKeys({_digest("sesame"): Caller("acme")}))


GUARDED = ["/", "/generate", "/info", "/metrics", "/v1/models", "/v1/models/base", "/v1/adapters",
           "/v1/completions", "/tokenize", "/nothing/here", "/health/../v1/models", "/health/",
           "//health", "/HEALTH",
           "/health%2Flive",
           "/v1/../health", "http://x/health", "/health;x"]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("path", GUARDED)
async def test_every_path_but_health_needs_the_key(locked, method, path):
    status, headers, _ = await send(locked, get(path, method=method))
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    status, _, _ = await send(locked, get(path, "Authorization: Bearer wrong\r\n", method=method))
    assert status == 401
    status, _, _ = await send(locked, get(path, "Authorization: Bearer sesame\r\n", method=method))
    assert status != 401


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/health?x=1"])
async def test_health_needs_no_key(locked, path):
    status, _, _ = await send(locked, get(path))
    assert status == 200


async def test_an_unauthenticated_body_is_not_read(locked):
    raw = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    status, _, answer = await send(locked, raw)
    assert status == 401
    assert json.loads(answer)["error"]["code"] == "invalid_api_key"


async def test_lorax_routes_answer_401_in_their_shape(locked):
    _, _, answer = await send(locked, get("/info"))
    assert json.loads(answer)["error_type"] == "authentication"


# Plain routes.


async def test_health_follows_the_engine(rest, engine):
    assert (await rest.get("/health/live")).status_code == 200
    engine.ready = False
    assert (await rest.get("/health/live")).status_code == 200
    assert (await rest.get("/health/ready")).status_code == 503
    assert (await rest.get("/health")).status_code == 503


async def test_metrics(rest):
    answer = await rest.get("/metrics")
    assert "loraplex_probe_total 0.0" in answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    head = await rest.request("HEAD", "/metrics")
    assert (head.status_code, head.text) == (200, "")


async def test_tokenize_and_detokenize_with_an_adapters_own_tokenizer(rest, engine):
    library = byte_level_library_tokenizer()
    token = library.get_vocab_size()
    library.add_tokens([AddedToken("<tool>")])
    engine.manifests["upper"] = Manifest(digest="resized", vocab_size=token + 1, own_tokenizer=True)
    engine.tokenizers["resized"] = shard_pb2.TokenizerReply(
        tokenizer_json=library.to_str().encode(), chat_template="<tool>"
    )
    answer = (await rest.post("/tokenize", json={"model": "upper", "prompt": "<tool>"})).json()
    assert answer["tokens"] == [token]
    chat = {"model": "upper", "messages": [{"role": "user", "content": "hello"}]}
    assert (await rest.post("/tokenize", json=chat)).json()["tokens"] == [token]
    back = await rest.post("/detokenize", json={"model": "upper", "tokens": [token]})
    assert back.json() == {"prompt": "<tool>"}
    plain = (await rest.post("/tokenize", json={"model": "reverse", "prompt": "<tool>"})).json()
    assert token not in plain["tokens"]
    assert (await rest.post("/tokenize", json={"model": "nobody", "prompt": "a"})).status_code == 404


async def test_tokenize_and_detokenize(rest, library_tokenizer):
    text = "hello wörld"
    answer = (await rest.post("/tokenize", json={"model": "base", "prompt": text})).json()
    assert answer["tokens"] == library_tokenizer.encode(text).ids
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    back = await rest.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": text}
    messages = [{"role": "user", "content": "hello"}]
    chat = (await rest.post("/tokenize", json={"messages": messages})).json()
    assert chat["tokens"] == library_tokenizer.encode("<|user|>hello\n<|assistant|>").ids
    for path, body, field in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": messages}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [library_tokenizer.get_vocab_size()]}, "tokens"),
    ):
        answer = await rest.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_the_request_id_is_kept_or_made(rest):
    answer = await rest.get("/health", headers={"x-request-id": "abc-1.2:3"})
    assert answer.headers["x-request-id"] == "abc-1.2:3"
    made = {(await rest.get("/nothing")).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
