"""Channels and streams to one shard group in one epoch: plans out, answers in order, and the watchdog."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..proto import shard_pb2, shard_pb2_grpc
from ..proto.credentials import Credentials
from ..proto.transport import open_channel
from .errors import RanksDiffer, ShardLost
from .rpc_errors import typed

if TYPE_CHECKING:
    from ..proto.shard_pb2_grpc import ShardAsyncStub

log = logging.getLogger(__name__)

_READINESS = health_pb2.HealthCheckRequest(service="readiness")
"""Asks a shard whether it takes new work: no longer, once it was told to stop."""

PROTOCOL_VERSION = 1
FAREWELL_SECONDS = 1.0
"""How long a shard gets to end its stream after the farewell."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 4000),
    ("grpc.http2.ping_timeout_ms", 4000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
)
"""A shard must bear a ping every two seconds on an idle stream: it sets
`grpc.http2.min_ping_interval_without_data_ms` below that, else it answers with too_many_pings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds. A step's follows from its work: the prompt of a large model takes long on a CPU."""

    info: float = 10.0
    tokenizer: float = 60.0
    load: float = 120.0
    unload: float = 30.0
    download_silence: float = 300.0
    """A download may be silent this long between two events."""
    step: float = 20.0
    step_token: float = 0.5
    reconnect: float = 0.5
    """Most seconds between two tries to reach a group."""

    def of(self, plan: shard_pb2.StepPlan) -> float:
        tokens = len(plan.decode_rows) + sum(len(chunk.tokens) for chunk in plan.chunks)
        return self.step + self.step_token * tokens


