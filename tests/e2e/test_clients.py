"""Clients that others wrote, unchanged, against the whole server."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loraplex.proto import router_pb2 as pb
from loraplex.proto import router_pb2_grpc

from .server import Server

MODELS = ["base", "alpha", "beta"]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, http_client=http) as client:
        yield client


def test_openai_lists_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(MODELS) <= set(models)
    assert models["alpha"].parent == "base"  # type: ignore[attr-defined]
    assert client.models.retrieve("beta").id == "beta"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gamma")


def test_openai_completes_for_every_model(client: openai.OpenAI) -> None:
    texts = {}
    for model in MODELS:
        answer = client.completions.create(model=model, prompt="Once upon", max_tokens=12, temperature=0)
        assert answer.model == model
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 9
        assert answer.choices[0].finish_reason in ("length", "stop")
        texts[model] = answer.choices[0].text
    assert len(set(texts.values())) == 3


def test_openai_streams_what_it_completes(client: openai.OpenAI) -> None:
    fields = {"model": "alpha", "prompt": "Once upon", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**fields)  # type: ignore[call-overload]
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [finish for finish in finishes if finish] == [whole.choices[0].finish_reason]


def test_openai_chats_streaming_and_not(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    whole = client.chat.completions.create(model="beta", messages=messages, max_tokens=10, temperature=0)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model="beta",
        messages=messages,  # type: ignore[arg-type]
        max_completion_tokens=10,
        temperature=0,
        stream=True,
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    scored = client.chat.completions.create(
        model="beta",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert scored.choices[0].logprobs is not None
    entries = scored.choices[0].logprobs.content
    assert entries is not None
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_openai_gets_n_choices_echo_and_seeds(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="alpha", prompt=["ab", "cd"], n=2, max_tokens=6, temperature=1, seed=7, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:2] for choice in answer.choices] == ["ab", "ab", "cd", "cd"]
    again = client.completions.create(
        model="alpha", prompt=["ab", "cd"], n=2, max_tokens=6, temperature=1, seed=7, echo=True
    )
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    assert answer.choices[0].text != answer.choices[1].text


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gamma") as missing:
        client.completions.create(model="gamma", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="base", prompt="x", max_tokens=-1)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="base", prompt=[1] * 600)
    assert long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as token:
        client.completions.create(model="base", prompt=[1, 99999])
    assert token.value.param == "prompt"


LORAX_CALLS = """
import json, sys
from lorax import Client
client = Client(sys.argv[1], timeout=60)
whole = client.generate("Once upon", adapter_id="alpha", max_new_tokens=12)
base = client.generate("Once upon", max_new_tokens=12)
stream = [r for r in client.generate_stream("Once upon", adapter_id="alpha", max_new_tokens=12)]
try:
    client.generate("Once upon", adapter_id="gamma", max_new_tokens=2)
    error = None
except Exception as caught:
    error = type(caught).__name__
print(json.dumps({
    "whole": whole.generated_text, "base": base.generated_text, "finish": whole.details.finish_reason,
    "tokens": whole.details.generated_tokens,
    "stream": "".join(r.token.text for r in stream if not r.token.special),
    "last": stream[-1].generated_text, "error": error,
}))
"""


@pytest.fixture(scope="module")
def lorax_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own: this client needs an older hub library."""
    directory = tmp_path_factory.mktemp("lorax")
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "lorax-client==0.6.3"], check=True, timeout=300)
    return python


def test_lorax_client_generates_and_streams(server: Server, lorax_python: Path) -> None:
    done = subprocess.run(
        [lorax_python, "-c", LORAX_CALLS, server.url],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["whole"] == answer["last"] == answer["stream"]
    assert answer["whole"] != answer["base"]
    assert (answer["finish"], answer["tokens"]) == ("length", 12)
    assert answer["error"] is not None


def test_a_plain_grpc_client_generates_lists_and_reflects(server: Server) -> None:
    address = f"127.0.0.1:{server.grpc_port}"
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        assert "loraplex.v1.Router" in {s.name for s in next(listing).list_services_response.service}
        assert stub.Info(pb.InfoRequest()).vocab_size == 300
        request = pb.GenerateRequest(
            model="alpha",
            text="Once upon",
            params=pb.GenerationParams(max_tokens=12, temperature=0, ignore_eos=True),
        )
        events = list(stub.Generate(request))
        assert events[-1].finish_reason == "length"
        assert events[-1].usage.completion_tokens == 12
        rest = server.complete("alpha", "Once upon", max_tokens=12, ignore_eos=True)
        assert "".join(event.text for event in events) == rest["choices"][0]["text"]
        names = {adapter.name: adapter for adapter in stub.ListAdapters(pb.ListAdaptersRequest()).adapters}
        assert names["alpha"].state == "resident"
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(model="gamma", text="x")))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_interpreter_of_the_server_is_this_one(server: Server) -> None:
    """The shard and the router run what is tested here, not some other installation."""
    for role in ("router", "shard"):
        command = Path(f"/proc/{server.find(role)}/cmdline").read_bytes().split(b"\0")
        assert command[0].decode() == sys.executable
