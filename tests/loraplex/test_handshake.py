"""Certificates that would not do are found before anything is started."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loraplex.handshake import rehearse
from loraplex.keeper import LaunchFailed
from loraplex.launch import serve
from loraplex.router.config import RouterConfig
from loraplex.shard.config import ShardConfig

from ..fakes.certificates import Authority, Identity


def test_a_certificate_for_the_shards_host_will_do(authority: Authority, identity: Identity) -> None:
    rehearse(identity, "127.0.0.1")
    rehearse(identity, "localhost")
    rehearse(authority.issue("DNS:shard.test"), "shard.test")
    rehearse(Identity(None, None, None), "anything")  # type: ignore[arg-type]


def test_one_for_another_host_will_not(authority: Authority) -> None:
    other = authority.issue("DNS:shard.test")
    with pytest.raises(
        ValueError, match=r"would not do for a shard at 127\.0\.0\.1: .*mismatch.*'; --tls-name"
    ):
        rehearse(other, "127.0.0.1")


def test_one_for_servers_alone_will_not(authority: Authority) -> None:
    one_sided = authority.issue("DNS:server.test", usage="serverAuth")
    with pytest.raises(ValueError, match=r"at server\.test: unsuitable certificate purpose$"):
        rehearse(one_sided, "server.test")


def test_one_of_another_authority_will_not(identity: Identity, stranger: Identity) -> None:
    with pytest.raises(ValueError, match="would not do"):
        rehearse(replace(identity, tls_ca=stranger.tls_ca), "127.0.0.1")


@pytest.mark.parametrize("fault", ["name", "key"])
def test_serve_refuses_before_it_starts_anything(
    authority: Authority, identity: Identity, stranger: Identity, fault: str
) -> None:
    files = {
        "name": authority.issue("DNS:shard.test"),
        "key": replace(identity, tls_key=stranger.tls_key),
    }[fault]
    tls = {"tls_cert": files.tls_cert, "tls_key": files.tls_key, "tls_ca": files.tls_ca}
    shard = ShardConfig(model="m", **tls)  # type: ignore[arg-type]
    router = RouterConfig(served_model_name="m", groups=(("127.0.0.1:0",),), port=0, grpc_port=0, **tls)  # type: ignore[arg-type]
    with pytest.raises(LaunchFailed, match="--tls-") as caught:
        serve(shard, router)
    assert caught.value.code == 2
