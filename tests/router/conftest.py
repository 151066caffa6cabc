"""A small tokenizer, a fake engine, and the REST application over both on a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from hypothesis import settings
from multidict import CIMultiDictProxy
from prometheus_client import CollectorRegistry, Counter
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from loraplex.router.auth import ApiKeys
from loraplex.router.frontend import Frontend
from loraplex.router.rest.app import RestServer, RestServices, build_app
from loraplex.router.rest.lorax import ServerFacts, ShardGroup
from loraplex.router.tokenizer import Tokenizer
from loraplex.router.tokenizers import Tokenizers

from ..fakes.engine import FakeEngine

# A deadline would fail tests on a machine that is busy with other things.
settings.register_profile("router", max_examples=100, deadline=None)
settings.load_profile("router")

CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello world",
    "Grüße aus Köln, 日本語のテキスト, and an emoji or two: 🎉🎊",
    "def add(a, b):\n    return a + b\n\n\nSTOP here, stop there\n",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_level_library_tokenizer() -> LibraryTokenizer:
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|begin|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def library_tokenizer() -> LibraryTokenizer:
    """Byte-level BPE; ids 0 and 1 are special."""
    return byte_level_library_tokenizer()


@pytest.fixture(scope="session")
def tokenizer(library_tokenizer: LibraryTokenizer) -> Tokenizer:
    return Tokenizer(
        tokenizer_json=library_tokenizer.to_str().encode(),
        chat_template=CHAT_TEMPLATE,
        special_tokens={"eos_token": "<|end|>"},
        stop_ids=[0],
    )


@pytest.fixture
def engine(library_tokenizer: LibraryTokenizer) -> FakeEngine:
    return FakeEngine(library_tokenizer.get_vocab_size())


@pytest.fixture
async def frontend(engine: FakeEngine, tokenizer: Tokenizer) -> AsyncIterator[Frontend]:
    async with aclosing(Tokenizers(tokenizer, engine.tokenizer)) as tokenizers:
        yield Frontend(engine, tokenizers)


@dataclass(frozen=True)
class Answer:
    status_code: int
    headers: CIMultiDictProxy[str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class RestAddress:
    port: int

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.request("GET", path, **options)

    async def post(self, path: str, **options: Any) -> Answer:
        return await self.request("POST", path, **options)

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """One request on a connection of its own, answered in full. Options as aiohttp's."""
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, **options) as response,
        ):
            return Answer(response.status, response.headers, await response.text())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
async def serve_rest(engine: FakeEngine, frontend: Frontend) -> AsyncIterator[Callable[..., object]]:
    """Start the application: `await serve_rest(keys=…, max_body_bytes=…)`."""
    async with AsyncExitStack() as stack:

        async def start(*, keys: ApiKeys | None = None, max_body_bytes: int = 1 << 20) -> RestAddress:
            registry = CollectorRegistry()
            Counter("loraplex_probe", "Here so that there is a metric.", registry=registry)
            facts = ServerFacts(
                version="0.0.0",
                groups=lambda: [ShardGroup(tp=2, ready=True, weight_bytes=(10, 12))],
                max_queued_requests=7,
            )
            services = RestServices(
                engine=engine,
                frontend=frontend,
                keys=keys or ApiKeys(),
                registry=registry,
                facts=facts,
                max_body_bytes=max_body_bytes,
            )
            server = RestServer(build_app(services))
            stack.push_async_callback(server.stop)
            return RestAddress(await server.start("127.0.0.1", 0))

        yield start


@pytest.fixture
async def rest(serve_rest: Callable[..., object]) -> RestAddress:
    """The application without keys."""
    return await serve_rest()