class Connection:
    """One epoch's streams. `lost` is set, with the reason, by the first thing that goes wrong; `released`
    where this side leaves in order.

    Args:
        answered: takes rank 0's answers.
        draining: called once a rank wants no new work, since it is about to stop.
    """

    def __init__(
        self,
        epoch: int,
        addresses: tuple[str, ...],
        deadlines: Deadlines,
        answered: Callable[[shard_pb2.StepResult], None],
        credentials: Credentials | None = None,
        draining: Callable[[], None] = lambda: None,
    ) -> None:
        self.epoch = epoch
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._draining = draining
        self._deadlines = deadlines
        self._channels = [open_channel(each, CHANNEL_OPTIONS, credentials) for each in addresses]
        self._health: list[Any] = [health_pb2_grpc.HealthStub(channel) for channel in self._channels]
        self.stubs = [cast("ShardAsyncStub", shard_pb2_grpc.ShardStub(channel)) for channel in self._channels]
        self._answers = [_Answers(answered if rank == 0 else _drop) for rank in range(len(addresses))]
        self._outgoing: list[asyncio.Queue[shard_pb2.StepPlan]] = [asyncio.Queue() for _ in addresses]
        self._unanswered: deque[tuple[int, float]] = deque()
        self._oldest_since = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._decoding: list[asyncio.Task[None]] = []
        """Readers of the decode streams, by rank."""

    async def open(self) -> list[shard_pb2.InfoReply]:
        """Ask every rank what it is, then open the decode streams. Raises a typed error if a rank is missing
        or the ranks do not form one group."""
        calls = [
            typed(stub.Info(shard_pb2.InfoRequest(), timeout=self._deadlines.info)) for stub in self.stubs
        ]
        infos = await asyncio.gather(*calls)
        check_group(infos)
        if not all(await asyncio.gather(*(self._is_ready(stub) for stub in self._health))):
            raise ShardLost("A rank is about to stop.")
        for rank, stub in enumerate(self.stubs):
            call = stub.Decode()
            self._spawn(self._write(rank, call))
            self._decoding.append(self._spawn(self._read(rank, call)))
        self._spawn(self._watch())
        for stub in self._health:
            self._spawn(self._watch_readiness(stub))
        infos[0].adapter_bytes = min(info.adapter_bytes for info in infos)
        return infos

    def send(self, plan: shard_pb2.StepPlan) -> None:
        """Hand a plan to every rank: by Prefill if it only holds prompt work, else on the decode stream."""
        if not self._unanswered:
            self._oldest_since = time.monotonic()
        self._unanswered.append((plan.seq, self._deadlines.of(plan)))
        prefill = bool(plan.chunks) and not plan.decode_rows
        for rank, stub in enumerate(self.stubs):
            if prefill:
                self._spawn(self._read(rank, stub.Prefill(plan), seq=plan.seq))
            else:
                self._outgoing[rank].put_nowait(plan)

    def lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    async def close(self) -> None:
        """Leave. Shards whose streams are intact are told so, and stay; one whose stream breaks exits."""
        if self._decoding and not self.lost.done():
            for outgoing in self._outgoing:
                outgoing.put_nowait(shard_pb2.StepPlan(epoch=self.epoch, farewell=True))
            await asyncio.wait(self._decoding, timeout=FAREWELL_SECONDS)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for channel in self._channels:
            await channel.close()

    async def _is_ready(self, stub: Any) -> bool:
        """This rank takes work. One that does not say so either way does."""
        try:
            reply = await stub.Check(_READINESS, timeout=self._deadlines.info)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
                return True
            raise ShardLost(f"A rank does not tell its health: {error.details()}") from error
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def _watch_readiness(self, stub: Any) -> None:
        """Hear when this rank is about to stop. A broken stream is told by the decode stream."""
        call = stub.Watch(_READINESS)
        try:
            async for reply in call:
                if reply.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    self._draining()
        except grpc.aio.AioRpcError:
            return
        finally:
            call.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a stream to a shard failed", exc_info=error)
            self.lose(f"{type(error).__name__} on a stream")

    async def _write(self, rank: int, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """The stream's reader sees a broken stream too, with its status: that one reports it."""
        try:
            while True:
                await call.write(await self._outgoing[rank].get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self.lose(f"rank {rank}: the decode stream takes no plans ({type(error).__name__})")
        finally:
            call.cancel()

    async def _read(self, rank: int, call: Any, seq: int = 0) -> None:
        """Take answers from a decode stream, or from one Prefill (`seq`), until it ends."""
        last = False
        try:
            while (result := await call.read()) is not grpc.aio.EOF:
                last = result.last
                self._take(rank, result)
        except grpc.aio.AioRpcError as error:
            self.lose(f"rank {rank}: {error.code().name}: {error.details()}")
            return
        finally:
            call.cancel()
        if not (seq and last):
            self.lose(f"rank {rank}: {f'prefill {seq}' if seq else 'the decode stream'} ended early")

    def _take(self, rank: int, result: shard_pb2.StepResult) -> None:
        if self.lost.done():
            return
        if result.epoch != self.epoch:
            self.lose(f"rank {rank}: an answer of epoch {result.epoch}")
        elif not self._answers[rank].take(result):
            self.lose(f"rank {rank}: a second answer to step {result.seq}")
        done = min(answers.done for answers in self._answers)
        while self._unanswered and self._unanswered[0][0] <= done:
            self._unanswered.popleft()
            self._oldest_since = time.monotonic()

    async def _watch(self) -> None:
        """A step that takes longer than its work can explain means that a rank hangs."""
        while True:
            await asyncio.sleep(0.25)
            if self._unanswered and time.monotonic() - self._oldest_since > self._unanswered[0][1]:
                self.lose(f"step {self._unanswered[0][0]} passed its deadline")


class _Answers:
    """Puts one rank's answers into seq order: Prefill's and Decode's come on streams of their own."""

    def __init__(self, deliver: Callable[[shard_pb2.StepResult], None]) -> None:
        self.done = 0
        """Every step up to this one is answered in full."""
        self._deliver = deliver
        self._early: dict[int, list[shard_pb2.StepResult]] = {}

    def take(self, result: shard_pb2.StepResult) -> bool:
        """Deliver what is in order, keep what is early. False for a step that was answered already."""
        if result.seq <= self.done:
            return False
        if result.seq > self.done + 1:
            self._early.setdefault(result.seq, []).append(result)
            return True
        self._pass_on(result)
        while (parts := self._early.pop(self.done + 1, None)) is not None:
            for part in parts:
                self._pass_on(part)
            if not parts[-1].last:
                break
        return True

    def _pass_on(self, result: shard_pb2.StepResult) -> None:
        if result.last:
            self.done = result.seq
        self._deliver(result)


def _drop(result: shard_pb2.StepResult) -> None:
    """Answers of ranks other than 0 only count as answers."""


def check_group(infos: list[shard_pb2.InfoReply]) -> None:
    """RanksDiffer unless these ranks speak this protocol and hold the same model in the same layout."""
    for rank, info in enumerate(infos):
        if info.protocol_version != PROTOCOL_VERSION:
            raise RanksDiffer(
                f"rank {rank} speaks protocol {info.protocol_version}, the router {PROTOCOL_VERSION}"
            )
        if (info.rank, info.world_size) != (rank, len(infos)):
            raise RanksDiffer(
                f"the shard given as rank {rank} of {len(infos)} says it is rank {info.rank} "
                f"of {info.world_size}"
            )
        if len(info.kv_groups) != 1:
            raise RanksDiffer(f"rank {rank} has {len(info.kv_groups)} KV groups; one is supported")
        for name in (
            "model_digest",
            "dtype",
            "adapter_slots",
            "max_num_seqs",
            "max_step_tokens",
            "max_model_len",
        ):
            own, first = getattr(info, name), getattr(infos[0], name)
            if own != first:
                raise RanksDiffer(f"rank {rank} and rank 0 differ in {name}: {own} and {first}")
        if list(info.kv_groups) != list(infos[0].kv_groups):
            raise RanksDiffer(f"rank {rank} and rank 0 differ in their KV blocks")
