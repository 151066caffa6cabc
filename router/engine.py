"""The engine: what the API calls, and the one task in which the router's state changes."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from ..proto import shard_pb2
from .client import AdapterQuery, AdapterStatus, ModelInfo, PreparedAdapter
from .config import RouterConfig
from .core import Core, draining
from .errors import AdapterNotFound, InternalError, InvalidRequest, Overloaded, RouterError, ShardLost
from .fetches import AdapterTasks
from .messages import (
    Cancelled,
    DrainBegan,
    DrainEnded,
    GroupDraining,
    GroupLost,
    GroupReady,
    LoadWished,
    Message,
    StepAnswered,
    Submitted,
    UnloadWished,
    Unpinned,
)
from .metrics import Metrics
from .preparation import Preparer
from .request import Request
from .sequence import Sequence
from .shards import ShardGroup
from .sources import adapter_not_found
from .versions import Adapter

log = logging.getLogger(__name__)

TICK = 0.25
"""Seconds between two looks at the clock while requests wait."""


class Engine:
    """`EngineClient` over one or several shard groups.

    Calls from the API and events of the groups are messages to one task, which alone changes state. A
    refusal is raised in the caller's own task, from a read of that state.

    Args:
        shards: the groups, in the order of the configuration.
        patience_lost: seconds that requests wait for a group to come back when the last one is lost.
        jitter: of the backoffs.
    """

    def __init__(
        self,
        config: RouterConfig,
        shards: tuple[ShardGroup, ...],
        metrics: Metrics,
        *,
        patience_lost: float = 60.0,
        jitter: random.Random | None = None,
    ) -> None:
        self._config = config
        self._shards = shards
        self._metrics = metrics
        self._patience_lost = patience_lost
        self._tasks = tuple(AdapterTasks(group, self._post) for group in self._shards)
        self._core = Core(
            config,
            self._shards,
            self._tasks,
            metrics,
            patience_lost=patience_lost,
            jitter=jitter or random.Random(),
        )
        self._inbox: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._preparer = Preparer(
            self._core,
            metrics,
            refuse_when_down=self._refuse_when_down,
            post=self._post,
            wake=self._wake.set,
        )
        self._quiet = asyncio.Event()
        self._first_ready = asyncio.Event()
        self._draining = False
        self._tick: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        metrics.snapshot = self._core.snapshot

    # Life.

    def start(self) -> None:
        """Start the loop and connect to the shards. Must run on the event loop."""
        self._task = asyncio.create_task(self._run(), name="engine")
        for index, group in enumerate(self._shards):
            group.start(_Listener(index, self._post))

    async def wait_ready(self) -> None:
        """Return once every group has answered for the first time, and one serves."""
        await self._first_ready.wait()

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, give accepted ones `timeout` seconds, then end the rest with Draining."""
        self._draining = True
        self._post(DrainBegan())
        try:
            async with asyncio.timeout(timeout):
                await self._until_quiet()
        except TimeoutError:
            self._post(DrainEnded())

    async def close(self) -> None:
        """Stop: whatever is still accepted ends with Draining, tasks and streams are closed."""
        self._draining = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._tick is not None:
            self._tick.cancel()
        self._take_inbox(asyncio.get_running_loop().time())
        self._core.end_all(draining)
        await asyncio.gather(*(tasks.close() for tasks in self._tasks))
        await asyncio.gather(*(group.close() for group in self._shards))

    # EngineClient.

    @property
    def model(self) -> ModelInfo:
        info = self._core.info
        if info is None:
            raise Overloaded("The model is still being loaded.", retry_after=5.0)
        return ModelInfo(
            name=self._config.served_model_name,
            model=info.model,
            digest=info.model_digest,
            architecture=info.architecture,
            device=info.device,
            dtype=info.dtype,
            max_model_len=self._core.context_length,
            vocab_size=info.vocab_size,
        )

    @property
    def ready(self) -> bool:
        return bool(self._core.fleet.accepting) and not self._draining

    def group_ready(self, index: int) -> bool:
        """This group serves."""
        return not self._draining and any(group.index == index for group in self._core.fleet.accepting)

    async def tokenizer(self, adapter_digest: str = "") -> shard_pb2.TokenizerReply:
        """As `ShardGroup.tokenizer`, of a group that has the adapter on disk."""
        error: RouterError = ShardLost("The model's process is being restarted.", retry_after=5.0)
        for index in self._core.groups_with(adapter_digest):
            try:
                return await self._shards[index].tokenizer(adapter_digest)
            except (AdapterNotFound, ShardLost) as failed:
                error = failed
        raise error

    def submit(self, request: Request) -> None:
        try:
            sequence = self._accept(request)
            self._core.bounds.take(sequence)
        except RouterError as error:
            self._metrics.refusals[error.code] += 1
            raise
        self._core.live[request.id] = sequence
        self._post(Submitted(sequence))

    def cancel(self, request_id: str) -> None:
        if request_id in self._core.live:
            self._post(Cancelled(request_id))

    def prepare(self, query: AdapterQuery) -> AbstractAsyncContextManager[tuple[PreparedAdapter, ...]]:
        return self._preparer.prepare(query)

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
        self._refuse_when_down()
        registry = self._core.registry
        adapter = registry.register(name, source, tenant=tenant, token=token, scaling=scaling)
        return await self._make_resident(adapter, pin)

    async def merge_adapters(self, name: str, query: AdapterQuery) -> AdapterStatus:
        self._refuse_when_down()
        self._core.registry.check_new_name(name)
        async with self._preparer.merge(query) as (merge, owner):
            adapter = self._core.registry.register_merge(name, merge, owner)
            return await self._make_resident(adapter, False)

    async def unload_adapter(self, name: str, *, tenant: str) -> int:
        self._refuse_when_down()
        loop = asyncio.get_running_loop()
        ends: list[asyncio.Future[int]] = []
        for version in self._core.registry.close(name, tenant):
            ends.append(loop.create_future())
            self._post(UnloadWished(version, ends[-1]))
        return sum(await asyncio.gather(*ends))

    async def pin_adapter(self, name: str, pinned: bool, *, tenant: str) -> AdapterStatus:
        self._refuse_when_down()
        adapter = self._core.registry.find(name, tenant)
        if pinned:
            return await self._make_resident(adapter, True)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._post(Unpinned(adapter, done))
        await done
        return self._core.status(adapter)

    def adapters(self, *, tenant: str) -> list[AdapterStatus]:
        return [self._core.status(adapter) for adapter in self._core.registry.visible(tenant)]

    # Acceptance, in the caller's task.

    def _refuse_when_down(self) -> None:
        if self._draining:
            raise draining()
        if self._core.info is None:
            raise Overloaded("The model is still being loaded.", retry_after=5.0)
        if self._core.lost_at is not None and self._now() - self._core.lost_at > self._patience_lost:
            raise Overloaded("The model's process is away.", retry_after=10.0)

    def _accept(self, request: Request) -> Sequence:
        """Check a request against the model and its adapters; raises what the caller shall see."""
        self._refuse_when_down()
        info = self._core.info
        assert info is not None
        if request.id in self._core.live:
            raise InternalError(f"Request id {request.id} is in use.")
        most = self._core.context_length
        room = most - len(request.prompt)
        if not request.prompt or room < 1:
            raise InvalidRequest(
                f"The prompt has {len(request.prompt)} tokens; it must have 1 to {most - 1}.", param="prompt"
            )
        keys = tuple(sorted({use.key for use in request.adapters}))
        self._check_adapters(keys, info)
        return Sequence(request, next(self._core.tickets), keys, max(1, min(request.params.max_tokens, room)))

    def _check_adapters(self, keys: tuple[str, ...], info: shard_pb2.InfoReply) -> None:
        if len(keys) > info.adapter_slots:
            raise InvalidRequest(
                f"A request may name at most {info.adapter_slots} adapters.", param="adapters"
            )
        for key in keys:
            adapter = self._core.registry.get(key)
            if adapter is None:
                raise adapter_not_found(key.rpartition("#")[0])
            if adapter.failure is not None and adapter.retry_at > self._now():
                raise adapter.error(self._now())

    async def _make_resident(self, adapter: Adapter, pin: bool) -> AdapterStatus:
        done: asyncio.Future[Adapter] = asyncio.get_running_loop().create_future()
        self._post(LoadWished(adapter, pin, done))
        return self._core.status(await done)

    # The loop.

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _post(self, message: Message) -> None:
        self._inbox.append(message)
        self._wake.set()

    async def _run(self) -> None:
        """Apply what came in, then send steps; look at the clock now and then while something waits."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                self._turn(loop.time())
            except Exception:  # the loop's outermost edge: a bug ends requests, not the service
                log.exception("the engine failed; every request is ended")
                self._core.recover()
                self._wake.set()
            if self._core.quiet:
                self._quiet.set()
            if self._core.waits and self._tick is None:
                self._tick = loop.call_later(TICK, self._on_tick)

    def _turn(self, now: float) -> None:
        self._take_inbox(now)
        self._core.advance(now)
        if self._core.complete and self._core.fleet.accepting:
            self._first_ready.set()

    def _take_inbox(self, now: float) -> None:
        inbox, handle = self._inbox, self._core.handle
        while inbox:
            handle(inbox.popleft(), now)

    def _on_tick(self) -> None:
        self._tick = None
        self._wake.set()

    async def _until_quiet(self) -> None:
        """Return when nothing is accepted, planned or in flight."""
        while self._inbox or not self._core.quiet:
            self._quiet.clear()
            await self._quiet.wait()


@dataclass(frozen=True, slots=True)
class _Listener:
    """`GroupEvents` of one group, as messages to the loop."""

    index: int
    post: Callable[[Message], None]

    def group_ready(self, epoch: int, info: shard_pb2.InfoReply) -> None:
        self.post(GroupReady(self.index, epoch, info))

    def step_answered(self, result: shard_pb2.StepResult) -> None:
        self.post(StepAnswered(result))

    def group_draining(self, epoch: int) -> None:
        self.post(GroupDraining(epoch))

    def group_lost(self, epoch: int, error: RouterError) -> None:
        self.post(GroupLost(epoch, error))
