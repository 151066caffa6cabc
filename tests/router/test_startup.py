"""When the wait for the first group ends, and how the reason reaches the operator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from loraplex.proto import shard_pb2
from loraplex.router.connection import Deadlines
from loraplex.router.errors import RouterError
from loraplex.router.shards import GrpcShardGroup
from loraplex.router.startup import REFUSED, UNREACHABLE, StartFailed, until_ready

from ..fakes.certificates import Authority, Identity
from ..fakes.polling import until
from ..fakes.shard import make_info
from ..fakes.shard_server import FakeServicer, fake_server

QUICK = Deadlines(reconnect=0.05)


@dataclass
class FakeGroup:
    addresses: tuple[str, ...]
    trouble: str = ""
    ranks_differ: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def connecting(*addresses: str, **options: Any) -> AsyncIterator[tuple[GrpcShardGroup, asyncio.Event]]:
    """A group that tries to connect, and whether it has been ready."""
    group, heard = GrpcShardGroup(addresses, QUICK, **options), Listener()
    group.start(heard)
    try:
        yield group, heard.ready
    finally:
        await group.close()


class Listener:
    """Notes that a group is ready."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()

    def group_ready(self, epoch: int, info: shard_pb2.InfoReply) -> None:
        self.ready.set()

    def step_answered(self, result: shard_pb2.StepResult) -> None: ...

    def group_draining(self, epoch: int) -> None: ...

    def group_lost(self, epoch: int, error: RouterError) -> None: ...


async def at_once() -> None:
    """Ready from the beginning."""


async def never() -> None:
    await asyncio.Event().wait()


def assert_alone() -> None:
    """Nothing else runs on this loop."""
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_it_ends_with_the_first_group() -> None:
    await until_ready(at_once(), [FakeGroup(("a:1",)), FakeGroup(("b:1",))], timeout=30)
    await asyncio.sleep(0)
    assert_alone()


async def test_silence_ends_it_with_every_address_and_reason() -> None:
    groups = [
        FakeGroup(("a:1", "a:2"), "refused"),
        FakeGroup(("b:1",), "refused"),
        FakeGroup(("c:1",), "lost"),
    ]
    with pytest.raises(StartFailed) as caught:
        await until_ready(never(), groups, timeout=0.05)
    assert caught.value.code == UNREACHABLE
    assert str(caught.value) == (
        "no shard answers at a:1, a:2, b:1, c:1 after 0.05 s (last error: refused; lost)"
    )


async def test_ranks_that_differ_end_it_at_once() -> None:
    groups = [FakeGroup(("a:1",)), FakeGroup(("b:1",), "rank 1 and rank 0 differ in dtype")]
    asyncio.get_running_loop().call_soon(groups[1].ranks_differ.set)
    with pytest.raises(StartFailed, match=r"^rank 1 and rank 0 differ in dtype$") as caught:
        await until_ready(never(), groups, timeout=30)
    assert caught.value.code == REFUSED


async def test_a_cancelled_wait_cancels_what_it_waits_for() -> None:
    task = asyncio.create_task(until_ready(never(), [FakeGroup(("a:1",))], timeout=30))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert_alone()


async def test_a_shard_that_is_not_there_is_named_by_its_address() -> None:
    async with fake_server() as server:
        await server.stop()
        async with connecting(server.address) as (group, _):
            with pytest.raises(
                StartFailed, match=rf"{server.address} after .*UNAVAILABLE.*refused"
            ) as caught:
                await until_ready(never(), [group], timeout=1.0)
    assert caught.value.code == UNREACHABLE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol_version": 9}, "^rank 1 speaks protocol 9, the router 1$"),
        ({"world_size": 3}, "^the shard given as rank 1 of 2 says it is rank 1 of 3$"),
        ({"model_digest": "other"}, "^rank 1 and rank 0 differ in model_digest: other and "),
        ({"max_model_len": 7}, "^rank 1 and rank 0 differ in max_model_len: 7 and "),
    ],
)
async def test_real_ranks_that_differ_refuse_the_start(changes: dict[str, Any], message: str) -> None:
    infos = [make_info(), make_info()]
    for rank, info in enumerate(infos):
        info.rank, info.world_size = rank, 2
    for name, value in changes.items():
        setattr(infos[1], name, value)
    async with (
        fake_server(FakeServicer(infos[0])) as first,
        fake_server(FakeServicer(infos[1])) as second,
        connecting(first.address, second.address) as (group, ready),
    ):
        with pytest.raises(StartFailed, match=message) as caught:
            await until_ready(never(), [group], timeout=30)
        assert caught.value.code == REFUSED
        setattr(infos[1], next(iter(changes)), getattr(infos[0], next(iter(changes))))
        await asyncio.wait_for(ready.wait(), 30)


async def test_a_group_over_tls_becomes_ready(identity: Identity) -> None:
    own = identity.credentials()
    async with (
        fake_server(credentials=own) as server,
        connecting(server.address, credentials=own) as (_, ready),
    ):
        await asyncio.wait_for(ready.wait(), 30)


async def test_a_router_with_another_authority_does_not_connect_and_says_so(
    identity: Identity, stranger: Identity
) -> None:
    async with (
        fake_server(credentials=identity.credentials()) as server,
        connecting(server.address, credentials=stranger.credentials()) as (group, ready),
    ):
        await until(lambda: group.trouble)
        with pytest.raises(StartFailed, match=r"last error: UNAVAILABLE: .*CERTIFICATE_VERIFY_FAILED"):
            await until_ready(never(), [group], timeout=0.2)
        assert not ready.is_set()


async def test_a_certificate_for_another_host_is_refused_unless_it_is_named(authority: Authority) -> None:
    other = authority.issue("DNS:shard.test")
    async with fake_server(credentials=other.credentials()) as server:
        async with connecting(server.address, credentials=other.credentials()) as (group, ready):
            await until(lambda: group.trouble)
            assert "127.0.0.1" in group.trouble
            assert not ready.is_set()
        async with connecting(server.address, credentials=other.credentials("shard.test")) as (_, ready):
            await asyncio.wait_for(ready.wait(), 30)
