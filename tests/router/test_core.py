"""Any order of requests, answers, losses and adapter reports keeps the router's books in order, with one
shard group or two."""

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
from loraplex.router.group import Group
from loraplex.router.messages import (
    Cancelled,
    DiskWaitEnded,
    DiskWished,
    Fetched,
    FetchFailed,
    GroupDraining,
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

    content: Counter[str]
    """What a source holds now, by its id."""
    pending: deque[tuple[str, str, int, str, int]] = field(default_factory=deque)

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
    """Stands for a shard group: plans wait until the test answers them."""

    info: shard_pb2.InfoReply
    index: int
    tasks: HandTasks
    sent: deque[shard_pb2.StepPlan] = field(default_factory=deque)
    abandoned: list[str] = field(default_factory=list)
    epoch: int = 0

    def __post_init__(self) -> None:
        self.device = FakeDevice(self.info)

    def send(self, plan: shard_pb2.StepPlan) -> None:
        assert plan.epoch == self.epoch
        self.sent.append(plan)

    def abandon(self, epoch: int, reason: str) -> None:
        self.abandoned.append(reason)

    def release(self, epoch: int) -> None:
        assert epoch == self.epoch
        assert not self.sent
        assert not self.device.rows

    def restart(self, epoch: int) -> None:
        self.device, self.epoch = FakeDevice(self.info), epoch
        self.sent.clear()


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
        groups=st.sampled_from([1, 2, 2]),
    )
    def begin(self, blocks: int, rows: int, slots: int, step_tokens: int, groups: int) -> None:
        self.info = make_info(
            blocks=blocks,
            block_size=2,
            rows=rows,
            slots=slots,
            step_tokens=step_tokens,
            adapter_bytes=slots * BYTES,
        )
        self.content: Counter[str] = Counter()
        self.groups = [HandShards(self.info, i, HandTasks(self.content)) for i in range(groups)]
        self.core = Core(
            RouterConfig(
                served_model_name="base",
                groups=tuple((f"localhost:{1 + i}",) for i in range(groups)),
                adapter_patience=2.0,
            ),
            tuple(self.groups),  # type: ignore[arg-type]
            tuple(group.tasks for group in self.groups),  # type: ignore[arg-type]
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
        for group in self.groups:
            self._ready(group)

    def _handle(self, message: Any) -> None:
        self.now += 0.01
        self.core.handle(message, self.now)
        self.core.advance(self.now)

    def _ready(self, group: HandShards) -> None:
        self.epoch += 1
        group.restart(self.epoch)
        self._handle(GroupReady(group.index, self.epoch, self.info))

    def _with(self, what: str) -> list[HandShards]:
        """Groups that have plans to answer ("sent"), or commands to report on ("pending")."""
        return [g for g in self.groups if (g.sent if what == "sent" else g.tasks.pending)]

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
        self.content[name] += changed
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

    @precondition(lambda self: self._with("sent"))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self._answer(data.draw(st.sampled_from(self._with("sent"))))

    def _answer(self, group: HandShards) -> None:
        self._handle(StepAnswered(group.device.run(group.sent.popleft())))

    @precondition(lambda self: self._with("pending"))
    @rule(data=st.data(), fails=st.booleans())
    def report(self, data: st.DataObject, fails: bool) -> None:
        self._report(data.draw(st.sampled_from(self._with("pending"))), fails)

    def _report(self, group: HandShards, fails: bool) -> None:
        command, key, epoch, digest, slot = group.tasks.pending.popleft()
        assert epoch == group.epoch
        if command == "fetch" and fails:
            self._handle(FetchFailed(key, epoch, AdapterFetchFailed("no")))
        elif command == "gone":
            self._handle(FetchFailed(key, epoch, AdapterRejected("other bytes")))
        elif command == "fetch":
            self.digests.setdefault(key, digest)
            self._handle(Fetched(key, epoch, Manifest(digest=digest, bytes=BYTES), 0.1))
        elif command == "load":
            assert slot not in group.device.slots
            assert digest == self.digests[key]
            group.device.slots[slot] = digest
            self._handle(Loaded(key, epoch, shard_pb2.LoadAdapterReply(bytes=BYTES), 0.1))
        else:
            self._free_slot(group, slot)
            self._handle(Unloaded(key, epoch))

    def _free_slot(self, group: HandShards, slot: int) -> None:
        """No row that lives, or that a plan in flight starts, may name a slot that is freed."""
        starts = [row.start for row in group.device.rows.values()]
        starts += [start for plan in group.sent for start in plan.starts]
        named = {entry.slot for start in starts for span in start.spans for entry in span.entries}
        assert slot not in named
        del group.device.slots[slot]

    @rule(seconds=st.sampled_from([0.5, 3.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.core.advance(self.now)

    @precondition(lambda self: len(self.core.fleet) > 0)
    @rule(data=st.data(), answered=st.booleans(), returns=st.booleans())
    def lose(self, data: st.DataObject, answered: bool, returns: bool) -> None:
        group = self.groups[data.draw(st.sampled_from([group.index for group in self.core.fleet]))]
        epoch = group.epoch
        group.sent.clear()
        self._handle(GroupLost(epoch, ShardLost("gone")))
        assert not group.tasks.pending
        if returns:
            self._ready(group)
        if answered:
            self._handle(StepAnswered(shard_pb2.StepResult(epoch=epoch, seq=1, last=True)))

    @precondition(lambda self: len(self.core.fleet) > 0)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        group = self.groups[data.draw(st.sampled_from([group.index for group in self.core.fleet]))]
        self._handle(GroupDraining(group.epoch))

    @precondition(lambda self: len(self.core.fleet) < len(self.groups))
    @rule()
    def come_back(self) -> None:
        there = {group.index for group in self.core.fleet}
        for group in self.groups:
            if group.index not in there:
                self._ready(group)

    @invariant()
    def books_are_in_order(self) -> None:
        for group in self.core.fleet:
            self._check_group(group, self.groups[group.index])
            assert not (group.draining and group.queues)
        assert (self.core.lost_at is None) is (len(self.core.fleet) > 0)
        waiting = [a for a in self.asked if a.sequence.state is SequenceState.WAITING]
        assert len(waiting) == self.core.fleet.waiting_count
        assert all(self.core.fleet.waits(asked.sequence) for asked in waiting)

    def _check_group(self, group: Group, shards: HandShards) -> None:
        assert not shards.abandoned
        given = [s for s in self.core.live.values() if s.epoch == group.epoch]
        assert group.load.tokens == sum(s.last_position for s in given)
        assert set(group.load.by_adapter) == {key for s in given for key in s.keys}
        group.pool.check()
        owned = [block for sequence in group.running for block in sequence.blocks]
        assert len(owned) == len(set(owned)) == group.pool.used_count
        rows = [sequence.row for sequence in group.running]
        assert sorted(rows + group.free_rows) == list(range(group.limits.rows))
        assert len(group.in_flight) == len(shards.sent) <= 2
        held = list(group.residency.entries())
        assert group.residency.free_slots + len(held) == self.info.adapter_slots
        assert group.residency.free_bytes == self.info.adapter_bytes - BYTES * len(held) >= 0
        assert all(e.references == 0 or e.place is Place.RESIDENT for e in held)
        for sequence in group.running:
            assert sequence.generated <= sequence.sampled < sequence.max_output
            assert sequence.computed <= min(sequence.last_position, sequence.capacity)
            assert sequence.epoch == group.epoch

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
            busy = self._with("pending") or self.leases or self.core.lifecycle.busy
            if self.core.quiet and not busy:
                break
            if self.leases:
                self.release()
            if len(self.core.fleet) == 0:
                self.come_back()
            for group in self._with("pending"):
                self._report(group, False)
            for group in self._with("sent"):
                self._answer(group)
            self.now += 0.1
            self.core.advance(self.now)
            self.books_are_in_order()
        assert self.core.quiet
        for asked in self.asked:
            self._check_end(asked)
        for group in self.core.fleet:
            assert group.pool.used_count == 0
            assert group.load.tokens == 0
            assert all(entry.references == 0 for entry in group.residency.entries())
            assert not self.groups[group.index].device.rows
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
