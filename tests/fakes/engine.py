"""An engine without a shard: it plays a script for each request, behind the EngineClient protocol."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from loraplex.router.client import AdapterState, AdapterStatus, ModelInfo
from loraplex.router.errors import RouterError
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
        refusal: raised by `submit` and `load_adapter`.
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
        self.resolved: list[tuple[str, str, str, str]] = []
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

    def resolve(self, name: str, *, tenant: str, source: str = "", token: str = "") -> str:
        if name not in self._adapters:
            raise adapter_not_found(name)
        self.resolved.append((name, tenant, source, token))
        return f"key of {name}"

    async def load_adapter(
        self, name: str, source: str, *, tenant: str, token: str = "", pin: bool = False
    ) -> AdapterStatus:
        if self.refusal is not None:
            raise self.refusal
        status = AdapterStatus(
            name=name, source=source, state=AdapterState.RESIDENT, bytes=64, max_rank=8, pinned=pin
        )
        self._adapters[name] = status
        return status

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
