"""The router's state and what changes it: messages in, steps out. Runs in the engine's loop only."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

from ..proto import shard_pb2
from .adapters import AdapterRegistry
from .client import AdapterStatus
from .config import RouterConfig
from .errors import Draining, InternalError, RouterError, ShardLost
from .fetches import AdapterTasks
from .group import Group
from .lifecycle import AdapterLifecycle
from .messages import (
    AdapterReport,
    Cancelled,
    DiskWaitEnded,
    DiskWished,
    DrainBegan,
    DrainEnded,
    GroupLost,
    GroupReady,
    LoadWished,
    Message,
    StepAnswered,
    Submitted,
    UnloadWished,
    Unpinned,
)
from .metrics import Metrics, Snapshot
from .queues import QueueBounds, Queues
from .residency import Place
from .scheduler import Plan, State, plan, plan_adapters
from .sequence import Sequence, SequenceState
from .shards import ShardGroup
from .sources import SourcePolicy
from .steps import ContractBroken, Settled, apply_plan, settle
from .versions import Adapter

log = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2
MAX_RESTARTS = 3
"""Lost groups after which a request without a token is not run again: it may be the cause."""


class Core:
    """Queues, registry, group and live sequences. `handle` applies one message, `advance` sends steps.

    Others may read the public attributes; only these two methods change them.

    Args:
        tasks: fetch, load and unload adapters, and report by messages.
        patience_lost: seconds that requests wait for a lost group to come back.
    """

    def __init__(
        self,
        config: RouterConfig,
        shards: ShardGroup,
        tasks: AdapterTasks,
        metrics: Metrics,
        *,
        patience_lost: float,
        jitter: random.Random,
    ) -> None:
        self.queues = Queues()
        self.bounds = QueueBounds(config.max_queued_requests, config.max_queued_tokens)
        self.registry = AdapterRegistry(
            SourcePolicy(config.adapter_roots, config.allow_sources),
            base=config.served_model_name,
            specs=config.adapters,
            jitter=jitter,
        )
        self.live: dict[str, Sequence] = {}
        """Accepted requests without a terminal event, in order of acceptance."""
        self.tickets = itertools.count(1)
        self.group: Group | None = None
        self.info: shard_pb2.InfoReply | None = None
        """Of the present group, or of the last one."""
        self.lost_at: float | None = None
        self.lifecycle = AdapterLifecycle(
            self.registry,
            self.queues,
            tasks,
            metrics,
            fail_waiting=self._fail,
            abandon=self._abandon,
        )
        self._config = config
        self._shards = shards
        self._metrics = metrics
        self._patience_lost = patience_lost
        self._now = 0.0
        self._answered_at = 0.0
        self._handlers: dict[type, Callable[[Any], None]] = {
            StepAnswered: self._on_step,
            Submitted: self._on_submitted,
            Cancelled: self._on_cancelled,
            GroupReady: self._on_group_ready,
            GroupLost: self._on_group_lost,
            DrainBegan: self._on_drain_began,
            DrainEnded: self._on_drain_ended,
            DiskWished: self._on_disk_wished,
            DiskWaitEnded: self.lifecycle.end_disk_wait,
            LoadWished: self._on_load_wished,
            UnloadWished: self.lifecycle.close,
            Unpinned: self.lifecycle.unpin,
            **dict.fromkeys(get_args(AdapterReport), self._on_report),
        }

    @property
    def quiet(self) -> bool:
        """Every accepted request is over and the shard was told of every end."""
        return not self.live and (self.group is None or self.group.idle)

    @property
    def waits(self) -> bool:
        """Time alone may change what is to be done."""
        return bool(self.queues) or self.lifecycle.busy

    def handle(self, message: Message, now: float) -> None:
        """Apply one message. `now`: seconds on the loop's clock."""
        self._now = now
        self._handlers[type(message)](message)

    def advance(self, now: float) -> None:
        """Keep two steps in flight while there is work, and adapters moving."""
        self._now = now
        if self.lifecycle.busy:
            self.lifecycle.sweep(self.group)
        group = self.group
        if group is None:
            self._give_up_waiting()
        else:
            while self.group is group and self._step(group):
                pass
            self._metrics.busy(bool(group.in_flight), now)
        self.registry.trim(self._in_use)

    def end_all(self, make_error: Callable[[], RouterError]) -> None:
        """End every accepted request with an error of its own, and whoever waits for an adapter."""
        for sequence in list(self.live.values()):
            self._fail(sequence, make_error())
        self.lifecycle.end(make_error)

    def recover(self) -> None:
        """After a bug: nothing of the present epoch can be trusted."""
        self.end_all(lambda: InternalError("The router failed; the request was ended."))
        self._abandon("the router failed")

    def status(self, adapter: Adapter) -> AdapterStatus:
        return self.lifecycle.status(adapter, self.group)

    def snapshot(self) -> Snapshot:
        """Figures for a scrape. Must be called on the event loop."""
        group, waiting = self.group, len(self.queues)
        mine = Snapshot(
            running=len(self.live) - waiting,
            waiting=waiting,
            adapters_known=len(self.registry),
            tasks=len(asyncio.all_tasks()),
        )
        if group is None:
            return mine
        pool, residency = group.pool, group.residency
        entries = list(residency.entries())
        resident: Counter[str] = Counter()
        for entry in entries:
            if entry.place is Place.RESIDENT and (adapter := self.registry.get(entry.key)):
                resident[adapter.digest] += entry.bytes
        return replace(
            mine,
            blocks_free=pool.free_count,
            blocks_used=pool.used_count,
            rows_used=len(group.running),
            slots=residency.slots,
            slots_used=len(entries),
            adapter_bytes_used=residency.budget - residency.free_bytes,
            adapter_references=sum(entry.references for entry in entries),
            steps_in_flight=len(group.in_flight),
            resident_bytes=resident,
            ready=True,
        )

    # Steps.

    def _step(self, group: Group) -> bool:
        """Plan once and send the step. False when there is nothing more to do for now."""
        state = State(
            group.limits,
            self.queues,
            group.running,
            group.pool,
            group.residency,
            self.registry.get,
            self.lifecycle.demands,
            self.lifecycle.wanted_on_disk,
        )
        if len(group.in_flight) >= STEPS_IN_FLIGHT:
            work = plan_adapters(state, self._now)
            self.lifecycle.carry_out(work, group, self._now)
            return bool(work.rejects)
        chosen = plan(state, self._now)
        self.lifecycle.carry_out(chosen.adapters, group, self._now)
        if not (chosen.has_work or group.ending):
            return bool(chosen.adapters.rejects)
        self._leave_queues(chosen, group)
        self._metrics.preemptions += len(chosen.preempt)
        self._shards.send(apply_plan(chosen, group))
        return True

    def _leave_queues(self, chosen: Plan, group: Group) -> None:
        for sequence in chosen.admit:
            self.queues.remove(sequence)
            self.bounds.give_back(sequence)
            group.residency.acquire(sequence.keys, self._now)
            if sequence.first_token_at == 0.0 and sequence.restarts == 0:
                self._metrics.queue_time.observe(self._now - sequence.request.arrival)

    def _on_step(self, message: StepAnswered) -> None:
        group, result = self.group, message.result
        if group is None or result.epoch != group.epoch:
            return
        step = group.in_flight[0] if group.in_flight else None
        try:
            settled = settle(result, group, self._now, self._answered_at)
        except ContractBroken as error:
            self._abandon(str(error))
            return
        assert step is not None
        self._metrics.answered(result, step, settled, self._now - self._answered_at)
        self._answered_at = self._now
        self._after(settled, group)

    def _after(self, settled: Settled, group: Group) -> None:
        for sequence, outcome in settled.finished:
            self._close(sequence, outcome)
        for sequence in settled.released:
            group.residency.release(sequence.keys, self._now)
            if sequence.state is SequenceState.LEAVING:
                self._requeue(sequence)

    # Sequences.

    def _on_submitted(self, message: Submitted) -> None:
        sequence = message.sequence
        if sequence.state is SequenceState.DONE:
            return
        self.queues.add(sequence)
        if sequence.keys and self.group is not None:
            hit = self.group.residency.ready(sequence.keys)
            self._metrics.adapter_hits += hit
            self._metrics.adapter_misses += not hit

    def _on_cancelled(self, message: Cancelled) -> None:
        sequence = self.live.get(message.request_id)
        if sequence is not None:
            self._end(sequence, "cancelled")

    def _fail(self, sequence: Sequence, error: RouterError) -> None:
        """End a sequence, whatever it does, with a typed error."""
        if sequence.state is not SequenceState.DONE:
            sequence.request.stream.put(error)
        self._end(sequence, error.code)

    def _end(self, sequence: Sequence, outcome: str) -> None:
        """Take a sequence from queue or group. Its terminal event, if it gets one, was sent."""
        if sequence.state is SequenceState.RUNNING and self.group is not None:
            self.group.end(sequence)
        elif sequence.state is SequenceState.WAITING and sequence in self.queues:
            self.queues.remove(sequence)
        sequence.state = SequenceState.DONE
        self._close(sequence, outcome)

    def _close(self, sequence: Sequence, outcome: str) -> None:
        self.bounds.give_back(sequence)
        del self.live[sequence.request.id]
        self._metrics.ended(sequence, outcome, self._now)

    def _requeue(self, sequence: Sequence) -> None:
        sequence.rewind()
        sequence.queued_at = self._now
        self.queues.put_back(sequence)

    # The group.

    def _on_group_ready(self, message: GroupReady) -> None:
        known, self.info = self.info, message.info
        self.group = Group.of(
            message.epoch,
            message.info,
            step_tokens=self._config.max_step_tokens,
            patience=self._config.adapter_patience,
        )
        self.lost_at = None
        self._answered_at = self._now
        room = self.group.pool.total * self.group.pool.block_size
        for sequence in self.queues.all():
            if (known and known.model_digest != message.info.model_digest) or sequence.last_position > room:
                self._fail(
                    sequence, ShardLost("The model's process came back with another model or less memory.")
                )
        self.lifecycle.revive(lambda: next(self.tickets), self._now)

    def _on_group_lost(self, message: GroupLost) -> None:
        if self.group is not None and self.group.epoch == message.epoch:
            self._lose()

    def _abandon(self, reason: str) -> None:
        if self.group is not None:
            log.error("giving up shard group, epoch %d: %s", self.group.epoch, reason)
            self._shards.abandon(self.group.epoch, reason)
            self._lose()

    def _lose(self) -> None:
        """Requests without a token wait for the next group in their old place, the others that ran end."""
        self.group = None
        self.lost_at = self._now
        self._metrics.groups_lost += 1
        self._metrics.busy(False, self._now)
        self.lifecycle.reset()
        for sequence in list(self.live.values()):
            if sequence.state is SequenceState.WAITING:
                continue
            if sequence.state is SequenceState.DONE:
                self._close(sequence, "lost")
            elif sequence.generated or sequence.restarts >= MAX_RESTARTS:
                self._fail(
                    sequence, ShardLost("The model's process failed during this request.", retry_after=5.0)
                )
            else:
                sequence.restarts += 1
                self._requeue(sequence)

    def _give_up_waiting(self) -> None:
        if self.lost_at is not None and self._now - self.lost_at > self._patience_lost and self.waits:
            self.end_all(
                lambda: ShardLost("The model's process did not come back in time.", retry_after=10.0)
            )

    def _on_drain_began(self, message: DrainBegan) -> None:
        self.lifecycle.refuse_disk_waits(draining)

    def _on_drain_ended(self, message: DrainEnded) -> None:
        self.end_all(draining)

    # Adapters.

    def _on_disk_wished(self, message: DiskWished) -> None:
        self.lifecycle.wish_disk(message, self._now)

    def _on_load_wished(self, message: LoadWished) -> None:
        self.lifecycle.wish(message, self.group, next(self.tickets), self._now)

    def _on_report(self, message: AdapterReport) -> None:
        self.lifecycle.report(message, self.group, self._now)

    def _in_use(self, key: str) -> bool:
        held = self.group is not None and self.group.residency.get(key) is not None
        return held or self.queues.waiting(key) > 0


def draining() -> Draining:
    """What a call gets once nothing new is accepted."""
    return Draining("The server is going down.", retry_after=10.0)
