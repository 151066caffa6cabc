"""Mutual TLS between real routers and shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex.ports import free_port

from ..fakes.certificates import Authority, Identity
from .parts import LORAPLEX, complete, running
from .server import Server, serving

NO_PROXY = [("grpc.enable_http_proxy", 0)]


def shard_port(server: Server) -> int:
    words = Path(f"/proc/{server.find('shard')}/cmdline").read_bytes().decode().split("\0")
    return next(int(word.partition("=")[2]) for word in words if word.startswith("--port="))


def health(channel: grpc.Channel) -> int:
    with channel:
        return int(
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20).status
        )


def secured(port: int, ca: str, pair: Sequence[str] = ()) -> grpc.Channel:
    key, certificate = (Path(path).read_bytes() for path in pair) if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, certificate)
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=NO_PROXY)


def test_serve_encrypts_and_its_shard_talks_to_nobody_else(
    arguments: list[str], identity: Identity, stranger: Identity, tmp_path: Path
) -> None:
    with serving([*arguments, *identity.flags], tmp_path / "log") as server:
        assert server.complete("alpha", "hello")["usage"]["completion_tokens"] == 8
        port = shard_port(server)
        own = secured(port, identity.tls_ca, (identity.tls_key, identity.tls_cert))
        assert health(own) == health_pb2.HealthCheckResponse.SERVING
        for other in (
            secured(port, identity.tls_ca),
            secured(port, identity.tls_ca, (stranger.tls_key, stranger.tls_cert)),
            grpc.insecure_channel(f"127.0.0.1:{port}", options=NO_PROXY),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                health(other)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.stop() == 0
    assert "TLS)" in (tmp_path / "log").read_text()


def test_parts_on_machines_of_their_own_share_a_certificate_by_name(
    arguments: list[str], authority: Authority, stranger: Identity, tmp_path: Path
) -> None:
    """The shard listens on every address; the router asks for the name that the certificate carries."""
    named = authority.issue("DNS:shard.test")
    model = arguments[0]
    ports = free_port(), free_port(), free_port()
    shard = ["shard", model, "--dtype", "float32", "--kv-memory", "32MiB", "--host", "0.0.0.0"]
    router = ["router", "--served-model-name", "base", "--group", f"127.0.0.1:{ports[0]}"]
    router += ["--port", str(ports[1]), "--grpc-port", str(ports[2])]
    with running([*LORAPLEX, *shard, "--port", str(ports[0]), *named.flags], tmp_path / "shard") as holder:
        believing = [*named.flags, "--tls-name", "shard.test"]
        with running([*LORAPLEX, *router, *believing], tmp_path / "router") as front:
            assert complete(f"http://127.0.0.1:{ports[1]}", "base", front)
            assert front.stop() == 0
        for flags, reason in ((stranger.flags, "CERTIFICATE_VERIFY_FAILED"), (named.flags, "127.0.0.1")):
            impatient = [*LORAPLEX, *router, *flags, "--connect-timeout", "2"]
            with running(impatient, tmp_path / "refused") as front:
                assert front.wait() == 1
                start, _, error = front.last_line.partition(" (last error: ")
                assert start == f"loraplex router: no shard answers at 127.0.0.1:{ports[0]} after 2 s"
                assert reason in error
        assert holder.process.poll() is None
