"""A real server and real channels on loopback, with certificates of one authority or another, or none."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from loraplex.proto import shard_pb2, shard_pb2_grpc
from loraplex.proto.credentials import Credentials
from loraplex.proto.transport import open_channel

from ..fakes.certificates import Authority, Identity
from ..fakes.shard_server import fake_server


async def ask(address: str, credentials: Credentials | None) -> str:
    """The architecture that a shard names. Raises grpc.aio.AioRpcError."""
    async with open_channel(address, [("grpc.enable_http_proxy", 0)], credentials) as channel:
        reply = await shard_pb2_grpc.ShardStub(channel).Info(shard_pb2.InfoRequest(), timeout=20)
        return str(reply.architecture)


async def refusal(address: str, credentials: Credentials | None) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(address, credentials)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


async def test_both_sides_of_one_authority_talk(identity: Identity) -> None:
    async with fake_server(credentials=identity.credentials()) as server:
        assert await ask(server.address, identity.credentials()) == "FakeForCausalLM"


async def test_a_client_without_a_certificate_is_refused(identity: Identity) -> None:
    async with fake_server(credentials=identity.credentials()) as server:
        trusting = grpc.ssl_channel_credentials(identity.credentials().authority)
        options = [("grpc.enable_http_proxy", 0)]
        async with grpc.aio.secure_channel(server.address, trusting, options=options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await shard_pb2_grpc.ShardStub(channel).Info(shard_pb2.InfoRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await refusal(server.address, None), "nor is one that does not encrypt"


async def test_a_client_of_another_authority_is_refused(identity: Identity, stranger: Identity) -> None:
    own = identity.credentials()
    mixed = stranger.credentials()
    forged = Credentials(certificate=mixed.certificate, key=mixed.key, authority=own.authority)
    async with fake_server(credentials=own) as server:
        assert await refusal(server.address, forged)


async def test_a_server_of_another_authority_is_not_believed(identity: Identity, stranger: Identity) -> None:
    async with fake_server(credentials=stranger.credentials()) as server:
        assert "CERTIFICATE_VERIFY_FAILED" in await refusal(server.address, identity.credentials())


async def test_a_certificate_is_good_for_the_host_it_names_or_the_name_that_is_asked_for(
    authority: Authority, identity: Identity
) -> None:
    async with fake_server(credentials=authority.issue("DNS:shard.test").credentials()) as server:
        assert "127.0.0.1" in await refusal(server.address, identity.credentials())
        assert await refusal(server.address, identity.credentials("other.test"))
        assert await ask(server.address, identity.credentials("shard.test")) == "FakeForCausalLM"


async def test_an_encrypting_client_does_not_talk_to_a_plain_server(identity: Identity) -> None:
    async with fake_server() as server:
        assert await refusal(server.address, identity.credentials())
        assert await ask(server.address, None) == "FakeForCausalLM"
