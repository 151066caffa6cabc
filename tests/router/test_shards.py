"""The gRPC form of a shard group against a real server on loopback."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from prometheus_client import CollectorRegistry

from loraplex.proto import shard_pb2
from loraplex.router.config import RouterConfig
from loraplex.router.connection import Deadlines, check_group
from loraplex.router.engine import Engine
from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    InternalError,
    RouterError,
    ShardLost,
)
from loraplex.router.metrics import Metrics
from loraplex.router.request import Request, SamplingParams, TokenStream
from loraplex.router.rpc_errors import AdapterMemoryFull
from loraplex.router.shards import GrpcShardGroup

from ..fakes.polling import until
from ..fakes.shard import generate, make_info
from ..fakes.shard_server import FakeServer, FakeServicer, fake_server

QUICK = Deadlines(reconnect=0.05)
"""Nothing here fails because the machine is busy: the tests of deadlines shorten their own."""


class Heard:
    """Notes what a group tells."""

    def __init__(self) -> None:
        self.ready: list[tuple[int, shard_pb2.InfoReply]] = []
        self.results: list[shard_pb2.StepResult] = []
        self.draining: list[int] = []
        self.lost: list[tuple[int, RouterError]] = []

    def group_ready(self, epoch: int, info: shard_pb2.InfoReply) -> None:
        self.ready.append((epoch, info))

    def step_answered(self, result: shard_pb2.StepResult) -> None:
        self.results.append(result)

    def group_draining(self, epoch: int) -> None:
        self.draining.append(epoch)

    def group_lost(self, epoch: int, error: RouterError) -> None:
        self.lost.append((epoch, error))


@asynccontextmanager
async def connected(
    *servers: FakeServer, deadlines: Deadlines = QUICK
) -> AsyncIterator[tuple[GrpcShardGroup, Heard]]:
    group, heard = GrpcShardGroup(tuple(s.address for s in servers), deadlines), Heard()
    group.start(heard)
    try:
        await until(lambda: heard.ready)
        yield group, heard
    finally:
        await group.close()


def start_plan(epoch: int, seq: int = 1, row: int = 0) -> shard_pb2.StepPlan:
    plan = shard_pb2.StepPlan(epoch=epoch, seq=seq)
    plan.starts.add(row=row, prompt_length=2)
    plan.chunks.add(row=row, tokens=[1, 2], last=True)
    plan.block_tables.add().rows.add(row=row, blocks=[1 + row])
    return plan


def decode_plan(epoch: int, seq: int, *rows: int) -> shard_pb2.StepPlan:
    return shard_pb2.StepPlan(epoch=epoch, seq=seq, decode_rows=rows)


async def test_steps_go_by_prefill_or_decode_and_come_back_in_order() -> None:
    async with fake_server() as server, connected(server) as (group, heard):
        epoch, info = heard.ready[0]
        assert info.architecture == "FakeForCausalLM"
        group.send(start_plan(epoch))
        group.send(decode_plan(epoch, 2, 0))
        group.send(start_plan(epoch, 3, row=1))
        group.send(shard_pb2.StepPlan(epoch=epoch, seq=4, ends=[0, 1]))
        await until(lambda: len(heard.results) == 6)
        assert [(r.seq, r.last) for r in heard.results] == [
            (1, False),
            (1, True),
            (2, True),
            (3, False),
            (3, True),
            (4, True),
        ]
        tokens = [r.rows[0].tokens[0] for r in heard.results[1:3]]
        assert tokens == generate([1, 2], 2)
        assert (server.servicer.prefills, server.servicer.decodes) == (2, 2)
        assert not heard.lost


async def test_a_plan_of_another_epoch_is_dropped() -> None:
    async with fake_server() as server, connected(server) as (group, heard):
        group.send(start_plan(heard.ready[0][0] - 1))
        await asyncio.sleep(0.05)
        assert server.servicer.prefills == 0


async def test_two_ranks_get_the_same_commands_and_rank_0_answers() -> None:
    infos = [make_info(), make_info()]
    for rank, info in enumerate(infos):
        info.rank, info.world_size, info.adapter_bytes = rank, 2, 100 - rank
    async with (
        fake_server(FakeServicer(infos[0])) as first,
        fake_server(FakeServicer(infos[1])) as second,
        connected(first, second) as (group, heard),
    ):
        epoch, info = heard.ready[0]
        assert info.adapter_bytes == 99
        group.send(start_plan(epoch))
        group.send(decode_plan(epoch, 2, 0))
        await until(lambda: heard.results and heard.results[-1].seq == 2)
        await until(lambda: second.servicer.device.last_seq == 2)
        assert [r.seq for r in heard.results if r.last] == [1, 2]
        assert (await group.load("d1", 3)).bytes == 11
        assert second.servicer.device.slots == first.servicer.device.slots == {3: "d1"}
        request = shard_pb2.DownloadAdapterRequest(source=shard_pb2.DownloadAdapterRequest.HUB, id="o/n")
        events = [event async for event in group.download(request)]
        assert [event.WhichOneof("event") for event in events] == ["progress", "manifest"]
        assert (first.servicer.digests, second.servicer.digests) == ([""], ["d1"])


async def test_a_dead_shard_is_noticed_at_once_and_found_again() -> None:
    async with fake_server() as server, connected(server) as (group, heard):
        await server.stop()
        await until(lambda: heard.lost)
        epoch, error = heard.lost[0]
        assert epoch == heard.ready[0][0]
        assert isinstance(error, ShardLost)
        with pytest.raises(ShardLost):
            await group.load("d", 0)
        await server.start()
        await until(lambda: len(heard.ready) == 2)
        assert heard.ready[1][0] > epoch
        group.send(start_plan(heard.ready[1][0]))
        await until(lambda: heard.results)


async def test_a_step_past_its_deadline_loses_the_group() -> None:
    impatient = Deadlines(step=0.3, step_token=0.0, reconnect=0.05)
    async with fake_server() as server, connected(server, deadlines=impatient) as (group, heard):
        server.servicer.silent = True
        group.send(decode_plan(heard.ready[0][0], 1, 0))
        await until(lambda: heard.lost)
        assert not heard.results


async def test_an_answer_of_a_foreign_epoch_loses_the_group() -> None:
    async with fake_server(FakeServicer(wrong_epoch=True)) as server, connected(server) as (group, heard):
        group.send(start_plan(heard.ready[0][0]))
        await until(lambda: heard.lost)
        assert not heard.results


async def test_an_abandoned_epoch_is_over() -> None:
    async with fake_server() as server, connected(server) as (group, heard):
        epoch = heard.ready[0][0]
        group.abandon(epoch + 1, "not this one")
        group.abandon(epoch, "broken")
        await until(lambda: len(heard.ready) == 2)
        assert [e for e, _ in heard.lost] == [epoch]


async def test_a_group_that_is_about_to_stop_says_so_and_is_left_in_order() -> None:
    async with fake_server() as server, connected(server) as (group, heard):
        epoch = heard.ready[0][0]
        await server.take_work(False)
        await until(lambda: heard.draining == [epoch])
        group.send(start_plan(epoch))
        await until(lambda: heard.results)
        group.release(epoch + 1)
        group.release(epoch)
        group.release(epoch)
        await until(lambda: server.servicer.farewells)
        await asyncio.sleep(0.3)
        assert (len(heard.ready), heard.lost) == (1, [])
        await server.take_work(True)
        await until(lambda: len(heard.ready) == 2)


async def test_a_deadline_follows_from_the_work() -> None:
    deadlines = Deadlines(step=10.0, step_token=0.5)
    plan = decode_plan(1, 1, 0, 1)
    plan.chunks.add(row=2, tokens=[1] * 6)
    assert deadlines.of(plan) == 14.0


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", AdapterNotFound),
        (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_REJECTED", AdapterRejected),
        (grpc.StatusCode.UNAVAILABLE, "ADAPTER_FETCH_FAILED", AdapterFetchFailed),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_MEMORY_FULL", AdapterMemoryFull),
        (grpc.StatusCode.ABORTED, "EPOCH_ENDED", ShardLost),
        (grpc.StatusCode.UNAVAILABLE, "", ShardLost),
        (grpc.StatusCode.FAILED_PRECONDITION, "SLOT_BUSY", InternalError),
    ],
)
async def test_refusals_are_typed(code: grpc.StatusCode, reason: str, expected: type[RouterError]) -> None:
    async with fake_server() as server, connected(server) as (group, _):
        server.servicer.refusal = (code, reason, "tensor q_proj")
        request = shard_pb2.DownloadAdapterRequest(id="o/n")
        for call in (lambda: group.load("d", 0), lambda: anext(group.download(request))):
            with pytest.raises(expected) as caught:
                await call()
            if reason and expected is not InternalError:
                assert caught.value.message == "tensor q_proj"
        server.servicer.refusal = None
        assert (await group.tokenizer()).bos_id == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol_version": 9}, "protocol 9"),
        ({"rank": 0}, "says it is"),
        ({"model_digest": "other"}, "model_digest"),
        ({"max_num_seqs": 3}, "max_num_seqs"),
        ({"kv_groups": []}, "0 KV groups"),
    ],
)
def test_ranks_that_form_no_group_are_refused(change: dict[str, object], message: str) -> None:
    infos = [make_info(), make_info()]
    for rank, info in enumerate(infos):
        info.rank, info.world_size = rank, 2
    check_group(infos)
    for name, value in change.items():
        infos[1].ClearField(name)  # type: ignore[arg-type]
        if value:
            setattr(infos[1], name, value)
    with pytest.raises(InternalError, match=message):
        check_group(infos)


def test_ranks_with_other_blocks_are_refused() -> None:
    infos = [make_info(blocks=10), make_info(blocks=11)]
    for rank, info in enumerate(infos):
        info.rank, info.world_size = rank, 2
    with pytest.raises(InternalError, match="KV blocks"):
        check_group(infos)


async def test_a_group_that_is_not_there_yet_is_waited_for() -> None:
    async with fake_server() as server:
        await server.stop()
        group, heard = GrpcShardGroup((server.address,), QUICK), Heard()
        group.start(heard)
        await asyncio.sleep(0.2)
        assert not heard.ready
        with pytest.raises(ShardLost):
            await group.tokenizer()
        await server.start()
        await until(lambda: heard.ready)
        await group.close()
        assert not heard.lost


async def test_the_engine_over_grpc_survives_a_restart_of_the_shard() -> None:
    async with fake_server() as server:
        engine = Engine(
            RouterConfig(served_model_name="base", groups=((server.address,),)),
            (GrpcShardGroup((server.address,), QUICK),),
            Metrics(CollectorRegistry()),
            jitter=random.Random(0),
        )
        engine.start()
        await engine.wait_ready()

        def ask(seed: int, count: int) -> Request:
            request = Request(
                id=f"{seed}-{count}",
                tenant="",
                adapters=(),
                prompt=[seed, 5],
                params=SamplingParams(max_tokens=count, seed=seed),
                stream=TokenStream(),
                arrival=asyncio.get_running_loop().time(),
            )
            engine.submit(request)
            return request

        async def tokens(request: Request) -> list[int]:
            async with asyncio.timeout(30):
                return [t async for event in request.stream for t in event.tokens]

        requests = [ask(seed, 20) for seed in range(20)]
        for seed, request in enumerate(requests):
            assert await tokens(request) == generate([seed, 5], 20, seed=seed)
        long = ask(1, 3000)
        async for _ in long.stream:
            break
        await server.stop()
        with pytest.raises(ShardLost):
            await tokens(long)
        waiting = ask(2, 5)
        await server.start()
        assert await tokens(waiting) == generate([2, 5], 5, seed=2)
        await engine.close()
