"""Before a request is accepted: what its adapters are, fetched where nobody knows it yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from .client import AdapterQuery, PreparedAdapter
from .core import Core
from .errors import RouterError
from .merges import Merge, MergePart, check_part_count
from .messages import DiskWaitEnded, DiskWished, Message
from .metrics import Metrics
from .queues import AdapterSet
from .sums import check_parts
from .versions import Adapter


@dataclass(slots=True)
class _Waiting:
    """A call that waits for a disk, as the queues' bounds count it: like a request without tokens."""

    keys: AdapterSet
    tenant: str
    prompt_length: int = 0
    counted: bool = False


class Preparer:
    """Runs in the calls' own tasks. A lease keeps a version known from its resolution until the block that
    uses it is left.

    Args:
        refuse_when_down: raises what a call gets while nothing is accepted.
        post: puts a message into the loop's inbox.
        wake: makes the loop look at what is closing.
    """

    def __init__(
        self,
        core: Core,
        metrics: Metrics,
        *,
        refuse_when_down: Callable[[], None],
        post: Callable[[Message], None],
        wake: Callable[[], None],
    ) -> None:
        self._core = core
        self._metrics = metrics
        self._refuse_when_down = refuse_when_down
        self._post = post
        self._wake = wake

    @asynccontextmanager
    async def prepare(self, query: AdapterQuery) -> AsyncIterator[tuple[PreparedAdapter, ...]]:
        """As `EngineClient.prepare`."""
        leased: list[Adapter] = []
        try:
            yield await self._prepare(query, leased)
        finally:
            self._release(leased)

    @asynccontextmanager
    async def merge(self, query: AdapterQuery) -> AsyncIterator[tuple[Merge, str | None]]:
        """The merge that a query with a recipe asks for, with its parts on disk, and whose it is."""
        leased: list[Adapter] = []
        try:
            yield self._merge(query, await self._parts(query, leased), leased)
        finally:
            self._release(leased)

    async def _prepare(self, query: AdapterQuery, leased: list[Adapter]) -> tuple[PreparedAdapter, ...]:
        """`leased` gets every version that is held, even if this fails."""
        try:
            self._refuse_when_down()
            prepared = await self._parts(query, leased)
            if query.merge is None:
                return prepared
            merge, owner = self._merge(query, prepared, leased)
            adapter = self._lease(self._core.registry.merged(merge, owner), leased)
            await self._have_on_disk([adapter], query.tenant)
            return (_prepared(adapter, 1.0),)
        except RouterError as error:
            self._metrics.refusals[error.code] += 1
            raise

    async def _parts(self, query: AdapterQuery, leased: list[Adapter]) -> tuple[PreparedAdapter, ...]:
        """What the query names. `leased` gets every version, one for each choice."""
        if query.merge is not None:
            check_part_count(len(query.choices), query.merge)
        resolve = self._core.registry.resolve
        weights: list[float] = []
        for choice in query.choices:
            adapter = resolve(choice.id, tenant=query.tenant, source=query.source, token=query.token)
            self._lease(adapter, leased)
            weights.append(choice.weight * adapter.scaling)
        await self._have_on_disk(leased, query.tenant)
        return tuple(_prepared(adapter, weight) for adapter, weight in zip(leased, weights, strict=True))

    def _merge(
        self, query: AdapterQuery, prepared: Sequence[PreparedAdapter], leased: Sequence[Adapter]
    ) -> tuple[Merge, str | None]:
        assert query.merge is not None
        check_parts(prepared)
        parts = tuple(
            MergePart(
                digest=part.manifest.digest,
                weight=part.weight,
                name=part.name,
                source=adapter.source,
                revision=part.manifest.revision,
                token=adapter.token,
            )
            for part, adapter in zip(prepared, leased, strict=True)
        )
        private = any(adapter.owner is not None for adapter in leased)
        return Merge(parts, query.merge), query.tenant if private else None

    async def _have_on_disk(self, adapters: Sequence[Adapter], tenant: str) -> None:
        """Return once all of them are prepared: at once, without a turn of the loop, if they are already."""
        missing = [adapter for adapter in adapters if not adapter.prepared]
        if not missing:
            return
        now = asyncio.get_running_loop().time()
        for adapter in missing:
            if adapter.failure is not None and adapter.retry_at > now:
                raise adapter.error(now)
        keys = tuple(sorted({adapter.key for adapter in adapters}))
        with self._counted(_Waiting(keys, tenant)):
            while missing:
                await self._fetch(missing)
                missing = [adapter for adapter in adapters if not adapter.prepared]

    @contextmanager
    def _counted(self, waiting: _Waiting) -> Iterator[None]:
        """Raises what the queues' bounds refuse with."""
        self._core.bounds.take(waiting)
        try:
            yield
        finally:
            self._core.bounds.give_back(waiting)

    async def _fetch(self, missing: Sequence[Adapter]) -> None:
        """Ask for all of them, and wait for each; the first error is raised."""
        loop = asyncio.get_running_loop()
        waits: list[tuple[Adapter, asyncio.Future[None]]] = [(a, loop.create_future()) for a in missing]
        for adapter, done in waits:
            self._post(DiskWished(adapter, done))
        try:
            await asyncio.gather(*(done for _, done in waits))
        finally:
            for adapter, done in waits:
                done.cancel()
                self._post(DiskWaitEnded(adapter, done))

    def _lease(self, adapter: Adapter, leased: list[Adapter]) -> Adapter:
        adapter.leases += 1
        leased.append(adapter)
        return adapter

    def _release(self, leased: Sequence[Adapter]) -> None:
        for adapter in leased:
            adapter.leases -= 1
            if adapter.closing and not adapter.leases:
                self._wake()


def _prepared(adapter: Adapter, weight: float) -> PreparedAdapter:
    assert adapter.manifest is not None
    return PreparedAdapter(adapter.name, adapter.key, weight, adapter.manifest)
