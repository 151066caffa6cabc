"""The router's state and what changes it: messages in, steps out. Runs in the engine's loop only."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

from ..proto import shard_pb2
from .adapters import AdapterRegistry
from .client import AdapterStatus
from .config import RouterConfig
from .errors import Draining, InternalError, RouterError, ShardLost
from .fetches import AdapterTasks
from .fleet import Fleet
from .group import Group, context_length
from .lifecycle import AdapterLifecycle, copy_of
from .messages import (
    AdapterReport,
    Cancelled,
    DiskWaitEnded,
    DiskWished,
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
from .metrics import Metrics, Snapshot
from .queues import QueueBounds
from .residency import Place
from .scheduler import Plan, State, plan, plan_adapters
from .sequence import Sequence, SequenceState
from .shards import ShardGroup
from .sources import SourcePolicy
from .steps import ContractBroken, Settled, apply_plan, settle
from .versions import Adapter

log = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2
SAME = ("model_digest", "dtype", "vocab_size", "max_model_len", "max_rank", "adapter_slots")
"""In these all groups agree, so that any of them may serve any request."""
MAX_RESTARTS = 3
"""Lost groups after which a request without a token is not run again: it may be the cause."""


class Core:
    """Groups, registry and live sequences. `handle` applies one message, `advance` sends steps.

    Others may read the public attributes; only these two methods change them.

    Args:
        shards: every group of the configuration, in its order: a group's index is its place here.
        tasks: of each group: fetch, load and unload adapters, and report by messages.
        patience_lost: seconds that requests wait for a group to come back when the last one is lost.
    """

    def __init__(
        self,
        config: RouterConfig,
        shards: tuple[ShardGroup, ...],
        tasks: tuple[AdapterTasks, ...],
        metrics: Metrics,
        *,
        patience_lost: float,
        jitter: random.Random,
    ) -> None:
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
        self.fleet = Fleet(self.registry)
        self.info: shard_pb2.InfoReply | None = None
        """Of the groups that serve, or that served last: in what matters to a request they agree."""
        self.lost_at: float | None = None
        """Since when no group serves, after one did."""
        self.lifecycle = AdapterLifecycle(
            self.registry,
            self.fleet,
            tasks,
            metrics,
            fail=self._fail,
            turn_away=self._turn_away,
            abandon=self._abandon,
        )
        self._config = config
        self._shards = shards
        self._metrics = metrics
        self._patience_lost = patience_lost
        self._now = 0.0
        self._awaited = set(range(len(shards)))
        self._replan = False
        """Sequences have come to a group since it was planned for."""
        self._handlers: dict[type, Callable[[Any], None]] = {
            StepAnswered: self._on_step,
            Submitted: self._on_submitted,
            Cancelled: self._on_cancelled,
            GroupReady: self._on_group_ready,
            GroupDraining: self._on_group_draining,
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
    def complete(self) -> bool:
        """Every group of the configuration has answered once."""
        return not self._awaited

    @property
    def context_length(self) -> int:
        """Tokens of prompt and output together that every group can hold; 0 before the first one came."""
        infos = [group.info for group in self.fleet] or ([self.info] if self.info else [])
        return min(map(context_length, infos), default=0)

    @property
    def quiet(self) -> bool:
        """Every accepted request is over and the shards were told of every end."""
        return not self.live and all(group.idle for group in self.fleet)

    @property
    def waits(self) -> bool:
        """Time alone may change what is to be done."""
        return self.fleet.waiting_count > 0 or self.lifecycle.busy

    def handle(self, message: Message, now: float) -> None:
        """Apply one message. `now`: seconds on the loop's clock."""
        self._now = now
        self._handlers[type(message)](message)

    def advance(self, now: float) -> None:
        """Keep two steps in flight while there is work, and adapters moving."""
        self._now = now
        if self.lifecycle.busy:
            self.lifecycle.sweep()
            self.lifecycle.assign()
        if not self.fleet:
            self._give_up_waiting()
        self._replan = True
        while self._replan:
            self._replan = False
            for group in self.fleet:
                while self.fleet.of(group.epoch) and self._step(group):
                    pass
            self._share_out()
        self._release_drained()
        for group in self.fleet:
            self._metrics.busy(bool(group.in_flight), now, group.index)
        self.registry.trim(self._in_use)

    def end_all(self, make_error: Callable[[], RouterError]) -> None:
        """End every accepted request with an error of its own, and whoever waits for an adapter."""
        for sequence in list(self.live.values()):
            self._fail(sequence, make_error())
        self.lifecycle.end(make_error)

    def recover(self) -> None:
        """After a bug: nothing of the present epoch can be trusted."""
        self.end_all(lambda: InternalError("The router failed; the request was ended."))
        for group in self.fleet:
            self._abandon(group, "the router failed")

    def status(self, adapter: Adapter) -> AdapterStatus:
        return self.lifecycle.status(adapter)

    def groups_with(self, digest: str) -> list[int]:
        """Indices of groups with an adapter of this digest on disk; empty: of all that serve."""
        held = [adapter for adapter in self.registry if adapter.digest == digest] if digest else []
        return [
            group.index
            for group in self.fleet
            if not digest or any(adapter.copy(group.index).on_disk for adapter in held)
        ]

    def snapshot(self) -> Snapshot:
        """Figures for a scrape, of all groups together. Must be called on the event loop."""
        groups, waiting = list(self.fleet), self.fleet.waiting_count
        entries = [entry for group in groups for entry in group.residency.entries()]
        resident: Counter[str] = Counter()
        for entry in entries:
            if entry.place is Place.RESIDENT and (adapter := self.registry.get(entry.key)):
                resident[adapter.digest] += entry.bytes
        return Snapshot(
            running=len(self.live) - waiting,
            waiting=waiting,
            blocks_free=sum(group.pool.free_count for group in groups),
            blocks_used=sum(group.pool.used_count for group in groups),
            rows_used=sum(len(group.running) for group in groups),
            slots=sum(group.residency.slots for group in groups),
            slots_used=len(entries),
            adapter_bytes_used=sum(g.residency.budget - g.residency.free_bytes for g in groups),
            adapter_references=sum(entry.references for entry in entries),
            adapters_known=len(self.registry),
            steps_in_flight=sum(len(group.in_flight) for group in groups),
            tasks=len(asyncio.all_tasks()),
            resident_bytes=resident,
            ready=bool(self.fleet.accepting),
            groups_ready=len(self.fleet.accepting),
        )

    # Steps.

    def _step(self, group: Group) -> bool:
        """Plan once and send the step. False when there is nothing more to do for now."""
        state = State(
            group.limits,
            group.queues,
            group.running,
            group.pool,
            group.residency,
            self.registry.get,
            self.lifecycle.demands(group),
            self.lifecycle.wanted_on_disk(group),
            group.index,
            lambda adapter: adapter.pinned and not self.fleet.has_other_copy(adapter.key, group),
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
        self._shards[group.index].send(apply_plan(chosen, group))
        return True

    def _leave_queues(self, chosen: Plan, group: Group) -> None:
        if chosen.admit:
            self._metrics.admissions[str(group.index)] += len(chosen.admit)
        for sequence in chosen.admit:
            group.queues.remove(sequence)
            self.bounds.give_back(sequence)
            group.residency.acquire(sequence.keys, self._now)
            if sequence.first_token_at == 0.0 and sequence.restarts == 0:
                self._metrics.queue_time.observe(self._now - sequence.request.arrival)

    def _on_step(self, message: StepAnswered) -> None:
        result = message.result
        group = self.fleet.of(result.epoch)
        if group is None:
            return
        step = group.in_flight[0] if group.in_flight else None
        try:
            settled = settle(result, group, self._now, group.answered_at)
        except ContractBroken as error:
            self._abandon(group, str(error))
            return
        assert step is not None
        self._metrics.answered(result, step, settled, self._now - group.answered_at)
        group.answered_at = self._now
        self._after(settled, group)

    def _after(self, settled: Settled, group: Group) -> None:
        for sequence, outcome in settled.finished:
            self._close(sequence, outcome)
        for sequence in settled.released:
            group.residency.release(sequence.keys, self._now)
            if sequence.state is SequenceState.LEAVING:
                self._rewind(sequence)
                group.queues.put_back(sequence)
                if group.draining:
                    self._place_anew([sequence])

    # Sequences.

    def _on_submitted(self, message: Submitted) -> None:
        sequence = message.sequence
        if sequence.state is SequenceState.DONE:
            return
        self._place(sequence)
        group = self.fleet.of(sequence.epoch)
        if sequence.keys and group is not None:
            hit = group.residency.ready(sequence.keys)
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
        group = self.fleet.of(sequence.epoch)
        if sequence.state is SequenceState.RUNNING and group is not None:
            group.end(sequence)
        elif sequence.state is SequenceState.WAITING and self.fleet.waits(sequence):
            self.fleet.unqueue(sequence)
        sequence.state = SequenceState.DONE
        self._close(sequence, outcome)

    def _close(self, sequence: Sequence, outcome: str) -> None:
        self.bounds.give_back(sequence)
        self.fleet.forget(sequence)
        del self.live[sequence.request.id]
        self._metrics.ended(sequence, outcome, self._now)

    def _rewind(self, sequence: Sequence) -> None:
        sequence.rewind()
        sequence.queued_at = self._now

    # Which group serves what.

    def _place(self, sequence: Sequence, error: RouterError | None = None) -> None:
        """Let a sequence that belongs to no group wait for the one that serves it best, or, without any, for
        one to come. If none can have it, it ends with `error`."""
        accepting = self.fleet.accepting
        if not accepting:
            self.fleet.queue(sequence, None)
            return
        able = [g for g in accepting if g.holds(sequence) and g.epoch not in sequence.refused_by]
        group = self.fleet.place(sequence.keys, sequence.last_position, among=able)
        if group is None:
            self._fail(sequence, error or _less_than_before())
            return
        self.fleet.queue(sequence, group)
        self._replan = True

    def _place_anew(self, waiting: list[Sequence]) -> None:
        for sequence in waiting:
            self.fleet.unqueue(sequence)
            self._place(sequence)

    def _turn_away(self, sequence: Sequence, group: Group, error: RouterError) -> None:
        """This group cannot serve the adapters of a sequence that waits for it: another one may."""
        sequence.refused_by |= {group.epoch}
        self.fleet.unqueue(sequence)
        self._place(sequence, copy_of(error))

    def _share_out(self) -> None:
        """A group with nothing left to start takes over what waits elsewhere for room, or for an adapter that
        it has."""
        if len(self.fleet) < 2 or not self.fleet.waiting_count:
            return
        for group in self.fleet.accepting:
            for sequence in () if group.queues else self.fleet.takeovers(group):
                self.fleet.unqueue(sequence)
                self.fleet.queue(sequence, group)
                self._metrics.takeovers += 1
                self._replan = True

    # The groups.

    def _on_group_ready(self, message: GroupReady) -> None:
        self._awaited.discard(message.group)
        difference = self._difference(message.info)
        if difference:
            log.error("shard group %d is not used: its %s", message.group, difference)
            return
        known = self.info
        group = Group.of(
            message.group,
            message.epoch,
            message.info,
            step_tokens=self._config.max_step_tokens,
            patience=self._config.adapter_patience,
        )
        group.answered_at = self._now
        if not self.fleet:
            self.info = message.info
        self.fleet.add(group)
        self.lost_at = None
        other_model = known is not None and known.model_digest != message.info.model_digest
        if other_model:
            for sequence in self.fleet.waiting_sequences():
                self._fail(sequence, _less_than_before())
        self._place_anew(self.fleet.waiting_sequences())
        self.lifecycle.revive(lambda: next(self.tickets), self._now)

    def _difference(self, info: shard_pb2.InfoReply) -> str:
        """In what a group cannot stand in for those that serve; empty: it can."""
        if not self.fleet or self.info is None:
            return ""
        for name in SAME:
            mine, others = getattr(info, name), getattr(self.info, name)
            if mine != others:
                return f"{name} is {mine}, the others' {others}"
        return ""

    def _on_group_draining(self, message: GroupDraining) -> None:
        group = self.fleet.of(message.epoch)
        if group is not None and not group.draining:
            log.info("shard group %d is about to stop: it gets no new work", group.index)
            group.draining = True
            self._place_anew(group.queues.all())

    def _release_drained(self) -> None:
        """Let groups go that were to stop and have nothing left to do."""
        for group in self.fleet:
            if group.draining and group.idle and not group.load.tokens:
                self._shards[group.index].release(group.epoch)
                self._take_out(group)

    def _on_group_lost(self, message: GroupLost) -> None:
        if (group := self.fleet.of(message.epoch)) is not None:
            self._lose(group)

    def _abandon(self, group: Group, reason: str) -> None:
        log.error("giving up shard group %d, epoch %d: %s", group.index, group.epoch, reason)
        self._shards[group.index].abandon(group.epoch, reason)
        self._lose(group)

    def _lose(self, group: Group) -> None:
        """Requests without a token go on elsewhere, or wait for the next group, in their place by age; the
        others that ran end."""
        self._metrics.groups_lost += 1
        self._take_out(group)
        for sequence in [s for s in self.live.values() if s.epoch == group.epoch]:
            if sequence.state is SequenceState.DONE:
                self._close(sequence, "lost")
            elif sequence.state is SequenceState.WAITING:
                self._place(sequence)
            elif sequence.generated or sequence.restarts >= MAX_RESTARTS:
                self._fail(
                    sequence, ShardLost("The model's process failed during this request.", retry_after=5.0)
                )
            else:
                sequence.restarts += 1
                self._rewind(sequence)
                self._place(sequence)

    def _take_out(self, group: Group) -> None:
        self.fleet.remove(group)
        if not self.fleet:
            self.lost_at = self._now
        self._metrics.busy(False, self._now, group.index)
        self.lifecycle.lost(group)
        if self.fleet:
            self.lifecycle.revive(lambda: next(self.tickets), self._now)

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
        self.lifecycle.wish(message, next(self.tickets), self._now)

    def _on_report(self, message: AdapterReport) -> None:
        self.lifecycle.report(message, self._now)

    def _in_use(self, key: str) -> bool:
        return bool(self.fleet.entries(key)) or self.fleet.waiting(key) > 0


def _less_than_before() -> ShardLost:
    return ShardLost("The model's process came back with another model or less memory.")


def draining() -> Draining:
    """What a call gets once nothing new is accepted."""
    return Draining("The server is going down.", retry_after=10.0)
