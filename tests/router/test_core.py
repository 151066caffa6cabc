"""Any order of requests, answers, losses and adapter reports keeps the router's books in order."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from loraplex.proto import shard_pb2
from loraplex.router.client import Manifest
from loraplex.router.config import RouterConfig
from loraplex.router.core import Core
from loraplex.router.downloads import Download
from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    RouterError,
    ShardLost,
)
from loraplex.router.messages import (
    Cancelled,
    DiskWaitEnded,
    DiskWished,
    Fetched,
    FetchFailed,
    GroupLost,
    GroupReady,
    Loaded,
    LoadWished,
    StepAnswered,
    Submitted,
    Unloaded,
    UnloadWished,
)
from loraplex.router.metrics import Metrics
from loraplex.router.request import AdapterUse, FinishReason, Request, SamplingParams, TokenStream
from loraplex.router.residency import Place
from loraplex.router.sequence import Sequence, SequenceState
from loraplex.router.versions import Adapter

from ..fakes.shard import FakeDevice, generate, make_info

BYTES = 100
ENDS = (AdapterFetchFailed, AdapterNotFound, AdapterRejected, ShardLost)
"""Errors that a call may get here."""
ADAPTERS = 5


@dataclass
class HandTasks:
    """Stands for AdapterTasks: commands wait until the test answers them."""

    pending: deque[tuple[str, str, int, str, int]] = field(default_factory=deque)
    content: Counter[str] = field(default_factory=Counter)
    """What a source holds now, by its id."""

    def fetch(self, key: str, epoch: int, downloads: list[Download]) -> None:
        request = downloads[-1].request
        digest = f"sha-{request.id}-{self.content[request.id]}"
        gone = request.expect_digest not in ("", digest)
        self.pending.append(("gone" if gone else "fetch", key, epoch, digest, 0))

    def load(self, key: str, epoch: int, digest: str, slot: int) -> None:
        self.pending.append(("load", key, epoch, digest, slot))

    def unload(self, key: str, epoch: int, slot: int) -> None:
        self.pending.append(("unload", key, epoch, "", slot))

    def cancel(self) -> None:
        self.pending.clear()


@dataclass
class HandShards:
    """Stands for the shard group: plans wait until the test answers them."""

    sent: deque[shard_pb2.StepPlan] = field(default_factory=deque)
    abandoned: list[str] = field(default_factory=list)

    def send(self, plan: shard_pb2.StepPlan) -> None:
        self.sent.append(plan)

    def abandon(self, epoch: int, reason: str) -> None:
        self.abandoned.append(reason)


@dataclass
class Asked:
    sequence: Sequence
    digests: dict[str, str]
    """Of every version that was ever fetched, by key."""
    cancelled: bool = False

    @property
    def expected(self) -> list[int]:
        """What it gets from its versions, whatever their names have come to stand for."""
        request = self.sequence.request
        entries = tuple((self.digests[use.key], use.weight) for use in request.adapters)
        params = request.params
        return generate(
            request.prompt, params.max_tokens, entries=entries, seed=params.seed, stop_ids=params.stop_ids
        )

    @property
    def events(self) -> list[Any]:
        return self.sequence.request.stream._events

    @property
    def tokens(self) -> list[int]:
        return [t for event in self.events if not isinstance(event, RouterError) for t in event.tokens]


class RouterMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(10, 40),
        rows=st.integers(1, 6),
        slots=st.integers(2, 4),
        step_tokens=st.sampled_from([4, 8, 32]),
    )
    def begin(self, blocks: int, rows: int, slots: int, step_tokens: int) -> None:
        self.info = make_info(
            blocks=blocks,
            block_size=2,
            rows=rows,
            slots=slots,
            step_tokens=step_tokens,
            adapter_bytes=slots * BYTES,
        )
        self.tasks, self.shards = HandTasks(), HandShards()
        self.core = Core(
            RouterConfig(served_model_name="base", ranks=("x",), adapter_patience=2.0),
            self.shards,  # type: ignore[arg-type]
            self.tasks,  # type: ignore[arg-type]
            Metrics(CollectorRegistry()),
            patience_lost=1e9,
            jitter=random.Random(0),
        )
        self.loop = asyncio.new_event_loop()
        self.digests: dict[str, str] = {}
        self.futures: list[asyncio.Future[Any]] = []
        self.leases: list[tuple[Adapter, asyncio.Future[None]]] = []
        self.now = 0.0
        self.epoch = 0
        self.asked: list[Asked] = []
        self._ready()

    def _handle(self, message: Any) -> None:
        self.now += 0.01
        self.core.handle(message, self.now)
        self.core.advance(self.now)

    def _ready(self) -> None:
        self.epoch += 1
        self.device = FakeDevice(self.info)
        self.shards.sent.clear()
        self._handle(GroupReady(self.epoch, self.info))

    @rule(
        length=st.integers(1, 10),
        count=st.integers(1, 8),
        uses=st.lists(st.integers(0, ADAPTERS - 1), max_size=2, unique=True),
        seed=st.integers(0, 3),
        stop=st.booleans(),
    )
    def submit(self, length: int, count: int, uses: list[int], seed: int, stop: bool) -> None:
        prompt = [seed * 10 + i for i in range(length)]
        try:
            chosen = [self._resolve(i).key for i in uses]
        except AdapterNotFound:
            return
        known = [(self.digests[key], 1.0) for key in chosen if key in self.digests]
        stop_ids = (generate(prompt, count, entries=tuple(known), seed=seed)[count // 2],) if stop else ()
        request = Request(
            id=f"r{len(self.asked)}",
            tenant="",
            adapters=tuple(AdapterUse(key) for key in chosen),
            prompt=prompt,
            params=SamplingParams(max_tokens=count, seed=seed, stop_ids=stop_ids),
            stream=TokenStream(),
            arrival=self.now,
        )
        sequence = Sequence(request, next(self.core.tickets), tuple(sorted(chosen)), count)
        self.core.bounds.take(sequence)
        self.core.live[request.id] = sequence
        self.asked.append(Asked(sequence, self.digests))
        self._handle(Submitted(sequence))

    def _resolve(self, index: int) -> Adapter:
        return self.core.registry.resolve(f"org/a{index}", tenant="")

    def _future(self) -> asyncio.Future[Any]:
        self.futures.append(self.loop.create_future())
        return self.futures[-1]

    @rule(index=st.integers(0, ADAPTERS - 1), changed=st.booleans(), scaling=st.sampled_from([1.0, 1.0, 2.0]))
    def load(self, index: int, changed: bool, scaling: float) -> None:
        name = f"org/a{index}"
        self.tasks.content[name] += changed
        adapter = self.core.registry.register(name, name, tenant="", scaling=scaling)
        self._handle(LoadWished(adapter, False, self._future()))

    @rule(index=st.integers(0, ADAPTERS - 1))
    def unload(self, index: int) -> None:
        try:
            versions = self.core.registry.close(f"org/a{index}", "")
        except AdapterNotFound:
            return
        for version in versions:
            self._handle(UnloadWished(version, self._future()))

    @rule(index=st.integers(0, ADAPTERS - 1))
    def prepare(self, index: int) -> None:
        try:
            adapter = self._resolve(index)
        except AdapterNotFound:
            return
        adapter.leases += 1
        self.leases.append((adapter, self._future()))
        self._handle(DiskWished(*self.leases[-1]))

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        adapter, done = self.leases.pop(0)
        assert self.core.registry.get(adapter.key) is adapter
        done.cancel()
        adapter.leases -= 1
        self._handle(DiskWaitEnded(adapter, done))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        asked.cancelled |= asked.sequence.state is not SequenceState.DONE
        self._handle(Cancelled(asked.sequence.request.id))

    @precondition(lambda self: self.shards.sent)
    @rule()
    def answer(self) -> None:
        self._handle(StepAnswered(self.device.run(self.shards.sent.popleft())))

    @precondition(lambda self: self.tasks.pending)
    @rule(fails=st.booleans())
    def report(self, fails: bool) -> None:
        command, key, epoch, digest, slot = self.tasks.pending.popleft()
        if command == "fetch" and fails:
            self._handle(FetchFailed(key, epoch, AdapterFetchFailed("no")))
        elif command == "gone":
            self._handle(FetchFailed(key, epoch, AdapterRejected("other bytes")))
        elif command == "fetch":
            assert self.digests.setdefault(key, digest) == digest
            self._handle(Fetched(key, epoch, Manifest(digest=digest, bytes=BYTES), 0.1))
        elif command == "load":
            assert slot not in self.device.slots
            self.device.slots[slot] = digest
            self._handle(Loaded(key, epoch, shard_pb2.LoadAdapterReply(bytes=BYTES), 0.1))
        else:
            self._free_slot(slot)
            self._handle(Unloaded(key, epoch))

    def _free_slot(self, slot: int) -> None:
        """No row that lives, or that a plan in flight starts, may name a slot that is freed."""
        starts = [row.start for row in self.device.rows.values()]
        starts += [start for plan in self.shards.sent for start in plan.starts]
        named = {entry.slot for start in starts for span in start.spans for entry in span.entries}
        assert slot not in named
        del self.device.slots[slot]

    @rule(seconds=st.sampled_from([0.5, 3.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.core.advance(self.now)

    @rule(answered=st.booleans())
    def lose(self, answered: bool) -> None:
        self._handle(GroupLost(self.epoch, ShardLost("gone")))
        late = StepAnswered(shard_pb2.StepResult(epoch=self.epoch, seq=1, last=True))
        self._ready()
        if answered:
            self._handle(late)

    @invariant()
    def books_are_in_order(self) -> None:
        group = self.core.group
        assert group is not None
        assert not self.shards.abandoned
        group.pool.check()
        owned = [block for sequence in group.running for block in sequence.blocks]
        assert len(owned) == len(set(owned)) == group.pool.used_count
        rows = [sequence.row for sequence in group.running]
        assert sorted(rows + group.free_rows) == list(range(group.limits.rows))
        assert len(group.in_flight) == len(self.shards.sent) <= 2
        held = list(group.residency.entries())
        assert group.residency.free_slots + len(held) == self.info.adapter_slots
        assert group.residency.free_bytes == self.info.adapter_bytes - BYTES * len(held) >= 0
        assert all(e.references == 0 or e.place is Place.RESIDENT for e in held)
        for sequence in group.running:
            assert sequence.generated <= sequence.sampled < sequence.max_output
            assert sequence.computed <= min(sequence.last_position, sequence.capacity)
        waiting = [a for a in self.asked if a.sequence.state is SequenceState.WAITING]
        assert len(waiting) == len(self.core.queues)

    @invariant()
    def streams_are_prefixes(self) -> None:
        for asked in self.asked:
            if tokens := asked.tokens:
                assert tokens == asked.expected[: len(tokens)]

    def teardown(self) -> None:
        """Left alone, everything ends: nobody starves, and nothing is left behind."""
        if not hasattr(self, "core"):
            return
        try:
            self._run_out()
        finally:
            self.loop.close()

    def _run_out(self) -> None:
        for _ in range(200 * (1 + len(self.asked))):
            busy = self.tasks.pending or self.leases or self.core.lifecycle.busy
            if self.core.quiet and not busy:
                break
            if self.leases:
                self.release()
            if self.tasks.pending:
                self.report(False)
            if self.shards.sent:
                self.answer()
            self.now += 0.1
            self.core.advance(self.now)
            self.books_are_in_order()
        assert self.core.quiet
        for asked in self.asked:
            self._check_end(asked)
        group = self.core.group
        assert group is not None
        assert group.pool.used_count == 0
        assert all(entry.references == 0 for entry in group.residency.entries())
        assert not self.device.rows
        assert not self.core.bounds._shares
        assert all(future.done() for future in self.futures)
        registry = self.core.registry
        assert all(registry.named(adapter) is adapter for adapter in registry)
        assert not any(adapter.leases or adapter.closing or adapter.candidate for adapter in registry)
        for future in self.futures:
            self._check_answer(future)

    def _check_answer(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        assert error is None or isinstance(error, ENDS)

    def _check_end(self, asked: Asked) -> None:
        """Exactly one terminal event, and none after a cancel; TokenStream refuses a second."""
        ends = [e for e in asked.events if isinstance(e, RouterError) or e.finish is not None]
        if asked.cancelled:
            assert not ends
            return
        assert len(ends) == 1
        assert asked.events[-1] is ends[0]
        if isinstance(ends[0], RouterError):
            assert isinstance(ends[0], ENDS)
            return
        assert asked.tokens == asked.expected
        stopped = asked.expected[-1] in asked.sequence.request.params.stop_ids
        assert ends[0].finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)


TestRouter = RouterMachine.TestCase
TestRouter.settings = settings(
    max_examples=120, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
