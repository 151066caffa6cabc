"""An engine on fake shard groups, with helpers to ask it and to look at what is left."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from loraplex.router.client import AdapterQuery, AdapterStatus, PreparedAdapter
from loraplex.router.config import RouterConfig
from loraplex.router.engine import Engine
from loraplex.router.metrics import Metrics
from loraplex.router.request import (
    AdapterChoice,
    AdapterUse,
    FinishReason,
    Request,
    SamplingParams,
    TokenStream,
)
from loraplex.router.sums import uses_in

from ..fakes.polling import until
from ..fakes.shard import FakeAdapter, FakeShards


class Served:
    """An engine on fake shard groups; `shards` is the first of them."""

    def __init__(self, groups: tuple[FakeShards, ...], config: RouterConfig, patience_lost: float) -> None:
        self.groups = groups
        self.shards = groups[0]
        self.metrics = Metrics(CollectorRegistry())
        self.engine = Engine(
            config, groups, self.metrics, patience_lost=patience_lost, jitter=random.Random(0)
        )
        self._count = 0

    def submit(
        self,
        prompt: Sequence[int],
        *uses: AdapterUse,
        tenant: str = "",
        request_id: str = "",
        **params: object,
    ) -> Request:
        self._count += 1
        request = Request(
            id=request_id or f"r{self._count}",
            tenant=tenant,
            adapters=uses,
            prompt=prompt,
            params=SamplingParams(**{"max_tokens": 8, **params}),  # type: ignore[arg-type]
            stream=TokenStream(),
            arrival=asyncio.get_running_loop().time(),
        )
        self.engine.submit(request)
        return request

    def use(self, name: str, weight: float = 1.0) -> AdapterUse:
        """Without a lease: also of what is not on disk yet, as after a lost group."""
        return AdapterUse(self.engine._core.registry.resolve(name, tenant="").key, weight)

    async def ask(self, prompt: Sequence[int], *choices: AdapterChoice | str, **params: object) -> Request:
        """Prepare and submit, as a call does."""
        async with self.engine.prepare(query(*choices)) as adapters:
            return self.submit(prompt, *uses_in(prompt, adapters), **params)  # type: ignore[arg-type]

    async def prepared(self, *choices: AdapterChoice | str) -> tuple[PreparedAdapter, ...]:
        async with self.engine.prepare(query(*choices)) as adapters:
            return adapters

    async def load(self, name: str, source: str, **options: object) -> AdapterStatus:
        return await self.engine.load_adapter(name, source, tenant="", **options)  # type: ignore[arg-type]

    def status(self, name: str) -> AdapterStatus:
        (found,) = [status for status in self.engine.adapters(tenant="") if status.name == name]
        return found

    def group_of(self, name: str) -> FakeShards:
        """The one group on which an adapter is resident."""
        (found,) = [s for s in self.groups if FakeAdapter.digest(name) in s.device.slots.values()]
        return found

    async def at_baseline(self) -> None:
        """Wait until nothing is accepted or in flight, then check that nothing is left of it."""
        async with asyncio.timeout(30):
            await self.engine._until_quiet()
        await until(lambda: not self.engine._core.lifecycle.busy)
        now = self.metrics.snapshot()
        assert (now.running, now.waiting, now.blocks_used, now.rows_used) == (0, 0, 0, 0)
        assert (now.adapter_references, now.steps_in_flight) == (0, 0)
        assert not any(shards.device.rows for shards in self.groups if shards.connected)
        assert not any(shards.violations for shards in self.groups)
        assert not self.engine._core.bounds._shares
        assert all(adapter.leases == 0 for adapter in self.engine._core.registry)
        for group in self.engine._core.fleet:
            group.pool.check()
            assert group.load.tokens == 0
            assert not group.load.by_adapter


async def read(request: Request) -> tuple[list[int], FinishReason | None]:
    events = [event async for event in request.stream]
    return [token for event in events for token in event.tokens], events[-1].finish


async def tokens_of(request: Request) -> list[int]:
    async with asyncio.timeout(30):
        return (await read(request))[0]


def replicas(count: int, **kwargs: object) -> tuple[FakeShards, ...]:
    """Fake groups for one router."""
    epochs = itertools.count(1)
    return tuple(FakeShards(epochs=epochs, **kwargs) for _ in range(count))  # type: ignore[arg-type]


@asynccontextmanager
async def serving(
    *shards: FakeShards, patience_lost: float = 60.0, **config: object
) -> AsyncIterator[Served]:
    groups = shards or (FakeShards(),)
    addresses = tuple((f"localhost:{1 + index}",) for index in range(len(groups)))
    settings = {"served_model_name": "base", "groups": addresses, **config}
    served = Served(groups, RouterConfig(**settings), patience_lost)  # type: ignore[arg-type]
    served.engine.start()
    await served.engine.wait_ready()
    try:
        yield served
    finally:
        await served.engine.close()
    assert not any(shards.violations for shards in groups)


def query(*choices: AdapterChoice | str, tenant: str = "", token: str = "") -> AdapterQuery:
    named = [AdapterChoice(choice) if isinstance(choice, str) else choice for choice in choices]
    return AdapterQuery(choices=named, tenant=tenant, token=token)


def hub(count: int, **kwargs: object) -> dict[str, FakeAdapter]:
    return {f"org/a{index}": FakeAdapter(**kwargs) for index in range(count)}  # type: ignore[arg-type]
