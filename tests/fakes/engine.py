"""An engine without a shard: it plays a script for each request, behind the EngineClient protocol."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

from loraplex.proto import shard_pb2
from loraplex.router.client import (
    AdapterQuery,
    AdapterState,
    AdapterStatus,
    Manifest,
    ModelInfo,
    PreparedAdapter,
)
from loraplex.router.errors import AdapterNotFound, RouterError
from loraplex.router.request import FinishReason, Request, TokenEvent, TokenLogprobs
from loraplex.router.sources import adapter_not_found

Script = Callable[[Request], Iterator[TokenEvent | RouterError]]


def logprobs_of(token: int, count: int) -> TokenLogprobs:
    """Made up from the token alone, so that a test can say what it expects."""
    top = tuple((token + step, -0.5 * (step + 1)) for step in range(count))
    return TokenLogprobs(-0.5, 1, top)


def play(tokens: list[int]) -> Script:
    """A script that plays these tokens: up to max_tokens, or to the first of the request's stop ids."""

    def script(request: Request) -> Iterator[TokenEvent | RouterError]:
        params = request.params
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            rest = [logprobs_of(token, params.prompt_logprobs) for token in request.prompt[1:]]
            prompt_logprobs = [None, *rest]
        for position in range(params.max_tokens):
            token = tokens[position % len(tokens)]
            finish = FinishReason.LENGTH if position == params.max_tokens - 1 else None
            if token in params.stop_ids and position >= params.min_tokens:
                finish = FinishReason.STOP
            logprobs = () if params.logprobs is None else (logprobs_of(token, params.logprobs),)
            yield TokenEvent((token,), logprobs, prompt_logprobs, finish)
            prompt_logprobs = None
            if finish is not None:
                return

    return script


def play_back(request: Request) -> Iterator[TokenEvent | RouterError]:
    """Answer with the prompt's own tokens, again and again."""
    return play(list(request.prompt))(request)


class FakeEngine:
    """Set its attributes to make it slow, refuse or fail.

    Attributes:
        script: what every request is answered with.
        delay: seconds before each event; None: never any event.
        refusal: raised by `submit`, `load_adapter` and `merge_adapters`.
        manifests: what an adapter is, by name, where it is not a plain one.
        tokenizers: what an adapter ships for text, by digest.
        queries: every query that named adapters.
        leased: how many adapters calls hold at the moment.
        ready: what health probes see.
        requests: every request that was accepted.
        cancelled: ids of requests that were cancelled while they ran.
    """

    def __init__(self, vocab_size: int, *, max_model_len: int = 512) -> None:
        self.model = ModelInfo(
            name="base",
            model="some/base",
            digest="0" * 64,
            architecture="LlamaForCausalLM",
            device="cpu",
            dtype="float32",
            max_model_len=max_model_len,
            vocab_size=vocab_size,
        )
        self.script: Script = play_back
        self.delay: float | None = 0.0
        self.refusal: RouterError | None = None
        self.ready = True
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.queries: list[AdapterQuery] = []
        self.leased = 0
        self.manifests: dict[str, Manifest] = {}
        self.tokenizers: dict[str, shard_pb2.TokenizerReply] = {}
        self.tokenizers_asked: list[str] = []
        self._adapters = {
            name: AdapterStatus(name=name, source=f"hub:org/{name}", state=AdapterState.ON_DISK)
            for name in ("upper", "reverse", "org/nested")
        }
        self._running: dict[str, asyncio.Task[None]] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        task = asyncio.get_running_loop().create_task(self._play(request))
        self._running[request.id] = task
        task.add_done_callback(lambda _: self._running.pop(request.id, None))

    async def _play(self, request: Request) -> None:
        for event in self.script(request):
            await asyncio.sleep(math.inf if self.delay is None else self.delay)
            request.stream.put(event)

    def cancel(self, request_id: str) -> None:
        task = self._running.get(request_id)
        if task is not None:
            self.cancelled.append(request_id)
            task.cancel()

    @asynccontextmanager
    async def prepare(self, query: AdapterQuery) -> AsyncIterator[tuple[PreparedAdapter, ...]]:
        for choice in query.choices:
            if choice.id not in self._adapters:
                raise adapter_not_found(choice.id)
        if query.choices:
            self.queries.append(query)
        prepared = tuple(self._prepared(choice.id, choice.weight) for choice in query.choices)
        if query.merge is not None:
            prepared = (self._prepared("merged", 1.0),)
        self.leased += len(prepared)
        try:
            yield prepared
        finally:
            self.leased -= len(prepared)

    def _prepared(self, name: str, weight: float) -> PreparedAdapter:
        manifest = self.manifests.get(name, Manifest(digest=f"digest of {name}"))
        return PreparedAdapter(name, f"key of {name}", weight, manifest)

    async def tokenizer(self, adapter_digest: str = "") -> shard_pb2.TokenizerReply:
        self.tokenizers_asked.append(adapter_digest)
        await asyncio.sleep(0)
        if adapter_digest not in self.tokenizers:
            raise AdapterNotFound(f"nothing at {adapter_digest}")
        return self.tokenizers[adapter_digest]

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        tenant: str,
        token: str = "",
        pin: bool = False,
        scaling: float = 1.0,
    ) -> AdapterStatus:
        return self._resident(name, source, pinned=pin, scaling=scaling)

    async def merge_adapters(self, name: str, query: AdapterQuery) -> AdapterStatus:
        self.queries.append(query)
        for choice in query.choices:
            self._find(choice.id)
        return self._resident(name, "merge")

    def _resident(
        self, name: str, source: str, *, pinned: bool = False, scaling: float = 1.0
    ) -> AdapterStatus:
        if self.refusal is not None:
            raise self.refusal
        self._adapters[name] = AdapterStatus(
            name=name,
            source=source,
            state=AdapterState.RESIDENT,
            digest=f"digest of {name}",
            bytes=64,
            max_rank=8,
            pinned=pinned,
            kind="LoRA",
            scaling=scaling,
            warnings=("odd",),
        )
        return self._adapters[name]

    async def unload_adapter(self, name: str, *, tenant: str) -> int:
        return self._find(name, pop=True).bytes

    async def pin_adapter(self, name: str, pinned: bool, *, tenant: str) -> AdapterStatus:
        self._adapters[name] = replace(self._find(name), pinned=pinned)
        return self._adapters[name]

    def adapters(self, *, tenant: str) -> list[AdapterStatus]:
        return list(self._adapters.values())

    def _find(self, name: str, *, pop: bool = False) -> AdapterStatus:
        if name not in self._adapters:
            raise adapter_not_found(name)
        return self._adapters.pop(name) if pop else self._adapters[name]
